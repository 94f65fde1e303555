"""Numerical methods that draw a sample by walking the process back, by name."""

import dataclasses
from collections.abc import Callable
from functools import partial

from t2i_jax.diffusion.grid import Grid
from t2i_jax.diffusion.solvers import multistep, one_step
from t2i_jax.diffusion.solvers.table import (
  Evaluation,
  Predict,
  Row,
  Table,
  solve,
  start_noise,
  step_noise,
)
from t2i_jax.diffusion.solvers.unipc import unipc
from t2i_jax.errors import UserError, unknown

__all__ = [
  "SOLVERS", "VARIANCES", "Evaluation", "Predict", "Row", "Solver", "Table", "make_solver", "solve",
  "start_noise", "step_noise",
]

VARIANCES = ("small", "large", "learned")
ORDERS = (2, 3)


@dataclasses.dataclass(frozen=True)
class Solver:
  """A function grid -> table, and what it asks of the grid.

  Attributes:
    name: key of `SOLVERS`.
    tabulate: the function.
    convention: of the grid's spacings, see `grid`.
    of_flow: for rectified flow alone.
    needs_alpha: not for processes that end with nothing left of the picture.
  """

  name: str
  tabulate: Callable[[Grid], Table]
  convention: str = "ddim"
  of_flow: bool = False
  needs_alpha: bool = False

  def __call__(self, grid: Grid) -> Table:
    return self.tabulate(grid)


def make_solver(
  name: str, eta: float = 0.0, variance: str = "small", order: int = 2
) -> Solver:
  """The solver of a name.

  Args:
    name: key of `SOLVERS`.
    eta: of "ddim": 0 is deterministic, 1 has the ancestral sampler's variance.
    variance: of "ddpm", one of `VARIANCES`.
    order: of "unipc", 2 or 3.

  Raises:
    UserError: for another name, or an option that is out of range, whichever solver is named: a
      mistyped option is not without effect by design.
  """
  if variance not in VARIANCES:
    raise unknown("ancestral variance", variance, VARIANCES)
  if not 0.0 <= eta <= 1.0:
    raise UserError(f"ddim eta={eta} is outside 0 to 1")
  if order not in ORDERS:
    raise UserError(f"unipc order={order} is neither 2 nor 3")
  if name not in SOLVERS:
    raise unknown("solver", name, SOLVERS)
  options = {"ddpm": {"variance": variance}, "ddim": {"eta": eta}, "unipc": {"order": order}}
  solver = SOLVERS[name]
  return dataclasses.replace(solver, tabulate=partial(solver.tabulate, **options.get(name, {})))


# Where two names are one table, they differ in the convention of the grid alone.
SOLVERS: dict[str, Solver] = {
  solver.name: solver
  for solver in (
    Solver("ddpm", one_step.ancestral),
    Solver("ddim", one_step.ddim),
    Solver("plms", multistep.plms, needs_alpha=True),
    # Euler's method in sigma / alpha is DDIM; Euler ancestral is DDIM with eta 1, that is DDPM's
    # ancestral sampler with the small variance.
    Solver("euler", one_step.ddim, "k"),
    Solver("euler_ancestral", partial(one_step.ddim, eta=1.0), "k"),
    Solver("heun", one_step.heun, "k"),
    Solver("dpmpp_2m", partial(multistep.dpmpp, order=2), "dpm"),
    Solver("dpmpp_2m_sde", partial(multistep.dpmpp, order=2, eta=1.0), "dpm"),
    Solver("dpmpp_3m", partial(multistep.dpmpp, order=3), "dpm"),
    Solver("dpmpp_3m_sde", partial(multistep.dpmpp, order=3, eta=1.0), "dpm"),
    Solver("unipc", unipc, "dpm"),
    # DDIM once more, on the flow's grid.
    Solver("flow_euler", one_step.flow_euler, "k", of_flow=True),
    Solver("flow_heun", one_step.flow_heun, "k", of_flow=True),
  )
}
