"""Our processes, grids and solvers against diffusers' schedulers, step by step; see `walks`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from walks import (
  COUNTS,
  KARRAS,
  LEADING,
  LINSPACE,
  PREDICTIONS,
  SCHEDULES,
  SHAPE,
  SQUARE,
  TRAILING,
  alphas_of,
  assert_close,
  case,
  diffusers,
  double,
  draw,
  k_walk,
  noises_of,
  ours,
  outputs_of,
  patch_noise,
  scheduler_of,
  set_ratios,
  torch,
  walk,
)  # fmt: skip

from t2i_jax.diffusion import solvers
from t2i_jax.diffusion.grid import make_grid
from t2i_jax.diffusion.parameterization import make_parameterization
from t2i_jax.diffusion.schedules import make_process
from t2i_jax.diffusion.variance import fraction


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
def test_the_process_is_the_references(schedule, zero):
  process = make_process(schedule, zero_terminal_snr=zero)
  betas = {"beta_start": 8.5e-4, "beta_end": 0.012} if schedule == "scaled_linear" else {}
  products = diffusers.DDIMScheduler(
    beta_schedule=SCHEDULES[schedule], rescale_betas_zero_snr=zero, **betas
  ).alphas_cumprod.numpy()
  # Its betas are float32, and so are its products, of which the first are nearly 1.
  np.testing.assert_allclose(process.alphas_cumprod, products, rtol=1e-4, atol=1e-9)
  np.testing.assert_allclose(1 - process.alphas_cumprod, 1 - products, rtol=5e-3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_corruption_and_the_velocity_are_the_references(schedule):
  process, scheduler = make_process(schedule), scheduler_of(diffusers.DDPMScheduler, schedule)
  x_0, noise = draw(0), draw(1)
  for times in ([0, 1], [500, 999]):
    t = jnp.array(times)
    given = double(x_0), double(noise), torch.tensor(times)
    alpha, sigma = (f(t)[:, None, None, None] for f in (process.alpha, process.sigma))
    v = make_parameterization("v").target(x_0, noise, alpha, sigma)
    assert_close([process.corrupt(x_0, noise, t), v],
                 [scheduler.add_noise(*given), scheduler.get_velocity(*given)])


CONVENTIONS = {
  "ddim": diffusers.DDIMScheduler, "k": diffusers.EulerDiscreteScheduler,
  "dpm": diffusers.DPMSolverMultistepScheduler,
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("spacing", [TRAILING, LEADING, LINSPACE, KARRAS],
                         ids=lambda spacing: spacing["spacing"])
def test_times_are_the_references(convention, spacing):
  # The reference sums up strides of "trailing" in floating point. Where that matters ours differ:
  # times that fall between two steps (48 steps), and an extra one, the clean end, after the last
  # (61 steps). One step of its "linspace" is at the clean end: ours is at the noisy one.
  if convention == "ddim" and spacing is KARRAS:
    pytest.skip("these solvers of the reference have no such spacing")
  scheduler = scheduler_of(CONVENTIONS[convention], "linear", spacing)
  process = make_process("linear")
  for steps in (1, 2, 3, 7, 16, 25, 50, 99, 100, 333):
    if steps == 1 and spacing in (LINSPACE, KARRAS):
      continue
    scheduler.set_timesteps(steps)
    times = make_grid(process, steps, convention=convention, **spacing).times
    np.testing.assert_allclose(scheduler.timesteps.numpy(), times[:-1], rtol=2e-4, atol=0.01)


@pytest.mark.parametrize("eta, clip", [(0.0, False), (0.5, True), (1.0, False)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim(schedule, prediction, eta, clip):
  # In its trailing spacing the reference's strides are 1000 // steps: counts that divide 1000.
  for spacing, counts in ((TRAILING, COUNTS), (LEADING, (*COUNTS, 3, 30))):
    scheduler = scheduler_of(
      diffusers.DDIMScheduler, schedule, spacing, clip_sample=clip,
      prediction_type=PREDICTIONS[prediction],
    )
    for steps in counts:
      process, solver, grid, x, keys = case(schedule, "ddim", spacing, steps, {"eta": eta})
      outputs = outputs_of(steps, steps)
      given = ours(prediction, solver, grid, x, outputs, keys, clip)
      scheduler.set_timesteps(steps)
      x, points = double(x), [x]
      noises = noises_of(keys, steps)
      for t, output, noise in zip(scheduler.timesteps, outputs, noises, strict=True):
        x = scheduler.step(
          double(output), t, x, eta=eta, variance_noise=double(noise) if eta else None,
          # Like ours, the noise is that of the clipped picture.
          use_clipped_model_output=clip,
        ).prev_sample
        points.append(x)
      assert_close(given, points)


def test_ddim_of_zero_terminal_snr():
  scheduler = scheduler_of(
    diffusers.DDIMScheduler, "scaled_linear", TRAILING, clip_sample=False,
    prediction_type="v_prediction", rescale_betas_zero_snr=True,
  )
  for steps in COUNTS:
    process, solver, grid, x, keys = case(
      "scaled_linear", "ddim", TRAILING, steps, zero_terminal_snr=True
    )
    assert grid.alpha[0] == 0.0
    outputs = outputs_of(steps, steps)
    given = ours("v", solver, grid, x, outputs, keys)
    scheduler.set_timesteps(steps)
    assert_close(given, walk(scheduler, x, outputs))


def test_ddim_that_ends_at_the_least_noise():
  # Stable Diffusion 1's own.
  scheduler = scheduler_of(
    diffusers.DDIMScheduler, "scaled_linear", LEADING, clip_sample=False, set_alpha_to_one=False
  )
  for steps in COUNTS:
    process, solver, grid, x, keys = case(
      "scaled_linear", "ddim", LEADING | {"final_sigma": "sigma_min"}, steps
    )
    outputs = outputs_of(steps, steps)
    given = ours("epsilon", solver, grid, x, outputs, keys)
    scheduler.set_timesteps(steps)
    assert_close(given, walk(scheduler, x, outputs))


@pytest.mark.parametrize("variance, clip", [("small", True), ("large", False)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm(schedule, prediction, variance, clip, monkeypatch):
  scheduler = scheduler_of(
    diffusers.DDPMScheduler, schedule, TRAILING, clip_sample=clip,
    prediction_type=PREDICTIONS[prediction], variance_type=f"fixed_{variance}",
  )
  for steps in COUNTS:
    process, solver, grid, x, keys = case(
      schedule, "ddpm", TRAILING, steps, {"variance": variance}
    )
    outputs = outputs_of(steps, steps)
    given = ours(prediction, solver, grid, x, outputs, keys, clip)
    scheduler.set_timesteps(steps)
    # In fewer steps than the process has, the reference's large variance adds noise to the very
    # last picture too; Ho et al. 2020, algorithm 2, does not.
    patch_noise(monkeypatch, scheduler, [*noises_of(keys, steps - 1), np.zeros(SHAPE)])
    assert_close(given, walk(scheduler, x, outputs))


def test_ddpm_with_a_learned_variance(monkeypatch):
  scheduler = scheduler_of(
    diffusers.DDPMScheduler, "cosine", TRAILING, clip_sample=False, variance_type="learned_range"
  )
  steps = 10
  process, solver, grid, x, keys = case(
    "cosine", "ddpm", TRAILING, steps, {"variance": "learned"}
  )
  kind, table = make_parameterization("epsilon"), solver(grid)
  noises = noises_of(keys, steps)
  scheduler.set_timesteps(steps)

  @jax.jit
  def run(part, x, output, share):
    def predict(point, row, memory):
      prediction = kind.predict(point, output, row.alpha, row.sigma)
      return solvers.Evaluation(*prediction, variance=fraction(share)), memory

    return solvers.solve(part, predict, x, keys)

  # Step by step: its clipping of the smallest variance at 1e-20 is never felt.
  for k in range(steps - 1):
    x, output, share = draw((k, 0)), draw((k, 1)), 2 * draw((k, 2)) - 1
    part = jax.tree.map(lambda values, k=k: np.float32(values[k : k + 1]), table)
    patch_noise(monkeypatch, scheduler, [noises[0]])
    both = torch.cat([double(output), double(share)], dim=1)
    expected = scheduler.step(both, scheduler.timesteps[k], double(x)).prev_sample
    assert_close([run(part, x, output, share)], [expected])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plms(schedule):
  # Of other predictions the reference averages the outputs themselves, and not the noise. The
  # second is Stable Diffusion 1's own.
  for spacing, final_sigma, counts in (
    (LEADING, "zero", (*COUNTS, 3, 30)), (LEADING, "sigma_min", COUNTS), (TRAILING, "zero", COUNTS),
  ):
    scheduler = scheduler_of(
      diffusers.PNDMScheduler, schedule, spacing, skip_prk_steps=True,
      set_alpha_to_one=final_sigma == "zero",
    )
    for steps in counts:
      if schedule == "cosine" and spacing is TRAILING:
        continue  # alpha is 5e-5 at the start: all points are rounding errors of the first.
      process, solver, grid, x, keys = case(
        schedule, "plms", spacing | {"final_sigma": final_sigma}, steps
      )
      outputs = outputs_of(solver(grid).evaluations, steps)
      given = ours("epsilon", solver, grid, x, outputs, keys)
      scheduler.set_timesteps(steps)
      assert_close(given, walk(scheduler, x, outputs))


@pytest.mark.parametrize("schedule, spacing, prediction", SQUARE)
def test_euler_and_heun(schedule, prediction, spacing, monkeypatch):
  for name, kind in (
    ("euler", diffusers.EulerDiscreteScheduler),
    ("euler_ancestral", diffusers.EulerAncestralDiscreteScheduler),
    ("heun", diffusers.HeunDiscreteScheduler),
  ):
    if name == "euler_ancestral" and (spacing is KARRAS or prediction == "x0"):
      continue  # The reference has neither.
    scheduler = scheduler_of(kind, schedule, spacing, prediction_type=PREDICTIONS[prediction])
    for steps in COUNTS:
      if steps == 1 and spacing in (LINSPACE, KARRAS):
        continue
      process, solver, grid, x, keys = case(schedule, name, spacing, steps)
      evaluations = solver(grid).evaluations
      outputs = outputs_of(evaluations, steps)
      given = ours(prediction, solver, grid, x, outputs, keys)
      set_ratios(scheduler, process, steps, name == "heun")
      patch_noise(monkeypatch, scheduler, noises_of(keys, evaluations))
      assert_close(given, k_walk(scheduler, alphas_of(grid, name == "heun"), x, outputs))


@pytest.mark.parametrize("schedule, spacing, prediction", SQUARE)
def test_multistep(schedule, prediction, spacing):
  for name, order, algorithm in (
    ("dpmpp_2m", 2, "dpmsolver++"), ("dpmpp_2m_sde", 2, "sde-dpmsolver++"),
    ("dpmpp_3m", 3, "dpmsolver++"), ("dpmpp_3m_sde", 3, "sde-dpmsolver++"), ("unipc", 2, None),
    ("unipc", 3, None),
  ):
    solver_options = {"solver_order": order, "prediction_type": PREDICTIONS[prediction]}
    kind = diffusers.UniPCMultistepScheduler
    if algorithm:
      kind, solver_options["algorithm_type"] = diffusers.DPMSolverMultistepScheduler, algorithm
    scheduler = scheduler_of(kind, schedule, spacing, **solver_options)
    for steps in COUNTS:
      process, solver, grid, x, keys = case(
        schedule, name, spacing, steps, None if algorithm else {"order": order}
      )
      outputs = outputs_of(steps, steps)
      given = ours(prediction, solver, grid, x, outputs, keys)
      set_ratios(scheduler, process, steps)
      expected, state = [x], double(x)
      for k, (t, output, noise) in enumerate(
        zip(scheduler.timesteps, outputs, noises_of(keys, steps), strict=True)
      ):
        options = {"variance_noise": double(noise)} if algorithm else {}
        state = scheduler.step(double(output), t, state, **options).prev_sample
        if name == "dpmpp_3m_sde" and third_order(steps, k):
          state = state + third_term_amiss(scheduler, grid, k)
        expected.append(state)
      assert_close(given, expected)


def third_order(steps, k):
  return 2 <= k < steps - (2 if steps < 15 else 1)


def third_term_amiss(scheduler, grid, k):
  """What the reference's third term of the stochastic equation lacks, by its own names.

  It has -1/2 where the limit of small steps needs 1/2 (as its deterministic twin and the solver's
  first publication, k-diffusion, have it), so that the term would not vanish with the step.
  """
  half, (m2, m1, m0) = grid.half_log_snr, scheduler.model_outputs
  h, h_0, h_1 = half[k + 1] - half[k], half[k] - half[k - 1], half[k - 1] - half[k - 2]
  second = (h / h_0 * (m0 - m1) - h / h_1 * (m1 - m2)) / ((h_0 + h_1) / h)
  return grid.alpha[k + 1] * second
