"""Solvers that remember nothing from one step to the next."""

import dataclasses

import numpy as np

from t2i_jax.diffusion.grid import Grid
from t2i_jax.diffusion.solvers.table import (
  BASE,
  DRAWN,
  FIRST,
  POINT,
  PREDICTED,
  Row,
  Table,
  rows_of,
)
from t2i_jax.diffusion.variance import log_range
from t2i_jax.errors import UserError


def ddim(grid: Grid, eta: float = 0.0) -> Table:
  """Song et al. 2021a, equation 12, for any alpha and sigma.

  At eta 0 it is Euler's method for the probability flow, in sigma / alpha
  (Karras et al. 2022, algorithm 1 without churn) as well as in rectified flow's
  sigma; at eta 1 the ancestral sampler, Karras et al.'s name for which is Euler
  ancestral.
  """
  (alpha_t, sigma_t), (alpha_s, sigma_s) = _ends(grid)
  added = eta**2 * _lost(grid)
  on_noise = sigma_s * np.sqrt(1.0 - added)
  point = np.zeros((grid.steps, FIRST + 1))
  point[:, POINT] = on_noise / sigma_t
  point[:, FIRST] = alpha_s - alpha_t * on_noise / sigma_t
  point[:, DRAWN] = sigma_s * np.sqrt(added)
  return Table(rows_of(grid), point, draws=eta > 0)


def ancestral(grid: Grid, variance: str = "small") -> Table:
  """Draws from the learned reverse process (Ho et al. 2020, algorithm 2).

  Args:
    grid: where.
    variance: "small" (the posterior's), "large" (the process's own, their section 3.2) or
      "learned" between the two (Nichol and Dhariwal 2021, equation 15).
  """
  table = ddim(grid, eta=1.0)
  _, (_, sigma_s) = _ends(grid)
  small, large = log_range(grid.alpha, grid.sigma)
  # The last step draws nothing.
  draws = np.where(sigma_s > 0, 1.0, 0.0)
  if variance == "learned":
    ones = np.ones(grid.steps)
    table.point[:, DRAWN] = draws
    return dataclasses.replace(table, shift=ones, log_range=np.stack([small, large], axis=1))
  variances = table.point[:, DRAWN] ** 2 if variance == "small" else np.exp(large)
  table.point[:, DRAWN] = draws * np.sqrt(variances)
  return dataclasses.replace(table, shift=variances)


def heun(grid: Grid) -> Table:
  """Heun's method in sigma / alpha (Karras et al. 2022, algorithm 1 without churn).

  Two evaluations a step, but for the last to the clean end; a first step from
  where nothing is left of the picture is Euler's too, for there the slope in
  sigma / alpha has no bound.
  """
  with np.errstate(divide="ignore"):
    return _heun(grid, grid.alpha, grid.sigma / grid.alpha)


def flow_heun(grid: Grid) -> Table:
  """Heun's method in sigma, for rectified flow (Esser et al. 2024 sample with Euler's).

  Raises:
    UserError: for a grid of another process.
  """
  check_flow(grid, "flow_heun", "heun")
  return _heun(grid, np.ones_like(grid.alpha), grid.sigma)


def flow_euler(grid: Grid) -> Table:
  """Euler's method in sigma, for rectified flow: there it is `ddim`.

  Raises:
    UserError: for a grid of another process.
  """
  check_flow(grid, "flow_euler", "euler")
  return ddim(grid)


def check_flow(grid: Grid, name: str, other: str) -> None:
  if not np.allclose(grid.alpha + grid.sigma, 1.0):
    raise UserError(f"the solver {name!r} is of the process 'flow' alone; use {other!r}")


def _heun(grid: Grid, scale: np.ndarray, variable: np.ndarray) -> Table:
  """Heun's method for y = x / scale, whose slope in the variable is (y - x_0) / variable."""
  rows, point, base = [], [], []
  for k in range(grid.steps):
    ratio = grid.sigma[k + 1] / grid.sigma[k]
    euler = np.zeros(FIRST + 2)
    euler[POINT], euler[FIRST] = ratio, scale[k + 1] - scale[k] * ratio
    kept = np.zeros_like(euler)
    kept[POINT] = 1.0
    rows, point, base = [*rows, k], [*point, euler], [*base, kept]
    if not grid.sigma[k + 1] or np.isinf(variable[k]):
      continue
    # Half of the slope at either end.
    before = (variable[k + 1] / variable[k] - 1.0) / 2
    update = np.zeros_like(euler)
    update[BASE] = scale[k + 1] / scale[k] * (1.0 + before)
    update[FIRST + 1] = -scale[k + 1] * before
    # The second slope is sigma noise / (scale variable) + (alpha / scale - 1) x_0 / variable.
    half = scale[k + 1] * (variable[k + 1] - variable[k]) / 2
    update[PREDICTED] = half * grid.sigma[k + 1] / (scale[k + 1] * variable[k + 1])
    update[FIRST] = half * (grid.alpha[k + 1] / scale[k + 1] - 1.0) / variable[k + 1]
    # The next row sets the base.
    rows, point, base = [*rows, k + 1], [*point, update], [*base, np.zeros_like(euler)]
  at = np.array(rows)
  where = Row(grid.times[at], grid.alpha[at], grid.sigma[at])
  return Table(where, np.stack(point), np.stack(base), reads_noise=True)


def _ends(grid: Grid) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """alpha and sigma before each step and after it."""
  return (grid.alpha[:-1], grid.sigma[:-1]), (grid.alpha[1:], grid.sigma[1:])


def _lost(grid: Grid) -> np.ndarray:
  """1 - snr(t) / snr(s) of each step from t to s."""
  (alpha_t, sigma_t), (alpha_s, sigma_s) = _ends(grid)
  return 1.0 - (alpha_t * sigma_s / (alpha_s * sigma_t)) ** 2
