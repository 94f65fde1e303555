import pytest

from t2i_jax.diffusion.combination import check_combination
from t2i_jax.diffusion.grid import make_grid
from t2i_jax.diffusion.parameterization import PARAMETERIZATIONS, make_parameterization
from t2i_jax.diffusion.schedules import CONTINUOUS, DISCRETE, make_process
from t2i_jax.diffusion.solvers import SOLVERS
from t2i_jax.errors import UserError

ZERO = make_process("linear", zero_terminal_snr=True)
PROCESSES = {name: make_process(name) for name in (*DISCRETE, *CONTINUOUS)} | {"zero": ZERO}


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", sorted(PARAMETERIZATIONS))
def test_what_makes_sense_and_what_does_not(process, name):
  blind = process in ("flow", "zero")
  for solver in SOLVERS.values():
    wrong = (
      (blind and name == "epsilon") or (blind and solver.name == "plms")
      or (process != "flow" and solver.name.startswith("flow_"))
    )
    given = PROCESSES[process], make_parameterization(name), solver
    if wrong:
      with pytest.raises(UserError) as caught:
        check_combination(*given)
      assert "\n" not in str(caught.value)
    else:
      check_combination(*given)
      solver(make_grid(given[0], 3, convention=solver.convention))


def test_without_a_solver_it_is_training_that_is_checked():
  with pytest.raises(UserError, match="predict 'v', 'x0', 'edm' or 'flow'"):
    check_combination(ZERO, make_parameterization("epsilon"))
  check_combination(ZERO, make_parameterization("v"))
