import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.data import open_source
from t2i_jax.errors import UserError
from t2i_jax.systems.capabilities import Evaluated, TextEncoder
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.text.clip import CLIP, LARGEST_SCALE, TOWERS, matching
from t2i_jax.text.tokenizer import train_tokenizer

TEXT = TextConditioner(length=16, vocab_size=300, width=16, layers=1, heads=2)
SYSTEM = CLIP(TEXT, 16, 4, 32, 1, 2, 8, "gelu")
KEY, STEP = jax.random.key(3), jnp.int32(0)


@pytest.fixture(scope="module")
def batch():
  source = open_source("scenes", "train", 16, 0)
  rows = source.fetch(np.arange(32), np.zeros(32, np.uint64))
  tokenizer = train_tokenizer(rows.captions, 300, 16)
  return {"image": rows.image, "text": {"text_encoder": tokenizer.encode(rows.captions)}}


@pytest.fixture(scope="module")
def variables(batch):
  return jax.jit(SYSTEM.init)(KEY, batch)


def test_matching_is_the_symmetric_cross_entropy():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4)), jnp.float32)
  rows = -np.diag(jax.nn.log_softmax(logits, axis=1))
  columns = -np.diag(jax.nn.log_softmax(logits, axis=0))
  np.testing.assert_allclose(matching(logits), (rows + columns) / 2, rtol=1e-5)
  np.testing.assert_allclose(matching(jnp.zeros((8, 8))), np.log(8), rtol=1e-6)
  assert matching(100 * jnp.eye(3)).max() < 1e-6


def test_embeddings_are_unit_vectors_and_the_loss_is_of_their_cosines(variables, batch):
  images = SYSTEM.embed_images(variables, normalize_images(batch["image"]))
  text = SYSTEM.embed_text(variables, batch["text"]["text_encoder"])
  for vectors in (images, text):
    assert vectors.shape == (32, 8) and vectors.dtype == jnp.float32
    np.testing.assert_allclose(jnp.linalg.norm(vectors, axis=1), 1.0, rtol=1e-5)
  loss, aux = SYSTEM.loss(variables, batch, KEY, STEP)
  # Radford et al. 2021, section 2.5: the temperature begins at 0.07.
  np.testing.assert_allclose(loss, matching(images @ text.T / 0.07).mean(), rtol=1e-3)
  np.testing.assert_allclose(aux.metrics["scale"], 1 / 0.07, rtol=1e-3)
  found = SYSTEM.evaluation_loss(variables, batch, KEY)
  assert found["contrastive"].shape == found["accuracy"].shape == (32,)


def test_the_scale_is_at_most_a_hundred(variables, batch):
  def with_scale(value):
    towers = {**variables["params"][TOWERS], "logit_scale": jnp.float32(value)}
    return SYSTEM.loss({"params": {TOWERS: towers}}, batch, KEY, STEP)[0]

  np.testing.assert_allclose(with_scale(9.0), with_scale(LARGEST_SCALE), rtol=1e-6)


def test_is_a_text_encoder_of_its_own_text(variables, batch):
  assert isinstance(SYSTEM, TextEncoder) and isinstance(SYSTEM, Evaluated)
  text = batch["text"]["text_encoder"]
  given = SYSTEM.encode(variables, text)
  assert given.sequence.shape == (32, 16, 16) and given.pooled.shape == (32, 8)
  unit = given.pooled / jnp.linalg.norm(given.pooled, axis=1, keepdims=True)
  np.testing.assert_allclose(unit, SYSTEM.embed_text(variables, text), atol=1e-6)
  assert SYSTEM.null_text()["ids"].shape == (16,)


def test_its_only_player_is_never_accumulated():
  (player,) = SYSTEM.players
  assert player.couples_examples == "exact"
  assert player.trains == SYSTEM.ema_groups == (TOWERS,)


def test_learns_which_caption_is_whose(variables, batch):
  optimizer, rows = optax.adam(1e-3), jax.tree.map(lambda x: x[:8], batch)

  @jax.jit
  def step(params, state):
    gradients, aux = SYSTEM.players[0].gradients({"params": params}, rows, KEY, STEP)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, aux.metrics

  params = variables["params"]
  state, losses = optimizer.init(params), []
  for _ in range(250):
    params, state, metrics = step(params, state)
    losses.append(metrics["loss"])
  assert losses[-1] < 0.4 * losses[0] and metrics["accuracy"] > 0.7


@pytest.mark.parametrize(
  "wrong, named",
  [
    ({"patch": 5}, "model.patch=5 does not divide"), ({"heads": 3}, "model.heads=3"),
    ({"activation": "swish"}, "unknown model.activation"),
    ({"text": dataclasses.replace(TEXT, encoder="lstm")}, "text.encoder is lstm"),
  ],
)
def test_wrong_settings_are_named(wrong, named):
  with pytest.raises(UserError, match=named):
    dataclasses.replace(SYSTEM, **wrong)


def test_the_published_size_has_its_parameters():
  # CLIP ViT-B/32.
  text = TextConditioner(length=77, vocab_size=49408, width=512, layers=12, heads=8)
  shapes = jax.eval_shape(CLIP(text).network.init, KEY, jnp.zeros((1, 224, 224, 3)),
                          jnp.zeros((1, 77), jnp.int32))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 151_277_313
