"""Muon's direction against optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.training.muon import orthogonalized, scale_by_muon


def matrix(rows, columns, decades):
  """A matrix whose singular values fall from one over so many decades."""
  random, rank = np.random.default_rng(0), min(rows, columns)
  u, v = (np.linalg.qr(random.normal(size=(side, rank)))[0] for side in (rows, columns))
  return jnp.asarray(u * 10.0 ** (-decades * np.arange(rank) / rank) @ v.T, jnp.float32)


def of_optax(**options):
  numbers = lambda tree: jax.tree.map(  # noqa: E731
    lambda _: optax.contrib.MuonDimensionNumbers(), tree
  )
  return optax.contrib.scale_by_muon(weight_dimension_numbers=numbers, **options)


@pytest.mark.parametrize("shape", [(96, 16), (16, 96), (24, 24), (1, 8), (8, 1)])
@pytest.mark.parametrize("decades", [0, 3, 6])
def test_orthogonalized_is_newton_schulz(shape, decades):
  x = matrix(*shape, decades)
  plain = of_optax(beta=0.0, nesterov=False)
  expected, _ = plain.update({"x": x}, plain.init({"x": x}))
  ours = jax.jit(orthogonalized)(x)
  assert np.linalg.norm(ours - expected["x"]) < 2e-3 * np.linalg.norm(expected["x"])


def test_the_scale_of_a_gradient_does_not_matter_and_zero_stays_zero():
  x = matrix(12, 6, 1)
  np.testing.assert_allclose(orthogonalized(x), orthogonalized(1e-5 * x), rtol=2e-2, atol=1e-3)
  np.testing.assert_array_equal(orthogonalized(jnp.zeros((4, 3))), 0.0)


def test_momentum_is_optaxs():
  ours, theirs = scale_by_muon(0.9), of_optax(beta=0.9)
  zero = {"x": jnp.zeros((8, 6))}
  states = [ours.init(zero), theirs.init(zero)]
  for step in range(4):
    gradient = {"x": jax.random.normal(jax.random.key(step), (8, 6))}
    one, states[0] = ours.update(gradient, states[0])
    other, states[1] = theirs.update(gradient, states[1])
    np.testing.assert_allclose(one["x"], other["x"], rtol=1e-3, atol=1e-3)
