import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion.timesteps import DENSITIES, make_density, shifted
from t2i_jax.errors import UserError

BATCHES, ROWS, STEPS = 2000, 8, 40


@pytest.fixture(scope="module", params=sorted(DENSITIES))
def drawn(request):
  """The density's name, and its times [BATCHES, ROWS] for as many keys."""
  density = make_density(request.param)
  keys = jax.random.split(jax.random.key(0), BATCHES)
  return request.param, np.asarray(jax.jit(jax.vmap(lambda key: density(key, ROWS, STEPS)))(keys))


def test_every_time_is_as_frequent_and_none_is_beyond(drawn):
  _, t = drawn
  assert t.dtype == np.int32 and t.min() == 0 and t.max() == STEPS - 1
  np.testing.assert_allclose(np.bincount(t.ravel()) / t.size, 1 / STEPS, rtol=0.25)


def test_every_row_has_all_times(drawn):
  _, t = drawn
  # Standard error of a row's mean: 40 / sqrt(12 * 2000) = 0.26.
  np.testing.assert_allclose(t.mean(axis=0), (STEPS - 1) / 2, atol=1.2)
  np.testing.assert_allclose(t.std(axis=0), STEPS / np.sqrt(12), rtol=0.05)


def test_stratified_has_one_time_in_each_stratum_and_uniform_has_not(drawn):
  name, t = drawn
  ordered = np.sort(t, axis=1)
  # Neighbours, around the circle, are an eighth of the process apart.
  gaps = np.diff(np.concatenate([ordered, ordered[:, :1] + STEPS], axis=1))
  even = np.all(np.abs(gaps - STEPS // ROWS) <= 1, axis=1)
  assert even.all() if name == "stratified" else even.mean() < 0.01


def test_uniform_rows_are_independent(drawn):
  name, t = drawn
  correlation = np.corrcoef(t[:, 0], t[:, 1])[0, 1]
  # Rows of a stratified batch avoid one another.
  assert abs(correlation) < 0.1 if name == "uniform" else correlation < -0.1


def test_the_largest_draw_stays_below_every_number_of_steps():
  last = np.nextafter(np.float32(1), np.float32(0))
  steps = np.arange(2, 100_000)
  np.testing.assert_array_equal((last * steps.astype(np.float32)).astype(np.int32), steps - 1)


def test_a_shift_moves_times_as_the_formula_says_and_one_moves_none():
  t = np.arange(1000)
  np.testing.assert_array_equal(shifted(jnp.asarray(t), 1.0, 1000), t)
  moved = np.asarray(shifted(jnp.asarray(t), 3.0, 1000))
  assert moved.min() >= 0 and moved.max() == 999 and np.all(np.diff(moved) >= 0)
  assert moved[500] == 750  # 3 / 2 / (1 + 2 / 2) = 3 / 4
  np.testing.assert_allclose(shifted(jnp.asarray(moved), 1 / 3, 1000), t, atol=3)


def test_an_unknown_name_is_one_line():
  with pytest.raises(UserError, match="did you mean 'stratified'"):
    make_density("stratify")
