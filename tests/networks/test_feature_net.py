import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.feature_net import FeatureNet

NETWORK = FeatureNet((3, 2), channels=(4, 8), groups=2, grid=2, width=6)


def filled(shapes, seed=9):
  random = np.random.default_rng(seed)

  def draw(path, leaf):
    around = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(around + 0.3 * random.uniform(-1, 1, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def variables():
  return filled(jax.eval_shape(NETWORK.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3))))


@pytest.mark.parametrize("side", [4, 8, 16])
def test_the_same_parameters_take_every_side_that_divides(variables, side):
  found = NETWORK.apply(variables, jax.random.normal(jax.random.key(1), (2, side, side, 3)))
  assert [level.shape for level in found.levels] == [
    (2, side, side, 4), (2, side // 2, side // 2, 8)
  ]
  assert found.vector.shape == (2, 6) and [x.shape for x in found.logits] == [(2, 3), (2, 2)]
  assert all(np.min(level) >= 0 for level in found.levels)


def test_the_vector_knows_where_things_are(variables):
  image = jnp.zeros((1, 16, 16, 3)).at[:, :8, :8].set(1.0)
  moved = jnp.roll(image, 8, axis=2)
  one, other = (NETWORK.apply(variables, x).vector for x in (image, moved))
  assert np.abs(one - other).max() > 1e-2


def test_bfloat16_keeps_parameters_and_logits_in_float32(variables):
  network = NETWORK.clone(dtype=jnp.bfloat16)
  shapes, found = jax.eval_shape(
    lambda: (network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3))),
             network.apply(variables, jnp.zeros((1, 8, 8, 3))))
  )  # fmt: skip
  kept = jax.tree.leaves((shapes, found.vector, found.logits))
  assert {x.dtype for x in kept} == {jnp.dtype("float32")}
  assert {x.dtype for x in found.levels} == {jnp.dtype("bfloat16")}
