import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.data import labels, open_source
from t2i_jax.diffusion.timesteps import stratified
from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.base import Conditioning
from t2i_jax.systems.capabilities import Evaluated, Guide, Sampler
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.guides.noisy_classifier import NoisyClassifier
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name

SYSTEM = NoisyClassifier(
  TextConditioner(), 8, (("colour", 3), ("size", 2)), "cosine", 50, channels=8, multipliers=(1,),
  blocks=1, attention_levels=(), head_channels=8, groups=4, patch=2,
)  # fmt: skip
KEY, STEP = jax.random.key(3), jnp.int32(0)
LABELS = jnp.array([[0, 1], [2, 0], [1, 1], [2, 1]])


@pytest.fixture(scope="module")
def batch():
  random = np.random.default_rng(0)
  return {"image": random.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8), "label": LABELS}


@pytest.fixture(scope="module")
def variables(batch):
  """In general position."""
  random = np.random.default_rng(9)

  def draw(path, leaf):
    around = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(around + 0.3 * random.normal(size=leaf.shape), leaf.dtype)

  shapes = jax.eval_shape(SYSTEM.init, KEY, batch)
  return jax.tree_util.tree_map_with_path(draw, shapes)


def log_prob(variables, x, t, label):
  return SYSTEM.log_prob(variables, x, t, Conditioning(extra={"label": label}))


LOG_PROB = jax.jit(log_prob)
NOISED = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 3)), jnp.float32)
TIMES = jnp.array([0, 10, 30, 49])


def test_is_a_guide_with_a_held_out_loss_that_reads_labels():
  assert isinstance(SYSTEM, Guide) and isinstance(SYSTEM, Evaluated)
  assert not isinstance(SYSTEM, Sampler)
  assert SYSTEM.labels == SYSTEM.classes and set(SYSTEM.batch_spec()) == {"image", "label"}


def test_log_prob_is_the_sum_of_the_attributes(variables):
  logits = SYSTEM.network.apply(trees.group(variables, "classifier"), NOISED, TIMES)
  colour, size = jax.nn.log_softmax(logits[:, :3]), jax.nn.log_softmax(logits[:, 3:])
  rows = np.arange(4)
  expected = colour[rows, LABELS[:, 0]] + size[rows, LABELS[:, 1]]
  np.testing.assert_allclose(LOG_PROB(variables, NOISED, TIMES, LABELS), expected, rtol=1e-5)
  # Over all labels the probabilities add up to one.
  total = sum(
    jnp.exp(LOG_PROB(variables, NOISED, TIMES, jnp.full((4, 2), 0).at[:].set((c, s))))
    for c in range(3) for s in range(2)
  )  # fmt: skip
  np.testing.assert_allclose(total, 1.0, rtol=1e-5)


def test_what_is_unsaid_counts_nothing(variables):
  run = lambda label: LOG_PROB(variables, NOISED, TIMES, label)  # noqa: E731
  colour, size = run(LABELS.at[:, 1].set(-1)), run(LABELS.at[:, 0].set(-1))
  np.testing.assert_allclose(colour + size, run(LABELS), rtol=1e-5)
  np.testing.assert_array_equal(run(jnp.full((4, 2), -1)), 0.0)


def test_each_picture_has_its_own_finite_gradient(variables):
  def total(x, label):
    return jnp.sum(log_prob(variables, x, TIMES, label))

  gradient = jax.jit(jax.grad(total))
  full = gradient(NOISED, LABELS)
  assert np.all(np.isfinite(full)) and np.all(np.abs(full).max(axis=(1, 2, 3)) > 1e-5)
  first = gradient(NOISED, LABELS.at[1:].set(-1))
  np.testing.assert_allclose(first[0], full[0], atol=1e-6)
  np.testing.assert_array_equal(first[1:], 0.0)


def test_the_loss_is_of_noised_pictures_at_the_process_s_times(variables, batch):
  u = stratified(fold_name(KEY, "time"), 4)
  t = SYSTEM.process.time(u)
  noise = jax.random.normal(fold_name(KEY, "noise"), (4, 8, 8, 3))
  x_t = SYSTEM.process.corrupt(normalize_images(batch["image"]), noise, t)
  loss, aux = jax.jit(SYSTEM.loss)(variables, batch, KEY, STEP)
  expected = -log_prob(variables, x_t, t, batch["label"])
  np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)
  found = jax.jit(SYSTEM.evaluation_loss)(variables, batch, KEY)
  np.testing.assert_allclose(found["cross_entropy"], expected, rtol=1e-5)
  np.testing.assert_array_equal(
    found["accuracy/all"], found["accuracy/colour"] * found["accuracy/size"]
  )
  # One row in each quarter of the time.
  quarters = [aux.metrics[f"accuracy/time_{i}_of_4"] for i in (1, 2, 3, 4)]
  np.testing.assert_array_equal(quarters, found["accuracy/all"][np.argsort(u)])


@pytest.mark.slow
def test_learns_what_is_left_of_noised_scenes():
  system = NoisyClassifier(
    TextConditioner(), 16, tuple(labels("scenes").items()), "cosine", 50, channels=16,
    multipliers=(1, 2), blocks=1, attention_levels=(1,), head_channels=16, groups=8, patch=2,
  )  # fmt: skip
  source = open_source("scenes", "train", 16, 0, {"labels": True})
  rows = source.fetch(np.arange(64), np.zeros(64, np.uint64))
  batch = {"image": rows.image, "label": rows.extra["label"]}
  optimizer = optax.adam(3e-3)
  params = jax.jit(system.init)(KEY, batch)["params"]
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, i):
    rng = jax.random.fold_in(KEY, i)
    gradients, aux = system.players[0].gradients({"params": params}, batch, rng, i)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, aux.metrics

  seen = []
  for i in range(80):
    params, state, metrics = step(params, state, jnp.int32(i))
    seen.append(metrics)
  mean = lambda name, part: np.mean([m[name] for m in seen[part]])  # noqa: E731
  last = slice(-10, None)
  assert mean("cross_entropy", last) < 0.7 * seen[0]["cross_entropy"]
  assert mean("accuracy/place", last) > 0.4
  assert mean("accuracy/time_1_of_4", last) > mean("accuracy/time_4_of_4", last)


@pytest.mark.parametrize(
  "wrong, named",
  [
    ({"classes": ()}, "model.classes names none"), ({"resolution": 9}, "model.resolution=9"),
    ({"groups": 3}, "model.groups=3"), ({"pool": "max"}, "unknown model.pool"),
    ({"schedule": "cosin"}, "did you mean 'cosine'"),
  ],
)  # fmt: skip
def test_wrong_settings_are_named(wrong, named):
  with pytest.raises(UserError, match=named):
    dataclasses.replace(SYSTEM, **wrong)
