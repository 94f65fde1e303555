"""Solvers of rectified flow and of Karras et al.'s process against diffusers'; see `walks`."""

import jax
import numpy as np
import pytest
from walks import (
  COUNTS,
  LINSPACE,
  assert_close,
  case,
  diffusers,
  double,
  draw,
  ours,
  outputs_of,
  walk,
)  # fmt: skip

from t2i_jax.diffusion import solvers
from t2i_jax.diffusion.grid import Grid
from t2i_jax.diffusion.parameterization import make_parameterization
from t2i_jax.diffusion.schedules import make_process

FLOWS = {
  "flow_euler": diffusers.FlowMatchEulerDiscreteScheduler,
  "flow_heun": diffusers.FlowMatchHeunDiscreteScheduler,
}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("prediction", ["flow", "v", "x0"])
@pytest.mark.parametrize("name", FLOWS)
def test_flow(name, prediction, shift):
  scheduler, kind = FLOWS[name](shift=shift), make_parameterization(prediction)
  for steps in COUNTS:
    process, solver, grid, x, keys = case("flow", name, LINSPACE, steps, shift=shift)
    outputs = outputs_of(solver(grid).evaluations, steps)
    given = ours(prediction, solver, grid, x, outputs, keys)
    scheduler.set_timesteps(steps)
    rows = solver(grid).rows
    np.testing.assert_allclose(scheduler.timesteps, process.embedded(rows.time), rtol=1e-5)
    # Its noise levels in float64, from ours of the same values.
    twice = np.repeat(grid.sigma[1:-1], 2) if name == "flow_heun" else grid.sigma[1:-1]
    sigmas = np.concatenate([grid.sigma[:1], twice, grid.sigma[-1:]])
    np.testing.assert_allclose(scheduler.sigmas, sigmas, rtol=1e-5)
    scheduler.sigmas = double(sigmas)
    expected, state = [x], double(x)
    for k, output in enumerate(outputs):
      alpha, sigma = rows.alpha[k], rows.sigma[k]
      x_0, noise = kind.predict(state.numpy(), output.astype(np.float64), alpha, sigma)
      state = scheduler.step(double(noise - x_0), scheduler.timesteps[k], state).prev_sample
      expected.append(state)
    # Near the picture x_0 leaves float32 few digits of the noise, which Heun's slope is made of.
    assert_close(given, expected, 5e-5 if (name, prediction) == ("flow_heun", "x0") else 1e-5)


def test_flow_by_the_multistep_solvers():
  # The reference's grid of flow for them starts just short of pure noise.
  scheduler = diffusers.DPMSolverMultistepScheduler(
    use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
  )
  process, solver = make_process("flow", shift=3.0), solvers.make_solver("dpmpp_2m")
  for steps in COUNTS:
    scheduler.set_timesteps(steps)
    sigma = scheduler.sigmas.double().numpy()
    grid, x, outputs = Grid(sigma, 1 - sigma, sigma), draw((steps, 7)), outputs_of(steps, steps)
    given = ours("flow", solver, grid, x, outputs, jax.random.split(jax.random.key(0), 2))
    scheduler.sigmas = double(sigma)
    assert_close(given, walk(scheduler, x, outputs))
    np.testing.assert_allclose(process.alpha(sigma), 1 - sigma)


@pytest.mark.parametrize("data", [0.5, 1.0])
def test_edm_euler(data):
  scheduler = diffusers.EDMEulerScheduler(sigma_data=data)
  kind = make_parameterization("edm", data)
  for steps in COUNTS:
    process, solver, grid, x, keys = case("edm", "euler", {"spacing": "natural"}, steps)
    assert grid.deviation == pytest.approx(float(scheduler.init_noise_sigma))
    outputs, x = outputs_of(steps, steps), np.float32(grid.deviation) * x
    given = ours("edm", solver, grid, x, outputs, keys, data=data)
    scheduler.set_timesteps(steps)
    np.testing.assert_allclose(scheduler.timesteps, process.embedded(grid.times[:-1]), rtol=1e-5)
    np.testing.assert_allclose(scheduler.sigmas, grid.sigma, rtol=1e-5)
    scheduler.sigmas = double(grid.sigma)
    scheduler.is_scale_input_called = True
    assert_close(given, walk(scheduler, x, outputs))
    # And what the network is given.
    sigma = grid.sigma[0]
    np.testing.assert_allclose(
      kind.input_scale(np.float64(1.0), sigma) * x, scheduler.precondition_inputs(x, sigma),
      rtol=1e-6,
    )
