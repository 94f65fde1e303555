"""What the network's output means, and how it becomes a prediction of x_0 and noise.

All hold for any alpha and sigma, and all but `Epsilon` where alpha is 0.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError, unknown

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

  def input_scale(self, alpha: Array, sigma: Array) -> Array:
    """What x_t is multiplied by before the network sees it."""


class Unscaled:
  """The network sees x_t as it is."""

  def input_scale(self, alpha, sigma):
    return 1.0 + 0.0 * alpha


class Epsilon(Unscaled):
  """The noise (Ho et al. 2020, section 3.2); says nothing of x_0 where alpha is 0."""

  def target(self, x_0, noise, alpha, sigma):
    return noise

  def predict(self, x_t, output, alpha, sigma):
    return Prediction((x_t - sigma * output) / alpha, output)

  def error_scale(self, alpha, sigma):
    return alpha / sigma


class X0(Unscaled):
  """The clean picture (Ho et al. 2020, section 3.2; Ramesh et al. 2022, 2.2)."""

  def target(self, x_0, noise, alpha, sigma):
    return x_0

  def predict(self, x_t, output, alpha, sigma):
    return Prediction(output, noise_of(x_t, output, alpha, sigma))

  def error_scale(self, alpha, sigma):
    return 1.0 + 0.0 * alpha


class V(Unscaled):
  """alpha noise - sigma x_0 (Salimans and Ho 2022, section 4 and appendix D)."""

  def target(self, x_0, noise, alpha, sigma):
    return alpha * noise - sigma * x_0

  def predict(self, x_t, output, alpha, sigma):
    size = alpha**2 + sigma**2  # 1 of a process that preserves variance
    return Prediction(
      (alpha * x_t - sigma * output) / size, (sigma * x_t + alpha * output) / size
    )

  def error_scale(self, alpha, sigma):
    return (alpha**2 + sigma**2) / sigma


class Flow(Unscaled):
  """noise - x_0, the velocity of the straight line (Liu et al. 2022, equation 1, towards noise)."""

  def target(self, x_0, noise, alpha, sigma):
    return noise - x_0

  def predict(self, x_t, output, alpha, sigma):
    size = alpha + sigma  # 1 of rectified flow
    return Prediction((x_t - sigma * output) / size, (x_t + alpha * output) / size)

  def error_scale(self, alpha, sigma):
    return (alpha + sigma) / sigma


@dataclasses.dataclass(frozen=True)
class EDM:
  """What x_t, shrunk by the noise in it, lacks of x_0 (Karras et al. 2022, section 5).

  Almost clean pictures are passed on, so that the network need not copy them;
  of almost pure noise it predicts x_0. The paper's c_skip, c_out and c_in, here of
  x_t = alpha x_0 + sigma noise in place of x_0 + sigma noise. At a `sigma_data`
  of 1 and alpha^2 + sigma^2 = 1 the output is -v.

  Attributes:
    sigma_data: standard deviation of the pictures in [-1, 1].
  """

  sigma_data: float = 0.5

  def target(self, x_0, noise, alpha, sigma):
    size = self._size(alpha, sigma)
    return (sigma * x_0 / self.sigma_data - alpha * self.sigma_data * noise) / size

  def predict(self, x_t, output, alpha, sigma):
    size = self._size(alpha, sigma)
    x_0 = alpha * (self.sigma_data / size) ** 2 * x_t + self.sigma_data * sigma / size * output
    noise = sigma / size**2 * x_t - self.sigma_data * alpha / size * output
    return Prediction(x_0, noise)

  def error_scale(self, alpha, sigma):
    return self._size(alpha, sigma) / (self.sigma_data * sigma)

  def input_scale(self, alpha, sigma):
    return 1.0 / self._size(alpha, sigma)

  def _size(self, alpha: Array, sigma: Array) -> Array:
    """Standard deviation of x_t."""
    return jnp.sqrt(sigma**2 + (self.sigma_data * alpha) ** 2)


PARAMETERIZATIONS = {"epsilon": Epsilon, "x0": X0, "v": V, "edm": EDM, "flow": Flow}


def make_parameterization(name: str, sigma_data: float = 0.5) -> Parameterization:
  """The parameterization of a name.

  Args:
    name: key of `PARAMETERIZATIONS`.
    sigma_data: of "edm".

  Raises:
    UserError: for another name, or a `sigma_data` that is not positive.
  """
  if name not in PARAMETERIZATIONS:
    raise unknown("diffusion prediction", name, PARAMETERIZATIONS)
  if sigma_data <= 0:
    raise UserError(f"sigma_data={sigma_data} is not positive; Karras et al. 2022 use 0.5")
  return EDM(sigma_data) if name == "edm" else PARAMETERIZATIONS[name]()


def noise_of(x_t: Array, x_0: Array, alpha: Array, sigma: Array) -> Array:
  """The noise that takes x_0 to x_t."""
  return (x_t - alpha * x_0) / sigma
