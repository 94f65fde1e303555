import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import logit
from jax.scipy.stats import norm

from t2i_jax.diffusion.schedules import make_process
from t2i_jax.diffusion.timesteps import (
  DENSITIES,
  draw_importance,
  importance_probabilities,
  make_density,
  new_importance,
  update_importance,
)
from t2i_jax.errors import UserError

BATCHES, ROWS = 2000, 8
EDM = make_process("edm")


def mode_share(u, scale):
  """Share of the mode density up to times, by inverting its map on a fine grid."""
  grid = np.linspace(0, 1, 200_001)
  times = 1 - grid - scale * (np.cos(np.pi * grid / 2) ** 2 - 1 + grid)
  return np.interp(u, times[::-1], 1 - grid[::-1])


# Shares of a density up to a time, where that is not the time itself.
CUMULATIVE = {
  "logit_normal": lambda u: norm.cdf(logit(u)),
  "mode": lambda u: mode_share(u, 1.29),
  "log_normal": lambda u: norm.cdf((jnp.log(EDM.time(u)) + 1.2) / 1.2),
}


@pytest.fixture(scope="module", params=sorted(DENSITIES))
def drawn(request):
  """The density's name, and for as many keys the shares of it up to its times [BATCHES, ROWS]."""
  density = make_density(request.param, process=EDM)
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
  even = np.all(np.abs(gaps - 1 / ROWS) <= (1e-6 if name == "stratified" else 1e-3), axis=1)
  assert even.mean() < 0.01 if name == "uniform" else even.all()


def test_uniform_rows_are_independent(drawn):
  name, u = drawn
  correlation = np.corrcoef(u[:, 0], u[:, 1])[0, 1]
  # Rows of a stratified batch avoid one another.
  assert abs(correlation) < 0.1 if name == "uniform" else correlation < -0.1


def shares(name, cumulative, **options):
  """Histogram of the shares of a density's draws, which should be even."""
  density = make_density(name, **options)
  u = jax.vmap(lambda key: density(key, ROWS))(jax.random.split(jax.random.key(0), BATCHES))
  return np.histogram(cumulative(u), 20, (0, 1))[0] / u.size


@pytest.mark.parametrize("mean, spread", [(0.0, 0.5), (0.5, 1.5), (-1.0, 1.0)])
def test_mean_and_spread_are_the_normals(mean, spread):
  even = shares(
    "logit_normal", lambda u: norm.cdf((logit(u) - mean) / spread), mean=mean, spread=spread
  )
  np.testing.assert_allclose(even, 1 / 20, rtol=0.2)
  even = shares(
    "log_normal", lambda u: norm.cdf((jnp.log(EDM.time(u)) - mean) / spread), mean=mean,
    spread=spread, process=EDM,
  )
  np.testing.assert_allclose(even, 1 / 20, rtol=0.2)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.75])
def test_mode_densities_reach_every_time(scale):
  even = shares("mode", lambda u: mode_share(u, scale), scale=scale)
  np.testing.assert_allclose(even, 1 / 20, rtol=0.2)


def test_mode_of_scale_zero_is_uniform():
  np.testing.assert_allclose(shares("mode", lambda u: u, scale=0.0), 1 / 20, rtol=0.2)


def test_importance_is_uniform_until_every_time_has_been_seen():
  state = new_importance(4, size=2)
  for t in ([0, 1, 2, 3], [0, 1, 2, 2]):
    state = update_importance(state, jnp.array(t), jnp.array([1.0, 5.0, 2.0, 9.0]))
    np.testing.assert_allclose(importance_probabilities(state), 0.25)
  state = update_importance(state, jnp.array([3]), jnp.array([4.0]))
  assert np.ptp(importance_probabilities(state)) > 0.1
  # The last two losses of each, oldest first; the third of time 2 put its first out.
  np.testing.assert_array_equal(state.losses, [[1, 1], [5, 5], [2, 9], [9, 4]])


def test_importance_draws_with_the_root_of_the_second_moment_and_undoes_it():
  random = np.random.default_rng(0)
  scales = np.array([0.1, 1.0, 3.0, 0.5])
  state = new_importance(4, size=10)
  for _ in range(12):
    losses = scales * random.uniform(0.5, 1.5, 4)
    state = update_importance(state, jnp.arange(4), jnp.asarray(losses, jnp.float32))
  probabilities = importance_probabilities(state)
  expected = np.sqrt(np.mean(np.square(state.losses), axis=1))
  np.testing.assert_allclose(
    probabilities, 0.999 * expected / expected.sum() + 0.001 / 4, rtol=1e-5
  )
  t, weights = jax.jit(draw_importance, static_argnums=1)(jax.random.key(1), 40_000, state)
  np.testing.assert_allclose(np.bincount(t) / len(t), probabilities, atol=1e-3)
  # The weighted mean of any loss is that over all times.
  values = np.array([3.0, 1.0, 4.0, 1.5])
  np.testing.assert_allclose(np.mean(weights * values[t]), values.mean(), rtol=5e-3)


def test_losses_that_are_remembered_have_no_gradient():
  def remembered(scale):
    return jnp.sum(update_importance(new_importance(2), jnp.array([0]), scale[None]).losses)

  assert jax.grad(remembered)(jnp.float32(2.0)) == 0.0


@pytest.mark.parametrize("name, options, message", [
  ("stratify", {}, "did you mean 'stratified'"),
  ("logit_normal", {"spread": 0}, "density_spread=0 is not positive"),
  ("uniform", {"scale": 2.0}, "mode scale 2.0 is outside -1 to 1.75"),
  ("log_normal", {"process": make_process("flow")}, "of the schedule 'edm'"),
  ("log_normal", {}, "use 'logit_normal'"),
])
def test_bad_input_is_one_line(name, options, message):
  with pytest.raises(UserError, match=message):
    make_density(name, **options)
