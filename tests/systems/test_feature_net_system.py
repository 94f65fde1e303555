import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.data import labels, open_source
from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.capabilities import Evaluated, FirstStage, Perceptual, Sampler
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.perceptual.feature_net import FeatureNet
from t2i_jax.systems.pictures import normalize_images

SYSTEM = FeatureNet(
  TextConditioner(), 16, (("colour", 9), ("size", 2)), channels=(4, 8), groups=2, width=6
)
KEY, STEP = jax.random.key(3), jnp.int32(0)


def make_batch(rows, seed=0):
  random = np.random.default_rng(seed)
  label = random.integers(0, (9, 2), (rows, 2)).astype(np.int32)
  return {"image": random.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8), "label": label}


@pytest.fixture(scope="module")
def variables():
  shapes = jax.eval_shape(SYSTEM.init, jax.random.key(0), make_batch(2))
  random = np.random.default_rng(9)

  def draw(path, leaf):
    around = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(around + 0.3 * random.uniform(-1, 1, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def images(seed):
  return jax.random.uniform(jax.random.key(seed), (3, 16, 16, 3), minval=-1, maxval=1)


def test_is_a_perceptual_network_with_a_held_out_loss():
  assert isinstance(SYSTEM, Perceptual) and isinstance(SYSTEM, Evaluated)
  assert not isinstance(SYSTEM, Sampler) and not isinstance(SYSTEM, FirstStage)
  assert SYSTEM.name == "feature_net"


def test_loss_is_the_sum_of_cross_entropies(variables):
  batch = make_batch(4)
  own = trees.group(variables, "network")
  logits = SYSTEM.network.apply(own, normalize_images(batch["image"])).logits
  costs = [
    -np.asarray(jax.nn.log_softmax(row))[np.arange(4), batch["label"][:, i]]
    for i, row in enumerate(logits)
  ]
  loss, aux = jax.jit(SYSTEM.loss)(variables, batch, KEY, STEP)
  np.testing.assert_allclose(loss, sum(costs).mean(), rtol=1e-5)
  right = [np.argmax(row, axis=1) == batch["label"][:, i] for i, row in enumerate(logits)]
  found = jax.jit(SYSTEM.evaluation_loss)(variables, batch, KEY)
  np.testing.assert_array_equal(found["accuracy/colour"], right[0])
  np.testing.assert_array_equal(found["accuracy/all"], right[0] & right[1])
  np.testing.assert_allclose(found["cross_entropy"], sum(costs), rtol=1e-5)
  np.testing.assert_allclose(aux.metrics["accuracy/size"], right[1].mean(), rtol=1e-6)


def test_distance_is_zero_for_equal_pictures_and_of_each_by_itself(variables):
  distance = jax.jit(lambda a, b: SYSTEM.distance(variables, a, b))
  a, b = images(0), images(1)
  np.testing.assert_allclose(distance(a, a), 0.0, atol=1e-6)
  both = distance(a, b)
  assert both.shape == (3,) and np.all(both > 1e-3)
  np.testing.assert_allclose(distance(b, a), both, rtol=1e-5)
  np.testing.assert_allclose(distance(a, b.at[1:].set(a[1:])), [both[0], 0, 0], atol=1e-6)
  closer = distance(a, a + 0.1 * (b - a))
  assert np.all(closer < both)
  assert SYSTEM.features(variables, a).shape == (3, 6)


def test_distance_has_finite_gradients_everywhere(variables):
  flat = jnp.full((1, 16, 16, 3), -1.0)
  for a, b in ((flat, flat), (images(0)[:1], flat), (flat, images(0)[:1])):
    gradient = jax.jit(jax.grad(lambda b, a=a: SYSTEM.distance(variables, a, b)[0]))(b)
    assert np.isfinite(gradient).all()


def test_learns_colours():
  # fmt: off
  system = FeatureNet(
    TextConditioner(), 16, tuple(labels("scenes").items()), channels=(8, 8), groups=4, width=32
  )
  # fmt: on
  source = open_source("scenes", "train", 16, 0, {"labels": True})
  rows = source.fetch(np.arange(64), np.zeros(64, np.uint64))
  batch = {"image": rows.image, "label": rows.extra["label"]}
  optimizer = optax.adam(1e-2)
  variables = jax.jit(system.init)(KEY, batch)
  state = optimizer.init(variables["params"])

  @jax.jit
  def step(params, state):
    gradients, aux = system.players[0].gradients({"params": params}, batch, KEY, STEP)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state, aux.metrics

  params = variables["params"]
  for _ in range(60):
    params, state, metrics = step(params, state)
  assert metrics["accuracy/colour"] > 0.9 and metrics["accuracy/place"] > 0.9


@pytest.mark.parametrize(
  "wrong, named",
  [
    ({"classes": ()}, "model.classes names none"), ({"resolution": 12}, "model.resolution=12"),
    ({"groups": 3}, "model.groups=3"), ({"channels": ()}, "model.channels"),
  ],
)
def test_wrong_settings_are_named(wrong, named):
  with pytest.raises(UserError, match=named):
    dataclasses.replace(SYSTEM, **wrong)


def test_pictures_of_a_side_that_does_not_divide_are_refused(variables):
  with pytest.raises(UserError, match="a side of 20 pixels does not divide by 8"):
    SYSTEM.features(variables, jnp.zeros((1, 16, 20, 3)))
