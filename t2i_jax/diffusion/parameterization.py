"""What the network's output means, and how it becomes a prediction of x_0 and noise.

For variance-preserving processes, alpha^2 + sigma^2 = 1, which `V` relies on.
"""

from typing import NamedTuple, Protocol

import jax

from t2i_jax.errors import unknown

Array = jax.Array


class Prediction(NamedTuple):
  """The two ends of the line through x_t = alpha x_0 + sigma noise."""

  x_0: Array
  noise: Array


class Parameterization(Protocol):
  """One choice of the network's target; alpha and sigma broadcast against the pictures."""

  def target(self, x_0: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
    """What the network should output."""

  def predict(self, x_t: Array, output: Array, alpha: Array, sigma: Array) -> Prediction:
    """x_0 and noise that the output implies."""

  def error_scale(self, alpha: Array, sigma: Array) -> Array:
    """|output error| / |x_0 error|: changes a weight on one into one on the other."""


class Epsilon:
  """The noise (Ho et al. 2020, section 3.2)."""

  def target(self, x_0, noise, alpha, sigma):
    return noise

  def predict(self, x_t, output, alpha, sigma):
    return Prediction((x_t - sigma * output) / alpha, output)

  def error_scale(self, alpha, sigma):
    return alpha / sigma


class X0:
  """The clean picture (Ho et al. 2020, section 3.2; Ramesh et al. 2022, 2.2)."""

  def target(self, x_0, noise, alpha, sigma):
    return x_0

  def predict(self, x_t, output, alpha, sigma):
    return Prediction(output, noise_of(x_t, output, alpha, sigma))

  def error_scale(self, alpha, sigma):
    return 1.0 + 0.0 * alpha


class V:
  """alpha noise - sigma x_0 (Salimans and Ho 2022, section 4 and appendix D)."""

  def target(self, x_0, noise, alpha, sigma):
    return alpha * noise - sigma * x_0

  def predict(self, x_t, output, alpha, sigma):
    return Prediction(alpha * x_t - sigma * output, sigma * x_t + alpha * output)

  def error_scale(self, alpha, sigma):
    return 1.0 / sigma


PARAMETERIZATIONS = {"epsilon": Epsilon, "x0": X0, "v": V}


def make_parameterization(name: str) -> Parameterization:
  """The parameterization of a name; UserError for another."""
  if name not in PARAMETERIZATIONS:
    raise unknown("diffusion prediction", name, PARAMETERIZATIONS)
  return PARAMETERIZATIONS[name]()


def noise_of(x_t: Array, x_0: Array, alpha: Array, sigma: Array) -> Array:
  """The noise that takes x_0 to x_t."""
  return (x_t - alpha * x_0) / sigma
