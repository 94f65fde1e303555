import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.systems.vae.distributions import (
  BIN,
  Gaussian,
  discretized_logistic_log_likelihood,
  gaussian_log_likelihood,
)

VALUES = jnp.arange(256) / 127.5 - 1.0


def normal(*shape, key=0, scale=1.0):
  return scale * jax.random.normal(jax.random.key(key), shape)


def test_divergence_is_the_mean_log_ratio_of_draws():
  q = Gaussian(normal(1, 3), normal(1, 3, key=1, scale=0.5))
  p = Gaussian(normal(1, 3, key=2), normal(1, 3, key=3, scale=0.5))
  z = q.sample(normal(400_000, 3, key=4))

  def log_density(g):
    return -0.5 * (g.log_variance + jnp.square(z - g.mean) * jnp.exp(-g.log_variance))

  sampled = jnp.mean(log_density(q) - log_density(p), axis=0)
  np.testing.assert_allclose(q.kl(p)[0], sampled, atol=0.02)


def test_divergence_of_known_pairs():
  standard = Gaussian(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
  moved = Gaussian(jnp.full((1, 2), 2.0), jnp.zeros((1, 2)))
  wide = Gaussian(jnp.zeros((1, 2)), jnp.full((1, 2), 2.0))
  assert np.all(np.asarray(standard.kl(standard)) == 0)
  np.testing.assert_allclose(moved.kl(standard), 2.0)
  np.testing.assert_allclose(wide.kl(standard), 0.5 * (np.e**2 - 1 - 2), rtol=1e-6)
  np.testing.assert_allclose(standard.kl(wide), 0.5 * (np.e**-2 - 1 + 2), rtol=1e-6)


def test_reparameterised_draw_has_the_moments_and_their_gradients():
  g = Gaussian(jnp.array([[1.0, -2.0]]), jnp.log(jnp.array([[4.0, 0.25]])))
  noise = normal(200_000, 2)
  z = g.sample(noise)
  np.testing.assert_allclose(z.mean(0), [1.0, -2.0], atol=0.02)
  np.testing.assert_allclose(z.std(0), [2.0, 0.5], atol=0.02)
  np.testing.assert_allclose(g.sample(noise, 0.5).std(0), [1.0, 0.25], atol=0.02)
  # d/dmean E[z^2] = 2 mean, and d/dlog_variance E[z^2] = variance.
  gradient = jax.grad(lambda g: jnp.sum(jnp.mean(jnp.square(g.sample(noise)), axis=0)))(g)
  np.testing.assert_allclose(gradient.mean, [[2.0, -4.0]], atol=0.05)
  np.testing.assert_allclose(gradient.log_variance, [[4.0, 0.25]], atol=0.05)


@pytest.mark.parametrize("mean, scale", [(0.0, 0.05), (-0.99, 0.3), (1.4, 0.01), (0.3, 1 / 255)])
def test_discretized_logistic_sums_to_one(mean, scale):
  log_p = discretized_logistic_log_likelihood(VALUES, mean, jnp.log(scale))
  assert np.all(np.isfinite(log_p))
  np.testing.assert_allclose(np.exp(np.asarray(log_p, np.float64)).sum(), 1.0, atol=1e-5)


def test_discretized_logistic_is_the_difference_of_the_distribution_function():
  mean, scale = 0.1, 0.2
  cdf = lambda x: 1 / (1 + np.exp(-(x - mean) / scale))  # noqa: E731
  for k in (1, 100, 254):
    x = k / 127.5 - 1
    expected = np.log(cdf(x + BIN / 2) - cdf(x - BIN / 2))
    ours = discretized_logistic_log_likelihood(jnp.float32(x), mean, jnp.log(scale))
    np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_discretized_logistic_has_finite_gradients_far_from_the_mean():
  gradient = jax.grad(
    lambda m, s: discretized_logistic_log_likelihood(VALUES, m, s).sum(), (0, 1)
  )(jnp.float32(-1.0), jnp.log(jnp.float32(0.004)))
  assert np.all(np.isfinite(gradient)) and gradient[0] > 0


def test_gaussian_counts_density_per_bin():
  log_p = gaussian_log_likelihood(VALUES, 0.0, jnp.log(0.1))
  np.testing.assert_allclose(np.exp(np.asarray(log_p)).sum(), 1.0, atol=1e-4)
