"""Runs of our solvers and of diffusers' schedulers, to be compared point by point.

Both walk the whole way on the same network outputs and the same noise, and every point on it is
compared. The reference keeps its tables in float32, which at the first times holds 4 digits of
1 - alpha^2; they are computed again here, by its own formulas in float64.
"""

import dataclasses
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")
diffusers = pytest.importorskip(
  "diffusers", reason="the reference needs diffusers: install t2i_jax[parity]"
)

from t2i_jax.diffusion import solvers, thresholding  # noqa: E402
from t2i_jax.diffusion.grid import make_grid  # noqa: E402
from t2i_jax.diffusion.parameterization import make_parameterization  # noqa: E402
from t2i_jax.diffusion.schedules import make_process  # noqa: E402
from t2i_jax.diffusion.solvers.table import POINT  # noqa: E402

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
COUNTS = (1, 2, 4, 10, 20, 50)
SHAPE = (2, 4, 4, 3)
LONGEST, SEEN = 99, []  # evaluations, of Heun's 50 steps
LEADING = {"spacing": "leading", "offset": 1}
TRAILING = {"spacing": "trailing"}
LINSPACE = {"spacing": "linspace"}
KARRAS = {"spacing": "karras"}


# Every prediction with every schedule and with every spacing.
SQUARE = [
  pytest.param(schedule, spacing, prediction, id=f"{schedule}-{spacing['spacing']}-{prediction}")
  for i, schedule in enumerate(SCHEDULES)
  for j, spacing in enumerate((TRAILING, LEADING, LINSPACE, KARRAS))
  for prediction in [list(PREDICTIONS)[(i + j) % 3]]
]


def double(x):
  return torch.from_numpy(np.array(x, np.float64))


def draw(seed):
  return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def scheduler_of(kind, schedule, spacing=None, **options):
  """A scheduler of diffusers with the tables of its process in float64."""
  given = {}
  if spacing is not None:
    given = {"timestep_spacing": spacing["spacing"], "steps_offset": spacing.get("offset", 0)}
    if spacing is KARRAS:
      given = {"timestep_spacing": "linspace", "use_karras_sigmas": True}
  if schedule == "scaled_linear":
    given |= {"beta_start": 8.5e-4, "beta_end": 0.012}
  scheduler = kind(beta_schedule=SCHEDULES[schedule], **given, **options)
  if scheduler.config.get("rescale_betas_zero_snr"):
    scheduler.alphas_cumprod = double(
      make_process(schedule, zero_terminal_snr=True).alphas_cumprod
    )
  else:
    scheduler.alphas_cumprod = double(make_process(schedule).alphas_cumprod)
  scheduler.alphas = scheduler.alphas_cumprod.clone()
  scheduler.alphas[1:] /= scheduler.alphas_cumprod[:-1]
  scheduler.betas = 1.0 - scheduler.alphas
  if not scheduler.config.get("set_alpha_to_one", True):
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
  return scheduler


def outputs_of(evaluations, seed):
  return [draw((seed, k)) for k in range(evaluations)]


@partial(jax.jit, static_argnames=("prediction", "clip", "data"))
def solved(table, x, outputs, keys, prediction, clip, data):
  """`solve`, which also hands out all points that the network was asked at, to SEEN."""
  kind = make_parameterization(prediction, data)

  def predict(point, row, memory):
    k, points = memory
    points = points.at[k].set(point)
    jax.lax.cond(k == LONGEST - 1, lambda: jax.debug.callback(SEEN.append, points), lambda: None)
    prediction = kind.predict(point, outputs[k], row.alpha, row.sigma)
    if clip:
      prediction = thresholding.static(prediction, point, row.alpha, row.sigma)
    return solvers.Evaluation(*prediction), (k + 1, points)

  return solvers.solve(table, predict, x, keys, (jnp.int32(0), jnp.zeros((LONGEST, *SHAPE))))


def ours(prediction, solver, grid, x, outputs, keys, clip=False, data=0.5):
  """Every point that the network is asked at, and the last, K + 1 of them."""
  table, count = solver(grid), len(outputs)
  assert table.evaluations == count
  # Rows that change nothing, so that all numbers of steps are one program.
  still = np.zeros((LONGEST - count, table.point.shape[1]))
  still[:, POINT] = 1.0
  table = dataclasses.replace(
    table, rows=solvers.Row(*(np.pad(x, (0, len(still)), constant_values=1) for x in table.rows)),
    point=np.concatenate([table.point, still]),
    base=None if table.base is None else np.concatenate([table.base, still]),
    shift=None,
  )
  table = jax.tree.map(np.float32, table)
  outputs = np.concatenate([outputs, np.zeros((len(still), *SHAPE), np.float32)])
  SEEN.clear()
  end = solved(table, x, outputs, keys, prediction, clip, data)
  jax.effects_barrier()
  return [*np.asarray(SEEN[0])[:count], np.asarray(end)]


def assert_close(given, expected, tolerance=1e-5):
  """Largest error of each point, relative to its largest value."""
  for k, (point, reference) in enumerate(zip(given, expected, strict=True)):
    reference = np.asarray(reference, np.float64)
    assert np.all(np.isfinite(point)), k
    error = np.abs(point - reference).max() / np.abs(reference).max()
    assert error <= tolerance, f"point {k}: {error}"


def patch_noise(monkeypatch, scheduler, noises):
  """Makes the reference draw these, one a call."""
  module, left = sys.modules[type(scheduler).__module__], iter(noises)
  monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: double(next(left)), raising=False)


@jax.jit
def all_noises(keys):
  return jax.vmap(lambda k: solvers.step_noise(keys, k, SHAPE[1:]))(jnp.arange(LONGEST))


def noises_of(keys, count):
  return np.asarray(all_noises(keys))[:count]


def walk(scheduler, x, outputs, **options):
  """The reference's points of a process that it scales as we do."""
  x, points = double(x), [x]
  for t, output in zip(scheduler.timesteps, outputs, strict=True):
    x = scheduler.step(double(output), t, x, **options).prev_sample
    points.append(x.numpy())
  return points


def k_walk(scheduler, alpha, x, outputs, **options):
  """The same of one that works on x / alpha; `alpha` [K + 1] of each point."""
  scaled, points = double(x) / alpha[0], [x]
  for t, output, scale in zip(scheduler.timesteps, outputs, alpha[1:], strict=True):
    scheduler.is_scale_input_called = True
    scaled = scheduler.step(double(output), t, scaled, **options).prev_sample
    points.append(scaled.numpy() * scale)
  return points


def set_ratios(scheduler, process, steps, repeats=False):
  """Sets the steps, and sigma / alpha of the reference's own times in float64."""
  scheduler.set_timesteps(steps)
  scheduler.set_begin_index(0)  # its search for a time fails where two are the same
  count = len(scheduler.sigmas) - 1
  if not scheduler.config.get("use_karras_sigmas"):
    ratios = np.interp(scheduler.timesteps.numpy(), np.arange(process.steps),
                       process.ratio(np.arange(process.steps)))
  else:
    ends = process.ratio(np.array([process.last, 0])) ** (1 / 7)
    ratios = (ends[0] + np.linspace(0, 1, steps) * (ends[1] - ends[0])) ** 7
  if repeats:
    ratios = np.append(ratios[:1], np.repeat(ratios[1:], 2)) if len(ratios) == steps else ratios
  assert len(ratios) == count
  np.testing.assert_allclose(scheduler.sigmas[:-1], ratios, rtol=2e-3)
  scheduler.sigmas = torch.cat([double(ratios), scheduler.sigmas[-1:].double()])


def case(schedule, name, spacing, steps, options=None, **process_options):
  """Process, solver, grid, start and keys of a run."""
  process = make_process(schedule, **process_options)
  solver = solvers.make_solver(name, **(options or {}))
  grid = make_grid(process, steps, convention=solver.convention, **spacing)
  keys = jax.random.split(jax.random.key(steps), SHAPE[0])
  return process, solver, grid, draw((steps, 7)), keys


def alphas_of(grid, twice=False):
  """alpha of each point; of Heun's, each but the first and the last is evaluated `twice`."""
  inner = np.repeat(grid.alpha[1:-1], 2) if twice else grid.alpha[1:-1]
  return np.concatenate([grid.alpha[:1], inner, grid.alpha[-1:]])
