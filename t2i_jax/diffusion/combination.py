"""Which process, parameterization and solver go together."""

from t2i_jax.diffusion.continuous import RectifiedFlow
from t2i_jax.diffusion.parameterization import Epsilon, Parameterization
from t2i_jax.diffusion.process import Process
from t2i_jax.diffusion.solvers import Solver
from t2i_jax.errors import UserError


def check_combination(
  process: Process, parameterization: Parameterization, solver: Solver | None = None
) -> None:
  """Raises UserError for what makes no sense together, in training or, with `solver`, sampling."""
  if process.ends_in_noise and isinstance(parameterization, Epsilon):
    raise UserError(
      "the prediction 'epsilon' says nothing of the picture where alpha is 0, as at the end of "
      "this process; predict 'v', 'x0', 'edm' or 'flow'"
    )
  if solver is None:
    return
  if process.ends_in_noise and solver.needs_alpha:
    raise UserError(
      f"the solver {solver.name!r} divides by alpha, which is 0 at the end of this process; use "
      "'ddim' or 'dpmpp_2m'"
    )
  if solver.of_flow and not isinstance(process, RectifiedFlow):
    other = solver.name.removeprefix("flow_")
    raise UserError(f"the solver {solver.name!r} is of the process 'flow' alone; use {other!r}")
