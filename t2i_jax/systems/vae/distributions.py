"""The densities of variational autoencoders, in nats."""

import math

import jax
import jax.numpy as jnp
from flax import struct

Array = jax.Array
# Between two of the 256 values of a channel that is scaled to [-1, 1].
BIN = 2.0 / 255.0


@struct.dataclass
class Gaussian:
  """A Gaussian with a diagonal covariance.

  Attributes:
    mean, log_variance: [B, Z].
  """

  mean: Array
  log_variance: Array

  def sample(self, noise: Array, temperature: Array | float = 1.0) -> Array:
    """The reparameterised draw (Kingma and Welling 2014, section 2.4); noise [B, Z]."""
    return self.mean + temperature * jnp.exp(0.5 * self.log_variance) * noise

  def kl(self, other: "Gaussian") -> Array:
    """KL(self || other) of each dimension [B, Z], in closed form."""
    ratio = self.log_variance - other.log_variance
    distance = jnp.square(self.mean - other.mean) * jnp.exp(-other.log_variance)
    return 0.5 * (jnp.exp(ratio) + distance - 1.0 - ratio)


def gaussian_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
  """log N(x; mean, exp(log_scale)^2) for every value, per bin of 8-bit pictures.

  The density times the width of a bin, so that it compares with the
  probability that a discrete likelihood gives.
  """
  error = jnp.square((x - mean) * jnp.exp(-log_scale))
  return math.log(BIN) - 0.5 * error - log_scale - 0.5 * math.log(2.0 * math.pi)


def discretized_logistic_log_likelihood(x: Array, mean: Array, log_scale: Array) -> Array:
  """log-probability of every 8-bit value under a logistic distribution.

  Kingma et al. 2016, section 5.2 (after Salimans et al. 2017, section 2.1): the
  mass of the value's bin, where the first and the last bin reach to infinity.

  Args:
    x: multiples of `BIN` from -1 to 1.
    mean, log_scale: broadcast against x.
  """
  inverse = jnp.exp(-log_scale)
  below = inverse * (x - mean - 0.5 * BIN)
  above = inverse * (x - mean + 0.5 * BIN)
  # sigmoid(above) - sigmoid(below), without cancellation in the tails.
  middle = (
    jax.nn.log_sigmoid(above) + jax.nn.log_sigmoid(-below)
    + jnp.log(-jnp.expm1(-BIN * inverse))
  )  # fmt: skip
  first, last = x < -1.0 + 0.5 * BIN, x > 1.0 - 0.5 * BIN
  return jnp.where(
    first, jax.nn.log_sigmoid(above), jnp.where(last, jax.nn.log_sigmoid(-below), middle)
  )


LIKELIHOODS = {
  "gaussian": gaussian_log_likelihood,
  "discretized_logistic": discretized_logistic_log_likelihood,
}
