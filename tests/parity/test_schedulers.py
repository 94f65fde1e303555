"""Our processes and solvers against diffusers' schedulers, one step at a time.

The reference keeps its tables in float32, which at the first times holds 4 digits of
1 - alpha^2. Its tables are therefore computed again here, by its own formula in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")
diffusers = pytest.importorskip(
  "diffusers", reason="the reference needs diffusers: install t2i_jax[parity]"
)

from diffusers.schedulers import scheduling_ddpm  # noqa: E402

from t2i_jax.diffusion.parameterization import make_parameterization  # noqa: E402
from t2i_jax.diffusion.process import make_process  # noqa: E402
from t2i_jax.diffusion.solvers import (  # noqa: E402
  DDIM,
  Ancestral,
  noise_like,
  spaced_times,
  thresholded,
)

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
# Counts that divide 1000: for others the reference's DDIM takes strides of 1000 // n, which are
# not those between its own times, and does not end at the clean picture.
COUNTS = (1, 4, 10, 50, 250, 1000)
SHAPE = (2, 4, 4, 3)


def reference(kind, schedule, **options):
  """A scheduler of diffusers with its tables in float64."""
  scheduler = kind(
    beta_schedule=SCHEDULES[schedule], timestep_spacing="trailing", **options
  )
  scheduler.alphas = 1.0 - scheduler.betas.double()
  scheduler.alphas_cumprod = torch.cumprod(scheduler.alphas, dim=0)
  return scheduler


def draw(seed):
  return np.random.default_rng(seed).normal(size=SHAPE).astype(np.float32)


def double(x):
  return torch.from_numpy(np.array(x, np.float64))


def assert_close(ours, theirs):
  """Largest error, relative to the largest value, at most 1e-5."""
  theirs = theirs.numpy()
  assert np.all(np.isfinite(ours))
  assert np.abs(np.asarray(ours) - theirs).max() <= 1e-5 * np.abs(theirs).max()


def visited(steps):
  """Neighbouring times of a run, those where things go wrong: the ends, and one within."""
  times = spaced_times(1000, steps)
  for i in sorted({0, 1, steps // 2, steps - 2, steps - 1} & set(range(steps))):
    yield int(times[i]), int(times[i + 1])


def check(solver, schedule, prediction, clip, step):
  """Every visited step of every count of steps, by our solver and by `step` of the reference."""
  process, kind = make_process(schedule, 1000), make_parameterization(prediction)
  for steps in COUNTS:
    for t, s in visited(steps):
      x, output = draw((steps, t, 0)), draw((steps, t, 1))

      def predict(x, t, output=output):
        alpha, sigma = process.alpha(t), process.sigma(t)
        given = kind.predict(x, output, alpha, sigma)
        return thresholded(given, x, alpha, sigma) if clip else given

      keys = jax.random.split(jax.random.key(t), SHAPE[0])
      ours, _ = solver.step(predict, process, jnp.asarray(x), (), jnp.asarray(t), jnp.asarray(s),
                            keys)
      assert_close(ours, step(steps, double(output), t, double(x), double(noise_like(keys, x))))


@pytest.mark.parametrize("kind", [diffusers.DDPMScheduler, diffusers.DDIMScheduler])
def test_times_are_those_of_trailing_spacing(kind):
  # The reference sums up strides in floating point. Where that matters ours differ: times that
  # fall between two steps (48 steps), and an extra one, the clean end, after the last (61 steps).
  scheduler = kind(timestep_spacing="trailing")
  for steps in (1, 2, 3, 7, 16, 25, 50, 99, 100, 333, 600, 999, 1000):
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == spaced_times(1000, steps)[:-1].tolist(), steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_process_is_the_references(schedule):
  process = make_process(schedule, 1000)
  scheduler = reference(diffusers.DDPMScheduler, schedule)
  # Its betas are still float32, which is felt where one is nearly 1.
  np.testing.assert_allclose(process.alphas_cumprod, scheduler.alphas_cumprod, rtol=3e-5)
  np.testing.assert_allclose(1 - process.alphas_cumprod, 1 - scheduler.alphas_cumprod, rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_corruption_and_the_velocity_are_the_references(schedule):
  process, scheduler = make_process(schedule, 1000), reference(diffusers.DDPMScheduler, schedule)
  x_0, noise = draw(0), draw(1)
  for times in ([0, 1], [500, 999]):
    t = jnp.array(times)
    given = double(x_0), double(noise), torch.tensor(times)
    assert_close(process.corrupt(x_0, noise, t), scheduler.add_noise(*given))
    alpha, sigma = (f(t)[:, None, None, None] for f in (process.alpha, process.sigma))
    v = make_parameterization("v").target(x_0, noise, alpha, sigma)
    assert_close(v, scheduler.get_velocity(*given))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim(schedule, prediction, eta, clip):
  scheduler = reference(
    diffusers.DDIMScheduler, schedule, prediction_type=PREDICTIONS[prediction], clip_sample=clip
  )

  def step(steps, output, t, x, noise):
    scheduler.set_timesteps(steps)
    # Like ours, the noise is that of the clipped picture.
    return scheduler.step(
      output, t, x, eta=eta, use_clipped_model_output=clip,
      variance_noise=noise if eta else None,
    ).prev_sample

  check(DDIM(eta), schedule, prediction, clip, step)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddpm(schedule, prediction, variance, clip, monkeypatch):
  scheduler = reference(
    diffusers.DDPMScheduler, schedule, prediction_type=PREDICTIONS[prediction],
    variance_type=f"fixed_{variance}", clip_sample=clip,
  )

  def step(steps, output, t, x, noise):
    scheduler.set_timesteps(steps)
    # In fewer steps than the process has, the reference's large variance adds noise to the very
    # last picture too; Ho et al. 2020, algorithm 2, does not.
    last = t == scheduler.timesteps[-1]
    noise = torch.zeros_like(noise) if last else noise
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise)
    return scheduler.step(output, t, x).prev_sample

  check(Ancestral(variance), schedule, prediction, clip, step)
