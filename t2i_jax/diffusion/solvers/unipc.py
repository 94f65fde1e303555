"""UniPC, a predictor and a corrector of any order from one evaluation a step."""

import math

import numpy as np

from t2i_jax.diffusion.grid import Grid
from t2i_jax.diffusion.solvers.multistep import usable
from t2i_jax.diffusion.solvers.table import BASE, FIRST, POINT, Table, rows_of


def unipc(grid: Grid, order: int = 2) -> Table:
  """Zhao et al. 2023, algorithms 7 and 8, with B(h) = exp(h) - 1 ("bh2").

  Each evaluation corrects the point it was made at, from the corrected point
  before, and then predicts the next; the network is not evaluated at corrected
  points. Orders fall at both ends, to 1 at the clean one.

  Args:
    grid: where.
    order: 2 or 3, of the predictor; the corrector gains one.
  """
  orders = np.minimum(np.minimum(order, usable(grid) + 1), grid.steps - np.arange(grid.steps))
  width = FIRST + order + 1
  point, base = np.zeros((2, grid.steps, width))
  for k in range(grid.steps):
    if k == 0:
      base[k, POINT] = 1.0
    else:
      on_x, on_evaluations = _update(grid, k - 1, orders[k - 1], corrects=True)
      base[k, BASE] = on_x
      base[k, FIRST : FIRST + len(on_evaluations)] = on_evaluations
    on_x, on_evaluations = _update(grid, k, orders[k], corrects=False)
    point[k] = on_x * base[k]
    point[k, FIRST : FIRST + len(on_evaluations)] += on_evaluations
  return Table(rows_of(grid), point, base)


def _update(grid: Grid, k: int, order: int, corrects: bool) -> tuple[float, np.ndarray]:
  """Coefficients of a step from point k to k + 1.

  Returns:
    That of the point, and those of the evaluations, the newest first: with
    `corrects` at points k + 1, k, k - 1..., else at k, k - 1...
  """
  half = grid.half_log_snr
  on_x = grid.sigma[k + 1] / grid.sigma[k]
  # alpha (1 - exp(-h)), h the step; -B(-h) of the paper.
  gain = grid.alpha[k + 1] - grid.alpha[k] * on_x
  nodes = [k - i for i in range(1, order)]
  step = half[k + 1] - half[k]
  ratios = (half[nodes] - half[k]) / step
  if corrects:
    nodes, ratios = [k + 1, *nodes], np.append(1.0, ratios)
  weights = _weights(step, ratios) / ratios
  on_evaluations = np.zeros(order + corrects)
  on_evaluations[[k + corrects - node for node in nodes]] = gain * weights
  on_evaluations[int(corrects)] = gain * (1.0 - weights.sum())
  return on_x, on_evaluations


def _weights(step: float, ratios: np.ndarray) -> np.ndarray:
  """Their a_p of nodes at `ratios` times the step, equation 11; of one node its limit 1 / 2."""
  if len(ratios) < 2:
    return np.full(len(ratios), 0.5)
  phi, moments = math.expm1(-step) / -step - 1.0, []
  for i in range(1, len(ratios) + 1):
    moments.append(phi * math.factorial(i) / math.expm1(-step))
    phi = phi / -step - 1.0 / math.factorial(i + 1)
  powers = ratios[None, :] ** np.arange(len(ratios))[:, None]
  return np.linalg.solve(powers, moments)
