"""A variance of the reverse process that the network predicts, and the bound that trains it.

Nichol and Dhariwal 2021, section 3.1. The network has a second output of the
pictures' shape, from which `fraction` makes the share v of the larger variance:
log Sigma = v log large + (1 - v) log small, equation 15.
"""

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.diffusion.process import CLEAN, DiscreteProcess, expand

Array = jax.Array
LEVELS = 256  # of a pixel
WEIGHT = 1e-3  # of the bound beside the simple loss, equation 16


def fraction(output: Array) -> Array:
  """The share of the larger variance, of an output that is -1 for the smaller and 1 for it."""
  return 0.5 * (output + 1.0)


def log_range(alpha: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Logarithms of the smaller and the larger variance of steps from noise to the picture.

  The smaller one of a step to the clean end is 0, without a logarithm; that of
  the step before stands in for it, as in the published code.

  Args:
    alpha, sigma: float64 [N + 1], from noise on.

  Returns:
    [N] each: of the posterior's variance, and of the variance that the process adds.
  """
  ratio = alpha[:-1] * sigma[1:] / (alpha[1:] * sigma[:-1])
  lost = (1.0 - ratio) * (1.0 + ratio)
  large = np.log(lost * sigma[:-1] ** 2)
  if len(large) > 1 and not sigma[-1]:
    small = np.log(lost[:-1] * sigma[1:-1] ** 2)
    return np.append(small, small[-1]), large
  return (large if not sigma[-1] else np.log(lost * sigma[1:] ** 2)), large


def bound(
  process: DiscreteProcess, x_0: Array, x_t: Array, t: Array, predicted_x_0: Array, share: Array
) -> Array:
  """The term of the variational bound at time t, in bits a dimension, [B].

  KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), and at time 0 the negative
  log-likelihood of pixels of 256 levels (Ho et al. 2020, section 3.3). Only the
  variance learns from it: no gradient flows into the mean. In a loss its weight
  is `WEIGHT` times T, for it is one of T terms.

  Args:
    process: the process.
    x_0, x_t: pictures in [-1, 1], clean and at times t, [B, ...].
    t: int32 [B].
    predicted_x_0: what the network makes of x_t, [B, ...].
    share: see `fraction`, [B, ...].
  """
  times = np.arange(process.last, CLEAN - 1, -1)
  small, large = (
    expand(jnp.asarray(x[::-1], jnp.float32)[t], x_0.ndim)
    for x in log_range(process.alpha(times), process.sigma(times))
  )
  log_variance = small + share * (large - small)
  mean, _, _ = process.posterior(x_t, jax.lax.stop_gradient(predicted_x_0), t, t - 1)
  true_mean, _, _ = process.posterior(x_t, x_0, t, t - 1)
  divergence = gaussian_divergence(true_mean, small, mean, log_variance)
  likelihood = pixel_log_likelihood(x_0, mean, log_variance)
  nats = jnp.where(expand(t == 0, x_0.ndim), -likelihood, divergence)
  return jnp.mean(nats, axis=tuple(range(1, nats.ndim))) / jnp.log(2.0)


def gaussian_divergence(
  mean: Array, log_variance: Array, other_mean: Array, other_log_variance: Array
) -> Array:
  """KL(N(mean, variance) || N(other_mean, other_variance)), in nats, by element."""
  difference = log_variance - other_log_variance
  squared = jnp.square(mean - other_mean) * jnp.exp(-other_log_variance)
  return 0.5 * (jnp.expm1(difference) - difference + squared)


def pixel_log_likelihood(x: Array, mean: Array, log_variance: Array) -> Array:
  """log of the normal's mass in the bin of x, by element; the outermost bins have no end.

  Ho et al. 2020, equation 13.

  Args:
    x: in [-1, 1], at one of 256 levels.
    mean, log_variance: of the normal.
  """
  inverse = jnp.exp(-0.5 * log_variance)
  half = 1.0 / (LEVELS - 1)
  upper, lower = inverse * (x + half - mean), inverse * (x - half - mean)
  # In the lower tail, where float32 has its digits: the mass is the same on either side.
  mirrored = lower > 0
  upper, lower = jnp.where(mirrored, -lower, upper), jnp.where(mirrored, -upper, lower)
  top, bottom = x > 1.0 - half, x < -1.0 + half
  below = jnp.where(jnp.where(mirrored, top, bottom), 0.0, jax.scipy.special.ndtr(lower))
  above = jnp.where(jnp.where(mirrored, bottom, top), 1.0, jax.scipy.special.ndtr(upper))
  return jnp.log(jnp.maximum(above - below, 1e-12))
