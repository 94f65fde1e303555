"""Processes by name."""

from collections.abc import Callable

import numpy as np

from t2i_jax.diffusion.continuous import RectifiedFlow, VarianceExploding, VariancePreserving
from t2i_jax.diffusion.process import DiscreteProcess, Process
from t2i_jax.errors import UserError, unknown


def linear(steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> DiscreteProcess:
  """beta linear from `start` to `end` (Ho et al. 2020, section 4).

  These are for 1000 steps; for another number they are scaled so that the
  process still ends in noise, where sampling begins.

  Raises:
    UserError: for so few steps that a beta would reach 1.
  """
  return _of_betas("linear", np.linspace(start, end, steps), steps)


def scaled_linear(
  steps: int = 1000, start: float = 8.5e-4, end: float = 0.012
) -> DiscreteProcess:
  """sqrt(beta) linear: the process of latent diffusion and Stable Diffusion.

  Rombach et al. 2022, released configurations. As with `linear`, the betas are
  for 1000 steps.

  Raises:
    UserError: for so few steps that a beta would reach 1.
  """
  return _of_betas("scaled_linear", np.linspace(start**0.5, end**0.5, steps) ** 2, steps)


def cosine(steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> DiscreteProcess:
  """Squared-cosine alpha^2, betas capped at `largest` (Nichol and Dhariwal 2021, 3.2)."""
  u = np.arange(steps + 1, dtype=np.float64) / steps
  bar = np.cos((u + offset) / (1.0 + offset) * np.pi / 2) ** 2
  return DiscreteProcess(np.cumprod(1.0 - np.minimum(1.0 - bar[1:] / bar[:-1], largest)))


def with_zero_terminal_snr(process: DiscreteProcess) -> DiscreteProcess:
  """The process, its alphas stretched so that the last one is 0 (Lin et al. 2024, algorithm 1)."""
  alpha = np.sqrt(process.alphas_cumprod)
  stretched = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
  return DiscreteProcess(stretched**2)


DISCRETE: dict[str, Callable[..., DiscreteProcess]] = {
  "linear": linear, "scaled_linear": scaled_linear, "cosine": cosine,
}
CONTINUOUS: dict[str, type[Process]] = {
  "vp": VariancePreserving, "edm": VarianceExploding, "flow": RectifiedFlow,
}
# The options of `make_process` that a schedule reads, by what it calls them.
OPTIONS = {
  "linear": {"beta_start": "start", "beta_end": "end"},
  "scaled_linear": {"beta_start": "start", "beta_end": "end"},
  "cosine": {},
  "vp": {"beta_start": "beta_start", "beta_end": "beta_end"},
  "edm": {"sigma_min": "sigma_min", "sigma_max": "sigma_max"},
  "flow": {"shift": "shift"},
}


def make_process(
  schedule: str, steps: int = 1000, *, shift: float | None = None,
  zero_terminal_snr: bool = False, beta_start: float | None = None,
  beta_end: float | None = None, sigma_min: float | None = None,
  sigma_max: float | None = None,
) -> Process:
  """The process of a schedule by name.

  Args:
    schedule: key of `DISCRETE` or `CONTINUOUS`.
    steps: T of a discrete process; a continuous one has none.
    shift: of "flow".
    zero_terminal_snr: of discrete ones, see `with_zero_terminal_snr`.
    beta_start, beta_end: of "linear", "scaled_linear" (for 1000 steps) and "vp".
    sigma_min, sigma_max: of "edm". What is None is as published.

  Raises:
    UserError: for a name, a number of steps or an option that makes no process.
  """
  if schedule not in OPTIONS:
    raise unknown("diffusion schedule", schedule, OPTIONS)
  given = {
    "shift": shift, "beta_start": beta_start, "beta_end": beta_end, "sigma_min": sigma_min,
    "sigma_max": sigma_max,
  }
  given = {name: value for name, value in given.items() if value is not None}
  for name, value in given.items():
    if name not in OPTIONS[schedule]:
      readers = ", ".join(repr(s) for s, options in OPTIONS.items() if name in options)
      raise UserError(f"{name}={value} is not read by the schedule {schedule!r}, but by {readers}; "
                      "leave it out, or change the schedule")
    if not value > 0:
      raise UserError(f"{name}={value} of the schedule {schedule!r} is not positive")
  for low, high in (("beta_start", "beta_end"), ("sigma_min", "sigma_max")):
    if low in given and high in given and given[low] >= given[high]:
      raise UserError(f"{low}={given[low]} is not below {high}={given[high]}; noise must grow")
  options = {OPTIONS[schedule][name]: value for name, value in given.items()}
  if schedule in CONTINUOUS:
    if zero_terminal_snr:
      raise UserError(f"zero_terminal_snr is of discrete processes, not of {schedule!r}: use one "
                      f"of {', '.join(DISCRETE)}, or leave it out")
    return CONTINUOUS[schedule](**options)
  if steps < 2:
    raise UserError(f"a diffusion process needs at least 2 steps, got {steps}")
  process = DISCRETE[schedule](steps, **options)
  return with_zero_terminal_snr(process) if zero_terminal_snr else process


def _of_betas(name: str, betas: np.ndarray, steps: int) -> DiscreteProcess:
  """The process of betas that are for 1000 steps."""
  largest, scale = betas.max(), 1000.0 / steps
  if scale * largest >= 1.0:
    raise UserError(
      f"a {name} process of {steps} steps has a beta of {scale * largest:g}; "
      f"use more than {int(1000 * largest)} steps, or the cosine schedule"
    )
  return DiscreteProcess(np.cumprod(1.0 - scale * betas))
