import jax
import numpy as np
import pytest

from t2i_jax.diffusion.timesteps import DENSITIES, make_density
from t2i_jax.errors import UserError

BATCHES, ROWS = 2000, 8
# Shares of a density up to a time, where that is not the time itself.
CUMULATIVE = {
  "logit_normal": lambda u: jax.scipy.stats.norm.cdf(jax.scipy.special.logit(u)),
}


@pytest.fixture(scope="module", params=sorted(DENSITIES))
def drawn(request):
  """The density's name, and for as many keys the shares of it up to its times [BATCHES, ROWS]."""
  density = make_density(request.param)
  keys = jax.random.split(jax.random.key(0), BATCHES)
  u = jax.jit(jax.vmap(lambda key: density(key, ROWS)))(keys)
  assert u.shape == (BATCHES, ROWS) and u.dtype == np.float32
  assert u.min() >= 0 and u.max() < 1
  return request.param, np.asarray(CUMULATIVE.get(request.param, lambda u: u)(u))


def test_all_times_are_as_frequent_as_they_should_be(drawn):
  _, u = drawn
  np.testing.assert_allclose(np.histogram(u, 20, (0, 1))[0] / u.size, 1 / 20, rtol=0.2)


def test_every_row_has_all_times(drawn):
  _, u = drawn
  # Standard error of a row's mean: 1 / sqrt(12 * 2000) = 0.0065.
  np.testing.assert_allclose(u.mean(axis=0), 0.5, atol=0.03)
  np.testing.assert_allclose(u.std(axis=0), 1 / np.sqrt(12), rtol=0.05)


def test_all_but_uniform_have_one_time_in_each_stratum(drawn):
  name, u = drawn
  ordered = np.sort(u, axis=1)
  # Neighbours, around the circle, are an eighth apart.
  gaps = np.diff(np.concatenate([ordered, ordered[:, :1] + 1], axis=1))
  even = np.all(np.abs(gaps - 1 / ROWS) <= (1e-6 if name == "stratified" else 1e-4), axis=1)
  assert even.mean() < 0.01 if name == "uniform" else even.all()


def test_uniform_rows_are_independent(drawn):
  name, u = drawn
  correlation = np.corrcoef(u[:, 0], u[:, 1])[0, 1]
  # Rows of a stratified batch avoid one another.
  assert abs(correlation) < 0.1 if name == "uniform" else correlation < -0.1


@pytest.mark.parametrize("spread", [0.5, 1.5])
def test_spread_is_the_normals_standard_deviation(spread):
  u = jax.vmap(lambda key: make_density("logit_normal", spread)(key, ROWS))(
    jax.random.split(jax.random.key(0), BATCHES)
  )
  share = jax.scipy.stats.norm.cdf(jax.scipy.special.logit(u) / spread)
  np.testing.assert_allclose(np.histogram(share, 20, (0, 1))[0] / u.size, 1 / 20, rtol=0.2)


def test_bad_input_is_one_line():
  with pytest.raises(UserError, match="did you mean 'stratified'"):
    make_density("stratify")
  with pytest.raises(UserError, match="density_spread=0 is not positive"):
    make_density("logit_normal", 0)
