"""How pictures are corrupted: x_t = alpha(t) x_0 + sigma(t) noise.

Everything follows from alpha and sigma: the signal-to-noise ratio, and the
transition and posterior between any two times, so that a solver may visit any
of them. Times grow from the picture to noise. A discrete process has integer
times 0...T-1 and its clean end at -1; those of a continuous one (`continuous`)
are real, and its clean end is 0.
"""

import abc
import dataclasses
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
CLEAN = -1  # the clean end of a discrete process, where alpha is exactly 1


class Process(abc.ABC):
  """A process. Functions of time take jax arrays (float32 out), or numpy's (float64 out).

  Attributes:
    clean: the time of the clean picture.
    first: the least time that a sampler visits, of those that are not clean.
    last: the time of most noise, where sampling starts.
  """

  clean: float = 0.0
  first: float
  last: float

  @abc.abstractmethod
  def time(self, u: Array) -> Array:
    """The training time of u in [0, 1), from picture to noise: int32 of a discrete process."""

  @abc.abstractmethod
  def alpha(self, t: Array) -> Array:
    """How much of the picture is left."""

  @abc.abstractmethod
  def sigma(self, t: Array) -> Array:
    """Standard deviation of the noise."""

  @abc.abstractmethod
  def lost(self, t: Array, s: Array) -> Array:
    """1 - snr(t) / snr(s) for s < t, in a form in which nothing cancels for neighbours."""

  @abc.abstractmethod
  def embedded(self, t: Array) -> Array:
    """What a network's embedding of the time is given."""

  @abc.abstractmethod
  def alpha_of(self, ratio: np.ndarray) -> np.ndarray:
    """alpha where sigma / alpha is `ratio`, which may be infinite."""

  @abc.abstractmethod
  def time_of(self, ratio: np.ndarray) -> np.ndarray:
    """The time at which sigma / alpha is `ratio`; of a discrete process it may be fractional."""

  def snr(self, t: Array) -> Array:
    """Signal-to-noise ratio alpha^2 / sigma^2."""
    with np.errstate(divide="ignore"):
      return (self.alpha(t) / self.sigma(t)) ** 2

  @property
  def ends_in_noise(self) -> bool:
    """Whether nothing at all of the picture is left at `last`: alpha is 0."""
    return float(self.alpha(np.asarray(self.last))) == 0.0

  def corrupt(self, x_0: Array, noise: Array, t: Array) -> Array:
    """x_t of pictures [B, ...] at times [B] (Ho et al. 2020, equation 4)."""
    return (
      expand(self.alpha(t), x_0.ndim) * x_0 + expand(self.sigma(t), x_0.ndim) * noise
    )

  def posterior(self, x_t: Array, x_0: Array, t: Array, s: Array) -> tuple[Array, Array, Array]:
    """q(x_s | x_t, x_0) for times s < t, which need not be neighbours.

    Ho et al. 2020, equations 6 and 7, with beta_t replaced by the variance
    that the process adds between s and t; for any alpha and sigma, Kingma et
    al. 2021, appendix A.2.

    Args:
      x_t, x_0: pictures [B, ...].
      t, s: scalars, or [B].

    Returns:
      Mean, its variance ("fixed small"), and the variance added between s and
      t ("fixed large"), the two choices of Ho et al., section 3.2. At the clean
      end the mean is x_0 and the small variance 0. Both variances broadcast
      against x_t.
    """
    alpha_t, alpha_s, sigma_t, sigma_s, lost = (
      expand(x, x_t.ndim)
      for x in (self.alpha(t), self.alpha(s), self.sigma(t), self.sigma(s), self.lost(t, s))
    )
    mean = alpha_t / alpha_s * (sigma_s / sigma_t) ** 2 * x_t + alpha_s * lost * x_0
    return mean, lost * sigma_s**2, lost * sigma_t**2


@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteProcess(Process):
  """A variance-preserving process of T steps: alpha^2 + sigma^2 = 1.

  On the device its times are integers. On the host they may lie between two
  steps, where sigma / alpha is interpolated linearly, as samplers that work in
  this ratio do (Karras et al. 2022, appendix C.3.4).

  Attributes:
    alphas_cumprod: float64 [T], the products of (1 - beta), that is alpha_t^2.
  """

  alphas_cumprod: np.ndarray
  clean = CLEAN
  first = 0

  @property
  def steps(self) -> int:
    """T."""
    return len(self.alphas_cumprod)

  @property
  def last(self) -> int:
    return self.steps - 1

  def time(self, u: Array) -> Array:
    """Integer times 0...T-1, each an equal part of [0, 1]."""
    return jnp.minimum((u * self.steps).astype(jnp.int32), self.last)

  def alpha(self, t: Array) -> Array:
    if module_of(t) is np:
      return self.alpha_of(self.ratio(t))
    return self._table(np.sqrt(self.alphas_cumprod), 1.0)[t + 1]

  def sigma(self, t: Array) -> Array:
    if module_of(t) is np:
      ratio = self.ratio(t)
      finite = np.where(np.isinf(ratio), 0.0, ratio)
      return np.where(np.isinf(ratio), 1.0, finite * self.alpha_of(finite))
    return self._table(np.sqrt(1.0 - self.alphas_cumprod), 0.0)[t + 1]

  def snr(self, t: Array) -> Array:
    if module_of(t) is np:
      return super().snr(t)
    return self._table(self.alphas_cumprod / (1.0 - self.alphas_cumprod), np.inf)[t + 1]

  def lost(self, t: Array, s: Array) -> Array:
    # The logarithms of neighbours nearly cancel, so each is kept as a pair of float32.
    with np.errstate(divide="ignore"):
      exact = np.log(self.alphas_cumprod) - np.log1p(-self.alphas_cumprod)
    finite = np.where(np.isinf(exact), 0.0, exact)
    high = self._table(exact, np.inf)
    low = self._table(finite - finite.astype(np.float32), 0.0)
    return -jnp.expm1((high[t + 1] - high[s + 1]) + (low[t + 1] - low[s + 1]))

  def embedded(self, t: Array) -> Array:
    return t

  def alpha_of(self, ratio: np.ndarray) -> np.ndarray:
    return 1.0 / np.hypot(1.0, ratio)

  def time_of(self, ratio: np.ndarray) -> np.ndarray:
    return np.interp(np.log(ratio), np.log(self.ratio(np.arange(self.steps))),
                     np.arange(self.steps))

  def ratio(self, t: np.ndarray) -> np.ndarray:
    """sigma / alpha at times in [-1, T-1], float64."""
    with np.errstate(divide="ignore"):
      table = np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)
    table = np.concatenate([[0.0], table])
    low = np.clip(np.floor(t), -1, self.last - 1).astype(int)
    share = t - low
    below, above = table[low + 1], table[low + 2]
    # Towards a ratio without bound it is the inverse that is linear.
    bounded = np.where(np.isinf(above), 0.0, above)
    with np.errstate(divide="ignore"):
      return np.where(
        np.isinf(above), below / (1.0 - share), below + share * (bounded - below)
      )

  def _table(self, values: np.ndarray, clean: float) -> Array:
    return jnp.asarray(np.concatenate([[clean], values]), jnp.float32)


def expand(x: Array, ndim: int) -> Array:
  """x [B] or a scalar as [B, 1, ...], to go with arrays of `ndim` axes."""
  return x.reshape(*x.shape, *(1,) * (ndim - x.ndim)) if getattr(x, "ndim", 0) else x


def module_of(x: Array | np.ndarray) -> ModuleType:
  """numpy for numpy's arrays, which are computed in float64 on the host; else jax.numpy."""
  return np if isinstance(x, (np.ndarray, np.generic)) else jnp
