import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion.parameterization import Prediction, noise_of
from t2i_jax.diffusion.process import CLEAN, cosine, linear
from t2i_jax.diffusion.solvers import (
  DDIM,
  Ancestral,
  make_solver,
  noise_like,
  solve,
  spaced_times,
  thresholded,
)
from t2i_jax.errors import UserError

PROCESS = linear()
SOLVERS = [Ancestral("small"), Ancestral("large"), DDIM(0.0), DDIM(0.5)]
NAMES = ["small", "large", "ddim", "ddim-0.5"]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=NAMES)


def exact_denoiser(mean, deviation, process=PROCESS):
  """E[x_0 | x_t] of data N(mean, deviation^2), and the noise that goes with it."""

  def predict(x, t):
    alpha, sigma = process.alpha(t), process.sigma(t)
    variance = alpha**2 * deviation**2 + sigma**2
    x_0 = (alpha * deviation**2 * x + sigma**2 * mean) / variance
    return Prediction(x_0, noise_of(x, x_0, alpha, sigma))

  return predict


def draw(solver, predict, steps, shape=(1024,), rows=8, process=PROCESS, seed=0):
  keys = jax.random.split(jax.random.key(seed), rows)
  return jax.jit(lambda keys: solve(solver, process, predict, keys, shape, steps))(keys)


def start_of(keys, shape):
  """The noise from which `solve` starts: with no network, DDIM of one step returns it."""
  given_back = lambda x, t: Prediction(x, jnp.zeros_like(x))  # noqa: E731
  return solve(DDIM(), PROCESS, given_back, keys, shape, 1)


def test_ddim_converges_to_the_exact_flow():
  # The ODE of which DDIM is a discretisation (Song et al. 2021a, section 4.3) moves each point to
  # the same quantile; for normal data that is an affine map, so each sample has a right answer.
  mean, deviation = 0.5, 0.3
  start = start_of(jax.random.split(jax.random.key(0), 8), (1024,))
  last = PROCESS.steps - 1
  alpha, sigma = PROCESS.alpha(last), PROCESS.sigma(last)
  marginal = jnp.sqrt(alpha**2 * deviation**2 + sigma**2)
  expected = mean + deviation * (start - alpha * mean) / marginal
  errors = [
    np.abs(draw(DDIM(), exact_denoiser(mean, deviation), steps) - expected).max()
    for steps in (100, 1000)
  ]
  assert errors[1] < 0.03 * deviation
  # First order: a tenth of the stride, a tenth of the error.
  assert 6 < errors[0] / errors[1] < 15


@each_solver
def test_every_solver_reaches_the_data(solver):
  # 8,192 draws: standard error of the mean 0.0033, of the deviation 0.0023.
  x = draw(solver, exact_denoiser(0.5, 0.3), 500)
  np.testing.assert_allclose(x.mean(), 0.5, atol=0.014)
  np.testing.assert_allclose(x.std(), 0.3, atol=0.012)


def test_the_large_variance_is_exact_for_standard_normal_data():
  # Ho et al. 2020, section 3.2; in any number of steps, but for the last, which adds no noise.
  x = draw(Ancestral("large"), exact_denoiser(0.0, 1.0), 4)
  last = PROCESS.alpha(int(spaced_times(1000, 4)[-2]))
  np.testing.assert_allclose(x.std() / last, 1.0, atol=0.04)


def test_the_small_variance_is_exact_for_one_picture():
  x = draw(Ancestral("small"), exact_denoiser(0.7, 0.0), 3)
  np.testing.assert_allclose(x, 0.7, rtol=1e-5)


def test_small_variance_loses_width_where_large_keeps_it():
  # What tells the two apart in few steps.
  small, large = (draw(Ancestral(v), exact_denoiser(0.0, 1.0), 4).std() for v in ("small", "large"))
  assert small < 0.95 * large


@each_solver
def test_the_last_step_is_the_predicted_picture(solver):
  x, x_0 = np.random.default_rng(1).normal(size=(2, 2, 4, 4, 3)).astype("f4")
  t = jnp.asarray(20)
  predict = lambda x, t: Prediction(x_0, noise_of(x, x_0, PROCESS.alpha(t), PROCESS.sigma(t)))  # noqa: E731
  keys = jax.random.split(jax.random.key(2), 2)
  out, _ = solver.step(predict, PROCESS, x, solver.init(x), t, jnp.asarray(CLEAN), keys)
  np.testing.assert_allclose(out, x_0, rtol=1e-6)


# From the cosine process's last step almost all is fresh noise: what is left of the old is small
# beside what it is the difference of.
@pytest.mark.parametrize(
  "process, t, s",
  [(PROCESS, 999, 900), (PROCESS, 40, 39), (PROCESS, 1, 0), (cosine(), 999, 748)],
)
def test_ddim_with_eta_one_is_ancestral(process, t, s):
  # Song et al. 2021a, section 4.1.
  x = np.random.default_rng(3).normal(size=(2, 16)).astype("f4")
  keys = jax.random.split(jax.random.key(4), 2)
  steps = [
    solver.step(
      exact_denoiser(0.1, 0.5, process), process, x, (), jnp.asarray(t), jnp.asarray(s), keys
    )[0]
    for solver in (DDIM(1.0), Ancestral("small"))
  ]
  np.testing.assert_allclose(*steps, atol=2e-5)


@pytest.mark.parametrize("solver", [Ancestral(), DDIM(0.5)], ids=["ancestral", "ddim"])
def test_a_picture_depends_on_its_key_alone(solver):
  keys = jax.random.split(jax.random.key(5), 3)
  predict = exact_denoiser(0.2, 0.4)
  run = jax.jit(lambda keys: solve(solver, PROCESS, predict, keys, (4, 4, 1), 5))
  together, alone = run(keys), run(keys[1:2])
  np.testing.assert_allclose(together[1:2], alone, atol=1e-6)
  assert np.abs(together[0] - together[1]).max() > 0.1


def test_every_step_draws_its_own_noise():
  class Recorder:
    """Keeps the noise of step i in row i of x; the last row still holds the start."""

    def init(self, x):
      return jnp.int32(0)

    def step(self, predict, process, x, i, t, s, keys):
      return x.at[:, i].set(noise_like(keys, x)[:, i]), i + 1

  keys = jax.random.split(jax.random.key(6), 2)
  streams = solve(Recorder(), PROCESS, None, keys, (4, 1000), 3).reshape(8, 1000)
  np.testing.assert_allclose(np.corrcoef(streams), np.eye(8), atol=0.15)


def test_the_carry_reaches_the_next_step():
  class Multistep:
    """Remembers how often the network was called."""

    def init(self, x):
      return jnp.zeros(len(x))

    def step(self, predict, process, x, carry, t, s, keys):
      return jnp.where(s == CLEAN, carry[:, None], x), carry + 1

  keys = jax.random.split(jax.random.key(7), 2)
  np.testing.assert_array_equal(solve(Multistep(), PROCESS, None, keys, (3,), 6), 5.0)


def test_solve_visits_the_spaced_times():
  class Visits:
    def init(self, x):
      return ()

    def step(self, predict, process, x, carry, t, s, keys):
      return jnp.where(t == 999, 0.0, x) + t * 1000.0 + s, carry

  keys = jax.random.split(jax.random.key(8), 1)
  times = spaced_times(1000, 3)
  x = solve(Visits(), PROCESS, None, keys, (1,), 3)
  assert times.tolist() == [999, 666, 332, -1]
  assert float(x[0, 0]) == np.sum(times[:-1] * 1000.0 + times[1:])


@pytest.mark.parametrize("process_steps", [2, 7, 50, 1000])
def test_spaced_times_visit_both_ends_and_no_time_twice(process_steps):
  for steps in range(1, process_steps + 1):
    times = spaced_times(process_steps, steps)
    assert times.dtype == np.int32 and len(times) == steps + 1
    assert times[0] == process_steps - 1 and times[-1] == CLEAN
    strides = -np.diff(times)
    assert strides.min() >= 1 and strides.max() - strides.min() <= 2


def test_all_steps_are_the_process():
  np.testing.assert_array_equal(spaced_times(50, 50), np.arange(49, -2, -1))


def test_thresholding_clips_x_0_and_keeps_x_t():
  x = jnp.array([[3.0, 0.1, -2.0]])
  alpha, sigma = jnp.float32(0.8), jnp.float32(0.6)
  prediction = Prediction(jnp.array([[2.0, 0.3, -1.5]]), jnp.zeros((1, 3)))
  x_0, noise = thresholded(prediction, x, alpha, sigma)
  np.testing.assert_allclose(x_0, [[1.0, 0.3, -1.0]])
  np.testing.assert_allclose(alpha * x_0 + sigma * noise, x, atol=1e-6)


def test_clipping_keeps_the_cosine_process_finite():
  # alpha is 5e-5 at its last step: x_0 of a predicted noise is 20,000 times that noise's error.
  process = cosine()

  def predict(x, t):
    alpha, sigma = process.alpha(t), process.sigma(t)
    return thresholded(Prediction((x - sigma * 0.9 * x) / alpha, x), x, alpha, sigma)

  x = draw(DDIM(), predict, 10, shape=(8,), rows=2, process=process)
  assert np.abs(x).max() <= 1.0


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: make_solver("dimm"), "did you mean 'ddim'"),
    (lambda: make_solver("ddpm", variance="smal"), "did you mean 'small'"),
    (lambda: make_solver("ddim", eta=1.5), "outside 0 to 1"),
    (lambda: spaced_times(10, 11), "steps=11 is outside 1 to 10"),
    (lambda: spaced_times(10, 0), "steps=0"),
  ],
)
def test_what_cannot_be_solved_is_one_line(make, message):
  with pytest.raises(UserError, match=message):
    make()
