import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.capabilities import Evaluated, Sampler
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.gan.gan_cls import GANCLS, Options
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import picture_keys

SYSTEM = GANCLS(
  TextConditioner(encoder="lstm", length=6, vocab_size=32, width=8),
  16, noise_size=4, text_size=4, generator_channels=4, discriminator_channels=4,
)  # fmt: skip
KEY = jax.random.key(3)
STEP = jnp.int32(0)


def make_batch(rows, seed=0):
  random = np.random.default_rng(seed)
  ids = random.integers(3, 32, (rows, 6))
  mask = np.arange(6) < random.integers(2, 7, (rows, 1))
  image = random.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8)
  return {"image": image, "text": {"text_encoder": {"ids": np.where(mask, ids, 0), "mask": mask}}}


def with_captions(batch, rows):
  return {**batch, "text": jax.tree.map(lambda x: x[rows], batch["text"])}


def filled(shapes, seed=9):
  """Random variables of given shapes, none at its initial zero, which would hide
  what depends on what; drawing them so compiles nothing."""
  random = np.random.default_rng(seed)

  def draw(path, leaf):
    around = 1.0 if path[-1].key in ("scale", "var") else 0.0
    return jnp.asarray(around + 0.3 * random.uniform(-1, 1, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def variables():
  return filled(jax.eval_shape(SYSTEM.init, jax.random.key(0), make_batch(4)))


# One program each, for all tests of the system as it is.
GRADIENTS = {player.name: jax.jit(player.gradients) for player in SYSTEM.players}


def metrics_of(name, variables, batch):
  return GRADIENTS[name](variables, batch, KEY, STEP)[1].metrics


def moved(old, new):
  changed = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != np.asarray(b))), old, new)
  return all(jax.tree.leaves(changed))


def test_players_and_groups(variables):
  discriminator, generator = SYSTEM.players
  assert (discriminator.name, generator.name) == ("discriminator", "generator")
  assert sorted(discriminator.trains + generator.trains) == sorted(variables["params"])
  assert SYSTEM.ema_groups == ("text_encoder", "generator")
  assert isinstance(SYSTEM, Sampler) and isinstance(SYSTEM, Evaluated)


def test_each_player_has_gradients_and_statistics_of_its_own(variables):
  batch = make_batch(4)
  for player, own in zip(SYSTEM.players, ("discriminator", "generator"), strict=True):
    gradients, aux = GRADIENTS[player.name](variables, batch, KEY, STEP)
    assert set(gradients) == set(player.trains)
    assert all(optax.tree.norm(g) > 0 for g in gradients.values())
    assert set(aux.collections) == {"batch_stats"} and set(aux.collections["batch_stats"]) == {own}
    assert moved(variables["batch_stats"][own], aux.collections["batch_stats"][own])


def test_discriminator_loss_is_the_matching_aware_triplet(variables):
  metrics = metrics_of("discriminator", variables, make_batch(4))
  real, mismatch, fake = (metrics[k] for k in ("real", "mismatch", "fake"))
  np.testing.assert_allclose(metrics["loss"], real + 0.5 * (mismatch + fake), rtol=1e-6)


def test_mismatch_is_the_real_picture_with_another_caption(variables):
  batch = make_batch(2)
  sentence = SYSTEM._sentence(variables, batch)
  fake = jnp.zeros((2, 16, 16, 3))
  triplet = jax.jit(lambda s: SYSTEM._triplet(variables, batch, fake, s, KEY, train=False)[0])
  logits, swapped = triplet(sentence), triplet(sentence[::-1])
  np.testing.assert_allclose(logits["mismatch"], swapped["real"], rtol=1e-4)
  np.testing.assert_allclose(logits["real"], swapped["mismatch"], rtol=1e-4)
  assert np.abs(logits["mismatch"] - logits["real"]).min() > 1e-5


def test_equal_captions_are_no_mismatch(variables):
  batch = with_captions(make_batch(4), np.array([0, 0, 0, 0]))
  assert metrics_of("discriminator", variables, batch)["mismatch"] == 0
  half = with_captions(make_batch(4), np.array([0, 1, 0, 1]))
  kept = {tuple(np.asarray(SYSTEM._differs(half, jax.random.key(k)))) for k in range(8)}
  assert kept == {(True,) * 4, (False,) * 4}  # rolled by an odd number of rows, or by two


def test_masked_rows_do_not_weigh(variables):
  batch = with_captions(make_batch(4), np.array([0, 0, 0, 1]))
  differs = np.asarray(SYSTEM._differs(batch, KEY))
  assert 0 < differs.sum() < 4
  sentence = SYSTEM._sentence(variables, batch)
  fake = jnp.zeros((4, 16, 16, 3))
  logits, _ = jax.jit(lambda: SYSTEM._triplet(variables, batch, fake, sentence, KEY))()
  expected = np.log1p(np.exp(logits["mismatch"]))[differs].mean()
  mismatch = metrics_of("discriminator", variables, batch)["mismatch"]
  np.testing.assert_allclose(mismatch, expected, rtol=1e-4)
  held_out = jax.jit(SYSTEM.evaluation_loss)(variables, batch, KEY)["mismatch"]
  np.testing.assert_allclose(held_out.mean(), held_out[differs].mean(), rtol=1e-4)


def test_interpolation_trains_the_generator_between_captions(variables):
  batch = make_batch(4)
  metrics = metrics_of("generator", variables, batch)
  np.testing.assert_allclose(
    metrics["loss"], metrics["fake"] + metrics["interpolated"], rtol=1e-6
  )
  plain = dataclasses.replace(SYSTEM, interpolation=0.0)
  loss, _ = jax.jit(plain.generator_loss)(variables, batch, KEY, STEP)
  np.testing.assert_allclose(loss, metrics["fake"], rtol=1e-4)
  # All of the first caption is the caption itself.
  whole = dataclasses.replace(SYSTEM, mixing=1.0)
  _, aux = jax.jit(whole.generator_loss)(variables, batch, KEY, STEP)
  np.testing.assert_allclose(aux.metrics["interpolated"], aux.metrics["fake"], rtol=1e-4)


def test_label_smoothing_is_one_sided(variables):
  batch = make_batch(4)
  smooth = dataclasses.replace(SYSTEM, label_smoothing=0.1)
  plain = metrics_of("discriminator", variables, batch)
  smoothed = jax.jit(smooth.discriminator_loss)(variables, batch, KEY, STEP)[1].metrics
  assert abs(plain["real"] - smoothed["real"]) > 1e-3
  for name in ("fake", "mismatch"):
    np.testing.assert_allclose(plain[name], smoothed[name], rtol=1e-5)


def test_lazy_penalty_comes_at_its_steps_and_is_of_each_picture(variables):
  batch = make_batch(2)
  system = dataclasses.replace(SYSTEM, r1_weight=3.0, r1_every=4)
  loss = jax.jit(system.discriminator_loss)
  penalties = [float(loss(variables, batch, KEY, jnp.int32(s))[1].metrics["r1"]) for s in range(5)]
  assert penalties[1:4] == [0.0, 0.0, 0.0] and penalties[0] == penalties[4] > 0
  own = trees.group(variables, "discriminator")
  sentence, image = SYSTEM._sentence(variables, batch), normalize_images(batch["image"])

  def score(x, text):
    return SYSTEM.discriminator.apply(own, x[None], text[None], train=False)[0]

  squares = jnp.sum(jnp.square(jax.jit(jax.vmap(jax.grad(score)))(image, sentence)), axis=(1, 2, 3))
  np.testing.assert_allclose(penalties[0], 4 * 1.5 * squares.mean(), rtol=1e-4)


def test_simultaneous_play_has_the_losses_and_gradients_of_both(variables):
  batch = make_batch(4)
  system = dataclasses.replace(SYSTEM, play="simultaneous")
  assert system.simultaneous and not SYSTEM.simultaneous

  @jax.jit
  def joint(params):
    losses = lambda p: system.joint_losses(trees.with_params(variables, p), batch, KEY, STEP)  # noqa: E731
    losses, pull_back, aux = jax.vjp(losses, params, has_aux=True)
    one = {name: {k: jnp.float32(k == name) for k in losses} for name in losses}
    return losses, {name: pull_back(one[name])[0] for name in losses}, aux

  losses, jacobian, aux = joint(variables["params"])
  assert set(aux.collections["batch_stats"]) == {"discriminator", "generator"}
  for name in losses:
    gradients, own = GRADIENTS[name](variables, batch, KEY, STEP)
    np.testing.assert_allclose(losses[name], own.metrics.pop("loss"), rtol=1e-4)
    for metric, value in own.metrics.items():
      np.testing.assert_allclose(aux.metrics[f"{name}/{metric}"], value, rtol=1e-4)
    for group, expected in gradients.items():
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        jacobian[name][group], expected,
      )  # fmt: skip


def test_samples_depend_on_text_and_key_but_not_on_the_batch(variables):
  batch = make_batch(4)
  keys = picture_keys(0, jnp.arange(4))

  @jax.jit
  def sample(batch, keys, temperature=1.0):
    return SYSTEM.sample(
      variables, SYSTEM.condition(variables, batch), keys, Options(temperature=temperature)
    )

  images = sample(batch, keys)
  assert images.shape == (4, 16, 16, 3) and np.abs(images).max() <= 1
  first = jax.tree.map(lambda x: x[:1], batch)
  np.testing.assert_allclose(sample(first, keys[:1]), images[:1], atol=1e-5)
  assert np.abs(sample(first, keys[1:2]) - images[:1]).max() > 1e-3
  assert np.abs(sample(make_batch(4, seed=1), keys) - images).max() > 1e-3
  np.testing.assert_array_equal(sample(first, keys[:1], 0.0), sample(first, keys[1:2], 0.0))


EMBEDDED = {"text_encoder": {"pooled": np.eye(4, 5, dtype="f4")}}


def precomputed():
  null = {"text_encoder": {"pooled": np.zeros((1, 5), "f4")}}
  text = TextConditioner(encoder="component", cached_null=null)
  return dataclasses.replace(SYSTEM, text=text)


def test_precomputed_embeddings_take_the_place_of_the_encoder():
  system = precomputed()
  batch = {"image": make_batch(4)["image"], "text_embedding": EMBEDDED}
  variables = filled(jax.eval_shape(system.init, jax.random.key(0), batch))
  assert set(variables["params"]) == {"generator", "discriminator"}
  assert np.all(np.asarray(system._differs(batch, KEY)))
  assert set(system.batch_spec()) == {"image", "text_embedding/text_encoder/pooled"}


def test_the_generators_forward_pass_is_merged_between_the_players():
  """The step's promise, on a batch whose text no player trains."""
  system = dataclasses.replace(precomputed(), interpolation=0.0)
  batch = {"image": make_batch(4)["image"], "text_embedding": EMBEDDED}
  shapes = jax.eval_shape(system.init, jax.random.key(0), batch)
  discriminator, generator = system.players

  def first(variables):
    return discriminator.gradients(variables, batch, KEY, STEP)

  def second(variables):
    return generator.gradients(variables, batch, KEY, STEP)

  def both(variables):
    gradients, aux = first(variables)
    trained = jax.tree.map(
      lambda p, g: p - 0.1 * g, variables["params"]["discriminator"], gradients["discriminator"]
    )
    variables = trees.with_params(variables, {"discriminator": trained})
    return trained, second(trees.merge(variables, aux.collections))

  def flops(f):
    return jax.jit(f).lower(shapes).compile().cost_analysis()["flops"]

  forward = flops(lambda v: system._generate(v, jnp.eye(4, 5), KEY)[0])
  assert flops(both) < flops(first) + flops(second) - 0.8 * forward


@pytest.mark.parametrize(
  "wrong", [{"resolution": 48}, {"play": "simultanous"}, {"label_smoothing": 1.0}, {"r1_every": 0}]
)
def test_wrong_settings_are_named(wrong):
  (name,) = wrong
  with pytest.raises(UserError, match=f"model.{name}"):
    dataclasses.replace(SYSTEM, **wrong)
