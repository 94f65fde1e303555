import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from t2i_jax.diffusion import variance
from t2i_jax.diffusion.grid import make_grid
from t2i_jax.diffusion.schedules import make_process

PROCESS = make_process("cosine", 100)
SHAPE = (4, 3, 3, 2)


def levels(seed):
  pixels = np.random.default_rng(seed).integers(0, 256, SHAPE)
  return jnp.asarray(pixels / 127.5 - 1, jnp.float32)


def normal(seed):
  return jnp.asarray(np.random.default_rng(seed).normal(size=SHAPE), jnp.float32)


def test_the_ends_of_the_range_are_the_two_variances():
  # Nichol and Dhariwal 2021, equation 15.
  grid = make_grid(PROCESS, 100)
  small, large = variance.log_range(grid.alpha, grid.sigma)
  products = np.concatenate([[1.0], PROCESS.alphas_cumprod])
  betas = (1 - products[1:] / products[:-1])[::-1]
  np.testing.assert_allclose(np.exp(large), betas, rtol=1e-9)
  before, after = 1 - products[-2::-1], 1 - products[:0:-1]
  np.testing.assert_allclose(np.exp(small[:-1]), (betas * before / after)[:-1], rtol=1e-9)
  # The last, of no variance, takes that of the step before.
  assert small[-1] == small[-2]
  share = variance.fraction(jnp.array([-1.0, 0.0, 1.0]))
  np.testing.assert_allclose(share, [0.0, 0.5, 1.0])


def test_ranges_of_few_steps_are_finite():
  for process in (PROCESS, make_process("flow"), make_process("edm")):
    for steps in (1, 2, 3):
      grid = make_grid(process, steps)
      small, large = variance.log_range(grid.alpha, grid.sigma)
      assert small.shape == large.shape == (steps,)
      assert np.all(np.isfinite(small)) and np.all(small <= large + 1e-12)


@pytest.mark.parametrize("time", [1, 30, 99])
def test_the_bound_is_the_divergence_of_two_normals(time):
  x_0, noise, predicted, share = levels(0), normal(1), normal(2), 0.5 + 0.3 * normal(3)
  t = jnp.full(4, time)
  x_t = PROCESS.corrupt(x_0, noise, t)
  given = variance.bound(PROCESS, x_0, x_t, t, predicted, share)
  expected = []
  for i in range(4):
    mean, small, large = PROCESS.posterior(x_t[i], x_0[i], t[i], t[i] - 1)
    other, *_ = PROCESS.posterior(x_t[i], predicted[i], t[i], t[i] - 1)
    mean, other, v = (np.asarray(a, float) for a in (mean, other, share[i]))
    log_variance = v * np.log(float(large)) + (1 - v) * np.log(float(small))
    ratio = float(small) / np.exp(log_variance)
    divergence = 0.5 * (ratio - 1 - np.log(ratio) + (mean - other) ** 2 / np.exp(log_variance))
    expected.append(np.mean(divergence) / np.log(2))
  np.testing.assert_allclose(given, expected, rtol=2e-3)


def test_the_first_term_is_the_likelihood_of_pixels():
  x_0, share = levels(4), 0.5 + 0.3 * normal(6)
  t = jnp.zeros(4, jnp.int32)
  x_t, predicted = PROCESS.corrupt(x_0, normal(5), t), x_0 + 0.02 * normal(7)
  _, small, large = PROCESS.posterior(x_t, x_0, jnp.ones(4, int), t)
  small, (_, _, large) = small, PROCESS.posterior(x_t, x_0, t, t - 1)
  v = np.asarray(share, float)
  deviation = np.exp(0.5 * (v * np.log(large) + (1 - v) * np.log(small)))
  x, mean = np.asarray(x_0, float), np.asarray(predicted, float)
  upper = np.where(x > 0.999, np.inf, (x + 1 / 255 - mean) / deviation)
  lower = np.where(x < -0.999, -np.inf, (x - 1 / 255 - mean) / deviation)
  mass = np.where(lower > 0, stats.norm.sf(lower) - stats.norm.sf(upper),
                  stats.norm.cdf(upper) - stats.norm.cdf(lower))
  expected = -np.log2(np.maximum(mass, 1e-12)).mean(axis=(1, 2, 3))
  np.testing.assert_allclose(
    variance.bound(PROCESS, x_0, x_t, t, predicted, share), expected, rtol=1e-3
  )


def test_pixel_masses_add_up_to_one():
  x = jnp.asarray(np.arange(256) / 127.5 - 1, jnp.float32)
  for mean, deviation in ((0.3, 0.5), (-1.2, 0.1), (0.98, 0.01)):
    log_mass = variance.pixel_log_likelihood(x, jnp.float32(mean), 2 * jnp.log(deviation))
    assert np.exp(np.asarray(log_mass, float)).sum() == pytest.approx(1.0, abs=1e-4)


def test_the_right_prediction_with_the_posteriors_variance_costs_nothing():
  t = jnp.array([1, 20, 50, 99])
  x_0 = levels(0)
  x_t = PROCESS.corrupt(x_0, normal(1), t)
  given = variance.bound(PROCESS, x_0, x_t, t, x_0, jnp.zeros(SHAPE))
  np.testing.assert_allclose(given, 0.0, atol=1e-6)


def test_only_the_variance_learns_from_the_bound():
  x_0, t = levels(0), jnp.array([0, 1, 50, 99])
  x_t = PROCESS.corrupt(x_0, normal(1), t)
  total = lambda x, v: jnp.sum(variance.bound(PROCESS, x_0, x_t, t, x, v))  # noqa: E731
  of_mean, of_share = jax.grad(total, (0, 1))(0.9 * x_0, 0.5 * jnp.ones(SHAPE))
  assert not np.any(of_mean)
  assert np.all(np.isfinite(of_share)) and np.all(np.any(of_share, axis=(1, 2, 3)))


def test_the_best_share_is_learned():
  # Where the prediction is right the posterior's variance is best; where it is off by much, the
  # larger one.
  t = jnp.full(4, 30)
  x_0 = levels(0)
  x_t = PROCESS.corrupt(x_0, normal(1), t)
  slope = jax.grad(
    lambda v, x: jnp.sum(variance.bound(PROCESS, x_0, x_t, t, x, v * jnp.ones(SHAPE)))
  )
  assert slope(0.5, x_0) > 0 > slope(0.5, x_0 + 3.0)
