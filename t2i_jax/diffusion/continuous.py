"""Continuous processes: of ever more noise, and the straight line; and shifts of their times."""

import dataclasses
import math

import jax
import numpy as np

from t2i_jax.diffusion.process import Process, module_of

Array = jax.Array
SMALLEST = 1e-5  # of the times that a continuous process trains (Song et al. 2021b, appendix C)


@dataclasses.dataclass(frozen=True)
class VariancePreserving(Process):
  """The limit of infinitely many steps, times in [0, 1] (Song et al. 2021b, appendix B).

  Attributes:
    beta_start, beta_end: of the rate beta(t), linear in time.
  """

  beta_start: float = 0.1
  beta_end: float = 20.0
  first = 1e-3  # where their samplers end, appendix C
  last = 1.0

  def time(self, u: Array) -> Array:
    return module_of(u).maximum(u, SMALLEST)

  def alpha(self, t: Array) -> Array:
    return module_of(t).exp(self._log_alpha(t, 0.0))

  def sigma(self, t: Array) -> Array:
    module = module_of(t)
    return module.sqrt(-module.expm1(2.0 * self._log_alpha(t, 0.0)))

  def lost(self, t: Array, s: Array) -> Array:
    module = module_of(t)
    added = -module.expm1(2.0 * self._log_alpha(t, s))
    return added / self.sigma(t) ** 2

  def embedded(self, t: Array) -> Array:
    """999 t, the steps of the discrete process of which it is the limit."""
    return 999.0 * t

  def alpha_of(self, ratio: np.ndarray) -> np.ndarray:
    return 1.0 / np.hypot(1.0, ratio)

  def time_of(self, ratio: np.ndarray) -> np.ndarray:
    growth, target = self.beta_end - self.beta_start, 2.0 * np.log1p(ratio**2)
    return target / (self.beta_start + np.sqrt(self.beta_start**2 + growth * target))

  def _log_alpha(self, t: Array, s: Array) -> Array:
    """log(alpha(t) / alpha(s)): minus half the integral of beta."""
    growth = self.beta_end - self.beta_start
    return -(t - s) * (0.25 * growth * (t + s) + 0.5 * self.beta_start)


@dataclasses.dataclass(frozen=True)
class VarianceExploding(Process):
  """Noise on top of the whole picture: alpha is 1, and the time is sigma (Karras et al. 2022).

  Attributes:
    sigma_min, sigma_max: the least and largest noise, their table 1.
  """

  sigma_min: float = 0.002
  sigma_max: float = 80.0

  @property
  def first(self) -> float:
    return self.sigma_min

  @property
  def last(self) -> float:
    return self.sigma_max

  def time(self, u: Array) -> Array:
    """Even in the logarithm of sigma, in which the paper's training density is normal."""
    return self.sigma_min * module_of(u).exp(u * math.log(self.sigma_max / self.sigma_min))

  def alpha(self, t: Array) -> Array:
    return 1.0 + 0.0 * t

  def sigma(self, t: Array) -> Array:
    return t

  def lost(self, t: Array, s: Array) -> Array:
    return (t - s) * (t + s) / t**2

  def embedded(self, t: Array) -> Array:
    """log(sigma) / 4, the paper's c_noise."""
    return 0.25 * module_of(t).log(t)

  def alpha_of(self, ratio: np.ndarray) -> np.ndarray:
    return np.ones_like(ratio)

  def time_of(self, ratio: np.ndarray) -> np.ndarray:
    return ratio


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(Process):
  """The straight line from picture to noise: alpha is 1 - sigma, and the time is sigma.

  Liu et al. 2022 (rectified flow); Lipman et al. 2023.

  Attributes:
    shift: moves the times that are trained, and those that are sampled, towards noise; see
      `shifted`, and `resolution_shift` for its value.
  """

  shift: float = 1.0
  first = 1e-3
  last = 1.0

  def time(self, u: Array) -> Array:
    return shifted(module_of(u).maximum(u, SMALLEST), self.shift)

  def alpha(self, t: Array) -> Array:
    return 1.0 - t

  def sigma(self, t: Array) -> Array:
    return t

  def lost(self, t: Array, s: Array) -> Array:
    small = (t - s) / ((1.0 - s) * t)
    return small * (2.0 - small)

  def embedded(self, t: Array) -> Array:
    """1000 sigma, as Esser et al. 2024 have it."""
    return 1000.0 * t

  def alpha_of(self, ratio: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + ratio)

  def time_of(self, ratio: np.ndarray) -> np.ndarray:
    return ratio / (1.0 + ratio)


def shifted(u: Array, shift: float) -> Array:
  """Times moved towards noise (shift > 1) or towards the picture (< 1).

  Esser et al. 2024, equation 23. Pictures whose content shows through much
  noise (few, large, flat objects) leave only the noisiest times for the text to
  decide anything; a shift gives those more of the training.
  """
  return shift * u / (1.0 + (shift - 1.0) * u)


def resolution_shift(resolution: int, base: int) -> float:
  """The shift at which a larger picture is as uncertain as one of side `base`.

  Esser et al. 2024, section 5.3.2: the root of the ratio of the numbers of pixels.
  """
  return resolution / base
