"""Solvers that read what the network said at earlier steps: PLMS and DPM-Solver++."""

import numpy as np

from t2i_jax.diffusion.grid import Grid
from t2i_jax.diffusion.solvers.table import BASE, DRAWN, FIRST, POINT, Table, rows_of
from t2i_jax.errors import UserError

FEW = 15  # Steps below which the last ones are of lower order, as in the published code.


def plms(grid: Grid) -> Table:
  """Pseudo linear multistep (Liu et al. 2022a, section 3.3), begun by an improved Euler step.

  As latent diffusion has it (Rombach et al. 2022, released code): the first
  step is taken twice, the second time with the mean of the noise at both its
  ends, so that there is one evaluation more than steps; the first steps use as
  many earlier ones as there are. What was found at the end of the trial step is
  not used again.

  Raises:
    UserError: for a grid that starts where nothing is left of the picture.
  """
  if np.any(grid.alpha == 0):
    raise UserError("the solver 'plms' combines predictions of noise, which say nothing where "
                    "alpha is 0, as at this process's end; use 'dpmpp_2m' or 'ddim'")
  trial = grid.steps > 1
  # Evaluation k is at point at[k]; the step that follows it goes from[k] -> from[k] + 1.
  at = np.arange(grid.steps + trial)
  at[2:] -= 1
  begin = at.copy()
  begin[1:2] = 0
  shares = np.zeros((len(at), 5))
  shares[0, :1] = 1.0
  shares[1:2, :2] = 1 / 2, 1 / 2
  shares[2:3, [0, 2]] = 3 / 2, -1 / 2
  shares[3:4, [0, 1, 3]] = 23 / 12, -16 / 12, 5 / 12
  shares[4:5, [0, 1, 2, 4]] = 55 / 24, -59 / 24, 37 / 24, -9 / 24
  shares[5:, [0, 1, 2, 3]] = 55 / 24, -59 / 24, 37 / 24, -9 / 24
  on_x = grid.alpha[begin + 1] / grid.alpha[begin]
  on_noise = grid.sigma[begin + 1] - on_x * grid.sigma[begin]
  point = np.zeros((len(at), FIRST + 5))
  point[:, POINT] = on_x
  point[1:2, [BASE, POINT]] = on_x[0], 0.0
  point[:, FIRST:] = on_noise[:, None] * shares
  base = np.zeros_like(point)
  base[0, POINT] = 1.0
  return Table(rows_of(grid, at), point, base if trial else None, of_noise=True)


def dpmpp(grid: Grid, order: int, eta: float = 0.0) -> Table:
  """DPM-Solver++, multistep (Lu et al. 2022b, section 4.2 and appendix A).

  In the logarithm of alpha / sigma; each step is of as high an order as there
  are earlier evaluations for, and the last, to the clean end, of the first.

  Of order 3 the published code takes half of the third term of Taylor's
  expansion, and so do we; its error falls with the square of the step.

  Args:
    grid: where.
    order: 2 or 3.
    eta: 0 for the probability flow, 1 for the stochastic equation ("SDE").
  """
  half, orders = grid.half_log_snr, _orders(grid, order)
  point = np.zeros((grid.steps, FIRST + order))
  for k in range(grid.steps):
    alpha, sigma = grid.alpha[k + 1], grid.sigma[k + 1]
    left = sigma * grid.alpha[k] / (alpha * grid.sigma[k])  # exp(-h), h the step
    phi_1 = 1.0 - left ** (1.0 + eta)
    point[k, POINT] = sigma / grid.sigma[k] * left**eta
    point[k, DRAWN] = sigma * np.sqrt(1.0 - left ** (2.0 * eta))
    point[k, FIRST] = alpha * phi_1
    if orders[k] == 1:
      continue
    step, last = half[k + 1] - half[k], half[k] - half[k - 1]
    slope = np.zeros(order)  # of x_0 in units of the step, from the last two evaluations
    slope[:2] = step / last, -step / last
    if orders[k] == 2:
      point[k, FIRST:] += 0.5 * alpha * phi_1 * slope
      continue
    before = half[k - 1] - half[k - 2]
    earlier = np.array([0.0, step / before, -step / before])
    phi_2 = 1.0 - phi_1 / ((1.0 + eta) * step)
    phi_3 = phi_2 / ((1.0 + eta) * step) - 0.5
    first = slope + last / (last + before) * (slope - earlier)
    second = step / (last + before) * (slope - earlier)
    point[k, FIRST:] += alpha * (phi_2 * first - phi_3 * second)
  return Table(rows_of(grid), point, draws=eta > 0)


def usable(grid: Grid) -> np.ndarray:
  """How many points before each step lie at a finite logarithm of alpha / sigma."""
  return np.maximum(np.arange(grid.steps) - np.isinf(grid.half_log_snr[0]), 0)


def _orders(grid: Grid, order: int) -> np.ndarray:
  """The order of each step."""
  few = grid.steps < FEW
  orders = np.minimum(order, usable(grid) + 1)
  if few:
    orders[-2:] = np.minimum(orders[-2:], 2)
  if few or not grid.sigma[-1]:
    orders[-1] = 1
  return orders
