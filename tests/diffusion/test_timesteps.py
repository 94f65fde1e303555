import jax
import numpy as np
import pytest

from t2i_jax.diffusion.timesteps import DENSITIES, make_density, stratified, uniform
from t2i_jax.errors import UserError


@pytest.mark.parametrize("name", sorted(DENSITIES))
def test_every_time_is_reached_and_none_beyond(name):
  draw = jax.vmap(lambda key: make_density(name)(key, 16, 10))
  t = np.asarray(draw(jax.random.split(jax.random.key(0), 200)))
  assert t.shape == (200, 16) and t.dtype == np.int32
  assert set(t.ravel()) == set(range(10))
  counts = np.bincount(t.ravel(), minlength=10) / t.size
  np.testing.assert_allclose(counts, 0.1, atol=0.03)


def test_stratified_has_one_time_in_each_stratum():
  t = jax.vmap(lambda key: stratified(key, 8, 1000))(jax.random.split(jax.random.key(1), 50))
  # Neighbours, around the circle, are an eighth of the process apart.
  gaps = np.diff(np.sort(t, axis=1), axis=1)
  assert gaps.min() >= 124 and gaps.max() <= 126
  around = t.min(axis=1) + 1000 - t.max(axis=1)
  assert around.min() >= 124 and around.max() <= 126


def test_stratified_is_uniform_for_each_row():
  keys = jax.random.split(jax.random.key(2), 2000)
  t = np.asarray(jax.vmap(lambda key: stratified(key, 4, 1000))(keys))
  # Standard error of a row's mean: 1000 / sqrt(12 * 2000) = 6.5.
  np.testing.assert_allclose(t.mean(axis=0), 499.5, atol=30)
  np.testing.assert_allclose(t.std(axis=0), 1000 / np.sqrt(12), rtol=0.05)


def test_uniform_rows_are_independent():
  keys = jax.random.split(jax.random.key(3), 2000)
  t = jax.vmap(lambda key: uniform(key, 2, 1000))(keys)
  assert abs(np.corrcoef(np.asarray(t, np.float64).T)[0, 1]) < 0.1


def test_the_largest_draw_stays_below_every_number_of_steps():
  last = np.nextafter(np.float32(1), np.float32(0))
  steps = np.arange(2, 100_000)
  np.testing.assert_array_equal((last * steps.astype(np.float32)).astype(np.int32), steps - 1)


def test_an_unknown_name_is_one_line():
  with pytest.raises(UserError, match="did you mean 'stratified'"):
    make_density("stratify")
