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
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import picture_keys
from t2i_jax.systems.vae.conditional_vae import ConditionalVAE, Options

TEXT = TextConditioner(length=6, vocab_size=32, width=8, layers=1, heads=2)
SYSTEM = ConditionalVAE(
  TEXT, 8, latent_size=4, prior_width=8, channels=4, multipliers=(1, 2), attention_levels=(1,),
  head_channels=8, groups=2, coordinates=1,
)  # fmt: skip
DIMENSIONS = 8 * 8 * 3
KEY = jax.random.key(3)
STEP = jnp.int32(0)


def make_batch(rows, seed=0):
  random = np.random.default_rng(seed)
  ids = random.integers(3, 32, (rows, 6))
  mask = np.arange(6) < random.integers(2, 7, (rows, 1))
  image = random.integers(0, 256, (rows, 8, 8, 3), dtype=np.uint8)
  return {"image": image, "text": {"text_encoder": {"ids": np.where(mask, ids, 0), "mask": mask}}}


def with_text_of(batch, other):
  return {**batch, "text": other["text"]}


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


@jax.jit
def sample(variables, batch, keys, temperature=1.0):
  given = SYSTEM.condition(variables, batch)
  return SYSTEM.sample(variables, given, keys, Options(temperature=temperature))


@jax.jit
def gradients_of(variables, batch):
  return SYSTEM.players[0].gradients(variables, batch, KEY, STEP)


def test_is_a_sampler_with_a_held_out_loss(variables):
  assert isinstance(SYSTEM, Sampler) and isinstance(SYSTEM, Evaluated)
  (player,) = SYSTEM.players
  assert sorted(player.trains) == sorted(variables["params"])


def test_loss_is_the_bound_in_bits_per_dimension(variables):
  batch = make_batch(4)
  _, aux = gradients_of(variables, batch)
  held_out = jax.jit(SYSTEM.evaluation_loss)(variables, batch, KEY)
  assert all(v.shape == (4,) for v in held_out.values())
  np.testing.assert_allclose(aux.metrics["loss"], held_out["bits_per_dim"].mean(), rtol=1e-5)
  np.testing.assert_allclose(aux.metrics["kl"], held_out["kl"].mean(), rtol=1e-5)
  bits = held_out["kl"] / (DIMENSIONS * np.log(2))
  np.testing.assert_allclose(held_out["bits_per_dim"], held_out["reconstruction"] + bits, rtol=1e-5)


def test_beta_warms_up_and_weighs_the_divergence(variables):
  batch = make_batch(4)
  system = dataclasses.replace(SYSTEM, beta=2.0, beta_warmup=10)
  loss = jax.jit(system.loss)
  for step, beta in ((0, 0.0), (5, 1.0), (10, 2.0), (99, 2.0)):
    value, aux = loss(variables, batch, KEY, jnp.int32(step))
    bits = aux.metrics["kl"] / (DIMENSIONS * np.log(2))
    np.testing.assert_allclose(aux.metrics["beta"], beta)
    np.testing.assert_allclose(value, aux.metrics["reconstruction"] + beta * bits, rtol=1e-5)


def test_free_bits_are_a_floor_below_which_nothing_pulls(variables):
  batch = make_batch(4)
  free = dataclasses.replace(SYSTEM, free_bits=50.0)
  (player,) = free.players
  assert player.couples_examples == "approximate" and SYSTEM.players[0].couples_examples == "no"
  gradients, aux = jax.jit(player.gradients)(variables, batch, KEY, STEP)
  floor = SYSTEM.latent_size * 50.0 / (DIMENSIONS * np.log(2))
  np.testing.assert_allclose(aux.metrics["loss"], aux.metrics["reconstruction"] + floor, rtol=1e-5)
  assert optax.tree.norm(gradients["prior"]) == 0
  assert optax.tree.norm(gradients_of(variables, batch)[0]["prior"]) > 0


def test_gradients_reach_every_group(variables):
  gradients, _ = gradients_of(variables, make_batch(4))
  assert set(gradients) == {"text_encoder", "encoder", "prior", "decoder"}
  assert all(optax.tree.norm(g) > 0 for g in gradients.values())


def test_text_conditions_prior_posterior_and_decoder(variables):
  batch, other = make_batch(2), with_text_of(make_batch(2), make_batch(2, seed=1))

  @jax.jit
  def parts(batch):
    given = SYSTEM.condition(variables, batch)
    posterior = SYSTEM.encoder.apply(
      trees.group(variables, "encoder"), normalize_images(batch["image"]), given.pooled
    )
    decoded, _ = SYSTEM._decode(variables, jnp.ones((2, 4)), given)
    return SYSTEM._prior(variables, given).mean, posterior[0], decoded

  for one, another in zip(parts(batch), parts(other), strict=True):
    assert np.abs(one - another).max() > 1e-3


def test_samples_depend_on_text_and_key_but_not_on_the_batch(variables):
  batch = make_batch(4)
  keys = picture_keys(0, jnp.arange(4))
  images = sample(variables, batch, keys)
  assert images.shape == (4, 8, 8, 3) and np.abs(images).max() <= 1
  first = jax.tree.map(lambda x: x[:1], batch)
  np.testing.assert_allclose(sample(variables, first, keys[:1]), images[:1], atol=1e-5)
  assert np.abs(sample(variables, first, keys[1:2]) - images[:1]).max() > 1e-3
  assert np.abs(sample(variables, make_batch(4, seed=1), keys) - images).max() > 1e-3
  cold = [sample(variables, first, keys[i : i + 1], 0.0) for i in (0, 1)]
  np.testing.assert_array_equal(*cold)


@pytest.mark.parametrize("likelihood", ["gaussian", "discretized_logistic"])
def test_bound_improves(likelihood, variables):
  batch = make_batch(4)
  batch["image"][:] = 200
  system = dataclasses.replace(SYSTEM, likelihood=likelihood)
  same = likelihood == SYSTEM.likelihood
  gradients_at = gradients_of if same else jax.jit(
    lambda variables, batch: system.players[0].gradients(variables, batch, KEY, STEP)
  )
  optimizer = optax.adam(1e-2)
  update = jax.jit(optimizer.update)
  params, state, bits = variables["params"], optimizer.init(variables["params"]), []
  for _ in range(15):
    gradients, aux = gradients_at({"params": params}, batch)
    updates, state = update(gradients, state)
    params = jax.tree.map(lambda p, u: np.asarray(p) + np.asarray(u), params, updates)
    bits.append(float(aux.metrics["bits_per_dim"]))
  assert bits[-1] < bits[0] - 0.5


@pytest.mark.parametrize(
  "wrong",
  [
    {"likelihood": "gausian"}, {"resolution": 10}, {"groups": 3}, {"beta": -1.0},
    {"attention_levels": (7,)}, {"head_channels": 3},
  ],
)
def test_wrong_settings_are_named(wrong):
  (name,) = wrong
  with pytest.raises(UserError, match=f"model.{name}"):
    dataclasses.replace(SYSTEM, **wrong)
