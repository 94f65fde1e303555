import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.data import open_source
from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.base import Conditioning
from t2i_jax.systems.capabilities import Evaluated, Guide, PictureGuide
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.guides.semantic_guidance import (
  ENCODER,
  GIVEN_WEIGHTS,
  IMAGE,
  TEXT,
  SemanticGuidance,
  gram,
)
from t2i_jax.systems.text.clip import CLIP, TOWERS, matching

OWN_TEXT = TextConditioner(length=5, vocab_size=16, width=8, layers=1, heads=2)
CLIP_SYSTEM = CLIP(OWN_TEXT, 8, 4, 16, 2, 2, 6, "gelu")
SYSTEM = SemanticGuidance(
  TextConditioner("component", encoders=("clip",), components={"clip": CLIP_SYSTEM}), 8, "cosine",
  50, time_width=8,
)  # fmt: skip
KEY, STEP = jax.random.key(3), jnp.int32(0)
IDS = jnp.array([[1, 5, 2, 0, 0], [1, 6, 2, 0, 0], [1, 5, 7, 2, 0], [1, 9, 2, 0, 0]])
TIMES = jnp.array([0, 10, 30, 49])


def pictures(seed):
  return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, (4, 8, 8, 3)), jnp.float32)


def batch_of(side, rows):
  source = open_source("scenes", "train", 16, 0)
  images = source.fetch(np.arange(rows), np.zeros(rows, np.uint64)).image
  return {"image": images[:, :: 16 // side, :: 16 // side]}


@pytest.fixture(scope="module")
def frozen():
  ids = {"text": {"text_encoder": {"ids": IDS, "mask": IDS > 0}}}
  own = jax.jit(CLIP_SYSTEM.init)(KEY, {**batch_of(8, 4), **ids})
  # Larger than at initialisation, so that pictures differ in what is seen of them.
  own = jax.tree.map(lambda x: 3 * x if x.ndim > 1 else x, own)
  return {"params": {"clip": own["params"]}}


@pytest.fixture(scope="module")
def variables(frozen):
  return trees.merge(jax.jit(SYSTEM.init)(KEY, batch_of(8, 4), frozen), frozen)


@pytest.fixture(scope="module")
def moved(variables):
  """An encoder in general position."""
  random = np.random.default_rng(1)
  own = jax.tree.map(
    lambda x: x + 0.2 * random.normal(size=x.shape).astype("f4"), variables["params"][ENCODER]
  )
  return trees.with_params(variables, {ENCODER: own})


def weights(text=0.0, semantic=0.0, style=0.0, content=0.0):
  return jnp.tile(jnp.array([[text, semantic, style, content]]), (4, 1))


def log_prob(variables, x, **extra):
  return SYSTEM.log_prob(variables, x, TIMES, Conditioning(extra=extra))


LOG_PROB = jax.jit(log_prob)


def test_begins_as_clip_itself(variables, frozen):
  towers = frozen["params"]["clip"][TOWERS]
  own = variables["params"][ENCODER]
  np.testing.assert_array_equal(own["patches"]["kernel"], towers["vision"]["patches"]["kernel"])
  x = pictures(0)
  seen, layers = SYSTEM._features(variables, x, TIMES)
  clean = CLIP_SYSTEM.embed_images({"params": frozen["params"]["clip"]}, x)
  np.testing.assert_allclose(seen, clean, atol=1e-5)
  assert [layer.shape for layer in layers] == [(4, 4, 16)] * 2


def test_capabilities(variables):
  assert all(isinstance(SYSTEM, can) for can in (Guide, PictureGuide, Evaluated))
  assert SYSTEM.labels == () and SYSTEM.reads_text and SYSTEM.frozen_groups == ("clip",)
  (player,) = SYSTEM.players
  assert player.trains == SYSTEM.ema_groups == (ENCODER,)
  assert player.couples_examples == "exact" and set(SYSTEM.batch_spec()) == {"image"}


def test_text_guidance_is_the_cosine_of_picture_and_prompt(moved):
  (name, vectors), = SYSTEM.read(moved, {"text": {"ids": IDS, "mask": IDS > 0}}).items()
  assert name == TEXT
  np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
  x = pictures(0)
  seen, _ = SYSTEM._features(moved, x, TIMES)
  cosine = jnp.sum(seen * vectors, axis=1)
  found = LOG_PROB(moved, x, **{TEXT: vectors})
  np.testing.assert_allclose(found, SYSTEM.text_weight * cosine, rtol=1e-4, atol=1e-4)
  chosen = LOG_PROB(moved, x, **{TEXT: vectors, GIVEN_WEIGHTS: weights(text=2.0)})
  np.testing.assert_allclose(chosen, 2.0 * cosine, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(LOG_PROB(moved, x), 0.0)


def test_the_time_matters_once_trained(moved):
  vectors = SYSTEM.read(moved, {"text": {"ids": IDS}})[TEXT]
  early, late = (
    SYSTEM.log_prob(moved, pictures(0), jnp.full(4, t), Conditioning(extra={TEXT: vectors}))
    for t in (3, 40)
  )
  assert np.all(np.abs(early - late) > 1e-4)


def test_a_picture_is_most_like_its_own_noised_self(moved):
  reference = pictures(2)
  same = SYSTEM._noised(reference, TIMES)
  for kind in ("semantic", "style", "content"):
    run = lambda x, kind=kind: LOG_PROB(  # noqa: E731
      moved, x, **{IMAGE: reference, GIVEN_WEIGHTS: weights(**{kind: 1.0})}
    )
    best = 1.0 if kind == "semantic" else 0.0
    np.testing.assert_allclose(run(same), best, atol=1e-4)
    assert np.all(run(pictures(5)) < best - 1e-4), kind


def test_what_a_user_gives_is_what_guides(moved):
  image = np.asarray(batch_of(8, 1)["image"][0])
  text = {"text": {"ids": IDS[:1], "mask": IDS[:1] > 0}}
  # With no weight of it a picture is to be like in its meaning, as much as the text.
  for given, expected in (
    ({}, weights(text=100.0, semantic=100.0)),
    ({"text": 0.0}, weights(semantic=100.0)),
    ({"style": 3.0, "text": 2.0}, weights(text=2.0, style=3.0)),
    ({"content": 5.0}, weights(text=100.0, content=5.0)),
    ({"semantic": 0.0}, weights(text=100.0)),
  ):
    extra = SYSTEM.read(moved, text | SYSTEM.references(image, given))
    np.testing.assert_array_equal(extra[GIVEN_WEIGHTS], expected[:1])
    np.testing.assert_allclose(extra[IMAGE][0], image / 127.5 - 1, atol=1e-6)
  extra = SYSTEM.read(moved, text | SYSTEM.references(None, {"text": 7.0}))
  np.testing.assert_array_equal(extra[GIVEN_WEIGHTS], weights(text=7.0)[:1])
  assert set(extra) == {TEXT, GIVEN_WEIGHTS}


@pytest.mark.parametrize(
  "size, given, message",
  [
    (16, {}, "picture is 16x16x3, and it sees 8x8x3"),
    (8, {"stile": 1.0}, "kind of likeness 'stile'"),
    (8, {"style": np.inf}, "style=inf is no finite number"),
    (None, {"style": 1.0, "content": 2.0}, r"\(style, content\) have none to be like"),
  ],
)
def test_what_cannot_guide_is_refused(size, given, message):
  image = None if size is None else np.zeros((size, size, 3), np.uint8)
  with pytest.raises(UserError, match=message):
    SYSTEM.references(image, given)


def test_references_are_noised_as_the_process_says_and_always_alike():
  reference = jnp.zeros((300, 8, 8, 3))
  one = SYSTEM._noised(reference, jnp.full(300, 30))
  np.testing.assert_array_equal(one, SYSTEM._noised(reference, jnp.full(300, 30.0)))
  np.testing.assert_array_equal(one[0], one[1])
  np.testing.assert_allclose(jnp.std(one[0]), SYSTEM.process.sigma(jnp.int32(30)), rtol=0.15)
  other = SYSTEM._noised(reference, jnp.full(300, 31))
  assert np.abs(jnp.corrcoef(one[0].ravel(), other[0].ravel())[0, 1]) < 0.3


def test_gram_matrices_know_no_places():
  features = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 3)), jnp.float32)
  expected = np.einsum("btc,btd->bcd", features, features) / 18
  np.testing.assert_allclose(gram(features), expected, rtol=1e-5)
  np.testing.assert_allclose(gram(features[:, ::-1]), expected, rtol=1e-5)


def test_gradients_are_finite_and_of_each_picture(moved):
  vectors = SYSTEM.read(moved, {"text": {"ids": IDS}})[TEXT]
  extra = {TEXT: vectors, IMAGE: pictures(2), GIVEN_WEIGHTS: weights(1.0, 1.0, 1.0, 1.0)}
  total = lambda x: jnp.sum(log_prob(moved, x, **extra))  # noqa: E731
  gradient = jax.jit(jax.grad(total))(pictures(0))
  assert np.all(np.isfinite(gradient)) and np.all(np.abs(gradient).max(axis=(1, 2, 3)) > 1e-4)


def test_a_reference_has_no_gradient_where_it_is_reached(moved):
  @jax.jit
  def gradient(x, kind):
    given = {IMAGE: pictures(2), GIVEN_WEIGHTS: kind}
    return jax.grad(lambda x: jnp.sum(log_prob(moved, x, **given)))(x)

  for kind in ("semantic", "style", "content"):
    there = gradient(SYSTEM._noised(pictures(2), TIMES), weights(**{kind: 1.0}))
    elsewhere = gradient(pictures(5), weights(**{kind: 1.0}))
    assert np.abs(there).max() < 0.01 * np.abs(elsewhere).max(), kind


def test_the_loss_matches_noised_pictures_to_clean_ones(moved, frozen):
  batch = batch_of(8, 4)
  loss, aux = jax.jit(SYSTEM.loss)(moved, batch, KEY, STEP)
  found = jax.jit(SYSTEM.evaluation_loss)(moved, batch, KEY)
  np.testing.assert_allclose(loss, found["contrastive"].mean(), rtol=1e-5)
  quarters = [aux.metrics[f"cosine/time_{i}_of_4"] for i in (1, 2, 3, 4)]
  np.testing.assert_allclose(np.sort(quarters), np.sort(found["cosine"]), rtol=1e-4, atol=1e-6)
  assert matching(jnp.eye(4) * SYSTEM.scale).max() < 1e-6


def test_learns_to_see_through_noise(variables):
  batch = batch_of(8, 16)
  optimizer = optax.adam(1e-3)
  params = variables["params"]
  trained = {ENCODER: params[ENCODER]}
  state = optimizer.init(trained)

  @jax.jit
  def step(trained, state, i):
    rng = jax.random.fold_in(KEY, i)
    both = trees.with_params(variables, trained)
    gradients, aux = SYSTEM.players[0].gradients(both, batch, rng, i)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(trained, updates), state, aux.metrics

  losses = []
  for i in range(120):
    trained, state, metrics = step(trained, state, jnp.int32(i))
    losses.append(metrics["loss"])
  assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])


@pytest.mark.parametrize(
  "wrong, named",
  [
    ({"text": OWN_TEXT}, "set text.encoder=component"), ({"resolution": 0}, "model.resolution=0"),
    ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ({"text": dataclasses.replace(SYSTEM.text, components={"clip": SYSTEM})},
     "components.clip is a SemanticGuidance"),
  ],
)  # fmt: skip
def test_wrong_settings_are_named(wrong, named):
  with pytest.raises(UserError, match=named):
    dataclasses.replace(SYSTEM, **wrong)
