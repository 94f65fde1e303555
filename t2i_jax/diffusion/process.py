"""Variance-preserving corruption in T discrete steps: x_t = alpha_t x_0 + sigma_t eps.

Everything follows from alpha: sigma_t^2 = 1 - alpha_t^2, the signal-to-noise
ratio, and the transition and posterior between any two times, so that a solver
may visit any subset of the steps. Times are integers 0...T-1; -1 is the clean
end, where alpha is exactly 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import UserError, unknown

Array = jax.Array
CLEAN = -1


@dataclasses.dataclass(frozen=True, eq=False)
class DiscreteProcess:
  """A process given by its cumulative products.

  Attributes:
    alphas_cumprod: float64 [T], the products of (1 - beta), that is alpha_t^2.
  """

  alphas_cumprod: np.ndarray

  @property
  def steps(self) -> int:
    """T."""
    return len(self.alphas_cumprod)

  def alpha(self, t: Array) -> Array:
    """alpha at integer times, float32 of t's shape; 1 at `CLEAN`."""
    return self._table(np.sqrt(self.alphas_cumprod), 1.0)[t + 1]

  def sigma(self, t: Array) -> Array:
    """sigma at integer times, float32 of t's shape; 0 at `CLEAN`."""
    return self._table(np.sqrt(1.0 - self.alphas_cumprod), 0.0)[t + 1]

  def snr(self, t: Array) -> Array:
    """Signal-to-noise ratio alpha^2 / sigma^2 at times >= 0."""
    return self._table(self.alphas_cumprod / (1.0 - self.alphas_cumprod), np.inf)[t + 1]

  def corrupt(self, x_0: Array, noise: Array, t: Array) -> Array:
    """x_t of pictures [B, ...] at times [B] (Ho et al. 2020, equation 4)."""
    return (
      expand(self.alpha(t), x_0.ndim) * x_0 + expand(self.sigma(t), x_0.ndim) * noise
    )

  def posterior(self, x_t: Array, x_0: Array, t: Array, s: Array) -> tuple[Array, Array, Array]:
    """q(x_s | x_t, x_0) for times s < t, which need not be neighbours.

    Ho et al. 2020, equations 6 and 7, with beta_t replaced by the variance
    that the process adds between s and t.

    Args:
      x_t, x_0: pictures [B, ...].
      t, s: scalars, or [B].

    Returns:
      Mean, its variance ("fixed small"), and the variance added between s and
      t ("fixed large"), the two choices of section 3.2. At s = CLEAN the mean
      is x_0 and the small variance 0. Both variances broadcast against x_t.
    """
    ratio = expand(self._log_alpha(t, s), x_t.ndim)
    alpha_s, sigma_s, sigma_t = (
      expand(x, x_t.ndim) for x in (self.alpha(s), self.sigma(s), self.sigma(t))
    )
    added = -jnp.expm1(2.0 * ratio)
    kept = (sigma_s / sigma_t) ** 2
    mean = jnp.exp(ratio) * kept * x_t + alpha_s * (added / sigma_t**2) * x_0
    return mean, added * kept, added

  def _log_alpha(self, t: Array, s: Array) -> Array:
    """log(alpha_t / alpha_s), to float32's relative precision.

    The two logarithms of neighbours nearly cancel, so each is kept as a pair
    of float32.
    """
    exact = 0.5 * np.log(self.alphas_cumprod)
    high, low = self._table(exact, 0.0), self._table(exact - exact.astype(np.float32), 0.0)
    return (high[t + 1] - high[s + 1]) + (low[t + 1] - low[s + 1])

  def _table(self, values: np.ndarray, clean: float) -> Array:
    return jnp.asarray(np.concatenate([[clean], values]), jnp.float32)


def linear(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> DiscreteProcess:
  """beta linear from `start` to `end` (Ho et al. 2020, section 4).

  These are for 1000 steps; for another number they are scaled so that the
  process still ends in noise, where sampling begins.

  Raises:
    UserError: for so few steps that a beta would reach 1.
  """
  scale = 1000.0 / steps
  if scale * end >= 1.0:
    raise UserError(
      f"a linear process of {steps} steps has a beta of {scale * end:g}; "
      f"use more than {int(1000 * end)} steps, or the cosine schedule"
    )
  return DiscreteProcess(
    np.cumprod(1.0 - scale * np.linspace(start, end, steps, dtype=np.float64))
  )


def cosine(steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> DiscreteProcess:
  """Squared-cosine alpha^2, betas capped at `largest` (Nichol and Dhariwal 2021, 3.2)."""
  u = np.arange(steps + 1, dtype=np.float64) / steps
  bar = np.cos((u + offset) / (1.0 + offset) * np.pi / 2) ** 2
  return DiscreteProcess(np.cumprod(1.0 - np.minimum(1.0 - bar[1:] / bar[:-1], largest)))


PROCESSES = {"linear": linear, "cosine": cosine}


def make_process(schedule: str, steps: int) -> DiscreteProcess:
  """The process of a schedule by name.

  Raises:
    UserError: for a name or a number of steps that makes no process.
  """
  if schedule not in PROCESSES:
    raise unknown("diffusion schedule", schedule, PROCESSES)
  if steps < 2:
    raise UserError(f"a diffusion process needs at least 2 steps, got {steps}")
  return PROCESSES[schedule](steps)


def expand(x: Array, ndim: int) -> Array:
  """x [B] or a scalar as [B, 1, ...], to go with arrays of `ndim` axes."""
  return x.reshape(*x.shape, *(1,) * (ndim - x.ndim)) if x.ndim else x
