"""The times at which a sampler stops, made on the host.

Public samplers place them by three conventions, which agree on the spacing
"trailing". A solver names its own, `Solver.convention`:
  ddim: at the process's whole steps (Ho et al. 2020; Song et al. 2021a; Liu et al. 2022a).
  k: in sigma / alpha, also between steps (Karras et al. 2022).
  dpm: at whole steps, as if there were one more, at the clean end (Lu et al. 2022b).
"""

import dataclasses

import numpy as np

from t2i_jax.diffusion.continuous import RectifiedFlow, VarianceExploding, shifted
from t2i_jax.diffusion.process import DiscreteProcess, Process
from t2i_jax.errors import UserError, unknown

CONVENTIONS = ("ddim", "k", "dpm")
SPACINGS = ("natural", "trailing", "leading", "linspace", "karras")
FINAL_SIGMAS = ("zero", "sigma_min")
RHO = 7.0  # Karras et al. 2022, section 3


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
  """N steps between N + 1 points, from noise to the picture.

  Attributes:
    times, alpha, sigma: float64 [N + 1]. The last point is clean, unless it was asked to be the
      process's least noise.
  """

  times: np.ndarray
  alpha: np.ndarray
  sigma: np.ndarray

  @property
  def steps(self) -> int:
    """N."""
    return len(self.times) - 1

  @property
  def deviation(self) -> float:
    """Standard deviation of the first point, of pictures of deviation 1: scales the start noise."""
    return float(np.hypot(self.alpha[0], self.sigma[0]))

  @property
  def half_log_snr(self) -> np.ndarray:
    """log(alpha / sigma), [N + 1]: -inf where nothing is left, inf at the clean end."""
    with np.errstate(divide="ignore"):
      return np.log(self.alpha) - np.log(self.sigma)

  def after(self, index: int) -> "Grid":
    """The grid from point `index` on, for what starts with a picture and not with noise.

    Raises:
      UserError: if no step is left.
    """
    if not 0 <= index < self.steps:
      raise UserError(f"a start at point {index} of a grid of {self.steps} steps leaves no step")
    return Grid(*(x[index:] for x in (self.times, self.alpha, self.sigma)))


def start_index(steps: int, strength: float) -> int:
  """The point at which image-to-image starts: `strength` of all steps are taken.

  Meng et al. 2022 (SDEdit), section 3: 1 starts from noise, 0 would change nothing.

  Raises:
    UserError: for a strength that is outside 0 to 1, or leaves no step.
  """
  if not 0.0 < strength <= 1.0:
    raise UserError(f"strength={strength} is outside 0 (excluded) to 1")
  taken = int(steps * strength)
  if taken < 1:
    raise UserError(f"strength={strength} leaves none of {steps} steps; raise either")
  return steps - taken


def make_grid(
  process: Process, steps: int, spacing: str = "natural", *, offset: int = 0,
  convention: str = "ddim", final_sigma: str = "zero", rho: float = RHO,
) -> Grid:
  """The grid of a process.

  Args:
    process: whose times it has.
    steps: N.
    spacing: of a discrete process (Lin et al. 2024, table 2) "trailing", every T / N steps back
      from the last; "leading", every T // N steps up from 0; "linspace", evenly with both ends.
      Of a continuous one "trailing" is even in u (see `Process.time`) from 1 to 0, the clean end;
      "linspace" is even in u down to the least noise, after which comes the clean end. "karras"
      is even in the rho-th root of sigma / alpha, from most to least noise. "natural" is what
      goes with the process: "trailing" of discrete ones and of flow, "linspace" of vp, "karras"
      of edm.
    offset: added to times of "leading".
    convention: one of `CONVENTIONS`, the solver's.
    final_sigma: "zero" ends at the clean picture, "sigma_min" at the least noise, which is then
      left in it (Stable Diffusion 1 was published so: "set_alpha_to_one" is false).
    rho: of "karras".

  Raises:
    UserError: for what is no grid of the process.
  """
  for kind, value, valid in (
    ("spacing of steps", spacing, SPACINGS), ("convention of a solver", convention, CONVENTIONS),
    ("final_sigma", final_sigma, FINAL_SIGMAS),
  ):
    if value not in valid:
      raise unknown(kind, value, valid)
  if steps < 1:
    raise UserError(f"steps={steps} is not positive")
  if spacing == "natural":
    spacing = _natural(process)
  if offset and spacing != "leading":
    raise UserError(f"offset={offset} is read by the spacing 'leading' only, not by {spacing!r}")
  whole = isinstance(process, DiscreteProcess)
  if whole and steps > process.steps:
    raise UserError(f"steps={steps} is outside 1 to {process.steps}, the process's own steps")
  if spacing == "karras":
    times, alpha, sigma = _karras(process, steps, rho)
    if whole and convention != "k":
      times = np.round(times)
  else:
    times = (
      _discrete(process.steps, steps, spacing, offset, convention)
      if whole else _continuous(process, steps, spacing)
    )
    alpha, sigma = process.alpha(times), process.sigma(times)
  end = process.clean if final_sigma == "zero" else process.first
  ends = (end, process.alpha(np.float64(end)), process.sigma(np.float64(end)))
  grid = Grid(*(np.append(x, last) for x, last in zip((times, alpha, sigma), ends, strict=True)))
  if np.any(np.diff(grid.sigma / np.hypot(grid.alpha, grid.sigma)) >= 0):
    raise UserError(
      f"{steps} steps of the spacing {spacing!r} visit some noise twice (final_sigma="
      f"{final_sigma!r}, offset={offset}); use fewer steps, or other values"
    )
  return grid


def _natural(process: Process) -> str:
  if isinstance(process, VarianceExploding):
    return "karras"
  trailing = isinstance(process, (DiscreteProcess, RectifiedFlow))
  return "trailing" if trailing else "linspace"


def _discrete(
  process_steps: int, steps: int, spacing: str, offset: int, convention: str
) -> np.ndarray:
  """float64 [N] in [0, T - 1], descending."""
  count = steps + (convention == "dpm")
  last = process_steps - 1
  if spacing == "trailing":
    # (They begin at pure noise, which Lin et al. 2024, section 3.3, show to matter.)
    return np.round(np.linspace(process_steps, 0, steps + 1))[:-1] - 1
  if spacing == "leading":
    stride = process_steps // count
    times = np.arange(count)[::-1][:steps] * float(stride) + offset
    if not stride or times[0] > last or times[-1] < 0:
      raise UserError(
        f"{steps} steps of the spacing 'leading' with offset={offset} do not fit into the "
        f"process's {process_steps}; use fewer steps, or another offset"
      )
    return times
  if count == 1:
    return np.array([float(last)])
  times = np.linspace(0, last, count)[::-1][:steps]
  return times if convention == "k" else np.round(times)


def _continuous(process: Process, steps: int, spacing: str) -> np.ndarray:
  """float64 [N], descending."""
  if spacing == "leading":
    raise UserError("the spacing 'leading' is of discrete processes; use 'trailing' or 'linspace'")
  if spacing == "trailing":
    return process.time(np.linspace(1.0, 0.0, steps + 1)[:-1])
  if isinstance(process, RectifiedFlow):
    # The published samplers end at the first of 1000 shifted times, and shift that again with the
    # others.
    least = float(shifted(process.first, process.shift))
    return process.time(np.linspace(1.0, least, steps))
  least = 0.0 if isinstance(process, VarianceExploding) else process.first
  return process.time(np.linspace(1.0, least, steps))


def _karras(process: Process, steps: int, rho: float) -> tuple[np.ndarray, ...]:
  """Times, alpha and sigma, float64 [N] each (Karras et al. 2022, equation 5)."""
  if process.ends_in_noise:
    raise UserError("the spacing 'karras' needs some of the picture to be left at the end of the "
                    "process, where sigma / alpha is without bound; use 'trailing'")
  if rho <= 0:
    raise UserError(f"rho={rho} is not positive; Karras et al. 2022 use {RHO:g}")
  ends = np.asarray([process.last, process.first], np.float64)
  most, least = (process.sigma(ends) / process.alpha(ends)) ** (1 / rho)
  ratio = (most + np.linspace(0, 1, steps) * (least - most)) ** rho
  alpha = process.alpha_of(ratio)
  return process.time_of(ratio), alpha, ratio * alpha
