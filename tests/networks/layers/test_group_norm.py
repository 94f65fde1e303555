"""Group normalisation against flax's."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.layers.group_norm import GroupNorm
from t2i_jax.parallel import flops


@pytest.fixture
def x():
  return 2.0 + 3.0 * jax.random.normal(jax.random.key(0), (4, 6, 5, 24))


@pytest.fixture
def variables():
  scale, bias = jax.random.normal(jax.random.key(1), (2, 24))
  return {"params": {"scale": scale, "bias": bias}}


@pytest.mark.parametrize("groups", [1, 8, 24])
def test_output_and_gradients_are_flaxs(groups, x, variables):
  def results(norm):
    y, pull = jax.vjp(norm.apply, variables, x)
    return y, pull(jax.random.normal(jax.random.key(2), x.shape))

  ours, theirs = results(GroupNorm(groups)), results(nn.GroupNorm(groups))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, theirs)


def test_variables_are_flaxs(x):
  shapes = [
    jax.eval_shape(norm.init, jax.random.key(0), x) for norm in (GroupNorm(8), nn.GroupNorm(8))
  ]
  assert shapes[0] == shapes[1]


def test_bfloat16_keeps_statistics_in_float32(variables):
  x = 100.0 + jax.random.normal(jax.random.key(0), (2, 64, 24))
  norm = GroupNorm(8, dtype=jnp.bfloat16)
  y, pull = jax.vjp(norm.apply, variables, x.astype(jnp.bfloat16))
  gradient, dx = pull(y)
  assert y.dtype == dx.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
  exact = GroupNorm(8).apply(variables, x.astype(jnp.bfloat16).astype(jnp.float32))
  np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03)


def test_it_is_left_out_of_the_count(x, variables):
  assert flops.count(GroupNorm(8).apply, variables, x) == 0


def test_groups_that_do_not_divide_the_channels(x):
  with pytest.raises(ValueError, match="7 groups do not divide 24 channels"):
    GroupNorm(7).init(jax.random.key(0), x)
