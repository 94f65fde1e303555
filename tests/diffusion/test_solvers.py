from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion import solvers, thresholding
from t2i_jax.diffusion.continuous import resolution_shift
from t2i_jax.diffusion.grid import Grid, make_grid
from t2i_jax.diffusion.parameterization import Prediction, noise_of
from t2i_jax.diffusion.schedules import make_process
from t2i_jax.diffusion.solvers import SOLVERS, Evaluation, make_solver, solve, start_noise
from t2i_jax.errors import UserError

PROCESSES = {
  "linear": make_process("linear"), "zero": make_process("scaled_linear", zero_terminal_snr=True),
  "vp": make_process("vp"), "edm": make_process("edm"), "flow": make_process("flow"),
}
STOCHASTIC = ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde")
NAMES = sorted(SOLVERS)


def process_of(name):
  return PROCESSES["flow" if SOLVERS[name].of_flow else "linear"]


@cache
def exact(mean, deviation):
  """E[x_0 | x_t] of data N(mean, deviation^2), and the noise that goes with it."""

  def predict(x, row, memory):
    variance = row.alpha**2 * deviation**2 + row.sigma**2
    x_0 = (row.alpha * deviation**2 * x + row.sigma**2 * mean) / variance
    # Not from their difference, which loses its digits near the picture.
    noise = row.sigma * (x - row.alpha * mean) / variance
    return Evaluation(x_0, noise), memory

  return predict


def grid_of(solver, process, steps, **options):
  return make_grid(process, steps, convention=solver.convention, **options)


# One program for all tables of one form.
SOLVE = jax.jit(solve, static_argnames=("predict",))
START = jax.jit(start_noise, static_argnames=("shape",))


def drawn(table, deviation, keys, predict, shape):
  start = np.float32(deviation) * START(keys, shape)
  return SOLVE(jax.tree.map(np.float32, table), predict, start, keys), start


def draw(solver, process, predict, steps, shape=(1024,), rows=8, seed=0):
  """Samples, and the start that they came from."""
  grid, keys = grid_of(solver, process, steps), jax.random.split(jax.random.key(seed), rows)
  return drawn(solver(grid), grid.deviation, keys, predict, shape)


def flowed(start, first, last, mean, deviation):
  """Where the probability flow takes a point of one row by another: to the same quantile."""
  spread = lambda row: np.hypot(row.alpha * deviation, row.sigma)  # noqa: E731
  share = (np.asarray(start, np.float64) - first.alpha * mean) / spread(first)
  return last.alpha * mean + spread(last) * share


def whole(process, steps, **options):
  """The rows of a grid's ends."""
  grid = make_grid(process, steps, **options)
  return [solvers.Row(grid.times[k], grid.alpha[k], grid.sigma[k]) for k in (0, -1)]


def walked(table, first, last, start, mean, deviation):
  """Rows [first, last) of a table that draws nothing, begun on the flow, in float64.

  Returns:
    What the network would be asked at in row `last`, and what it should be asked at.
  """
  rows = [solvers.Row(*(x[k] for x in table.rows)) for k in range(table.evaluations)]
  points = [flowed(start, rows[0], row, mean, deviation) for row in rows]
  said = lambda point, row: exact(mean, deviation)(point, row, ())[0]  # noqa: E731
  of = lambda given: given.noise if table.of_noise else given.x_0  # noqa: E731
  history = [of(said(points[first - j], rows[first - j])) for j in range(1, table.history)]
  point, base = points[first], points[first - 1]
  for k in range(first, last):
    given = said(point, rows[k])
    history = [of(given), *history][: table.history]
    terms = np.stack([base, point, np.zeros_like(point), given.noise, *history])
    point = table.point[k] @ terms
    base = point if table.base is None else table.base[k] @ terms
  return point, points[last]


ORDERS = {
  "ddim": 1, "euler": 1, "flow_euler": 1, "heun": 2, "flow_heun": 2, "dpmpp_2m": 2,
  "plms": 2,  # Liu et al. 2022a, theorem 4.1: the mean of noises is not that over sigma / alpha
  # Published with half of its third term, see `multistep.dpmpp`.
  "dpmpp_3m": 2,
  # The corrector gains an order over the predictor (Zhao et al. 2023, theorem 3.1).
  "unipc": 3, "unipc-3": 4,
}


@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_convergence(name):
  # Of the steps within a run: those at its ends are of lower order.
  short, _, order = name.partition("-")
  solver = make_solver(short, order=int(order or 2))
  process, times = (
    (PROCESSES["flow"], (0.9, 0.3)) if solver.of_flow else (PROCESSES["vp"], (0.7, 0.3))
  )
  start, errors = np.linspace(-1.5, 1.5, 16), []
  stride = 2 if "heun" in name else 1
  for steps in (64, 128):
    at = np.linspace(*times, steps + 1)
    grid = Grid(at, process.alpha(at), process.sigma(at))
    # The same stretch of time at every number of steps.
    first, last = stride * steps // 8, stride * steps * 7 // 8
    given, expected = walked(solver(grid), first, last, start, 0.5, 0.3)
    errors.append(np.abs(given - expected).max())
  assert abs(np.log2(errors[0] / errors[1]) - ORDERS[name]) < 0.25, errors


@pytest.mark.parametrize("name", [name for name in NAMES if name not in STOCHASTIC])
def test_deterministic_solvers_follow_the_flow(name):
  # Up to the clean end, on the device.
  solver, process = make_solver(name), process_of(name)
  x, start = draw(solver, process, exact(0.5, 0.3), 100)
  expected = flowed(start, *whole(process, 100, convention=solver.convention), 0.5, 0.3)
  few, start = draw(solver, process, exact(0.5, 0.3), 10)
  np.testing.assert_allclose(x, expected, atol=0.2 * 0.3)
  assert np.abs(x - expected).mean() < 0.4 * np.abs(few - expected).mean()


@pytest.mark.parametrize("name", NAMES)
def test_every_solver_reaches_the_data(name):
  # 8,192 draws: standard error of the mean 0.0033, of the deviation 0.0023.
  options = {"eta": 0.5} if name == "ddim" else {}
  x, _ = draw(make_solver(name, **options), process_of(name), exact(0.5, 0.3), 500)
  np.testing.assert_allclose(x.mean(), 0.5, atol=0.014)
  np.testing.assert_allclose(x.std(), 0.3, atol=0.012)


@pytest.mark.parametrize("process", ["zero", "vp", "edm", "flow"])
@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_3m_sde", "unipc"])
def test_every_process_is_walked_back(process, name):
  x, _ = draw(make_solver(name), PROCESSES[process], exact(0.5, 0.3), 300)
  np.testing.assert_allclose(x.mean(), 0.5, atol=0.014)
  np.testing.assert_allclose(x.std(), 0.3, atol=0.02)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("process", ["linear", "zero", "vp", "edm", "flow"])
def test_coefficients_are_finite_and_few_steps_end_in_a_picture(process, name, steps):
  solver = SOLVERS[name]
  if solver.of_flow != (process == "flow") or (solver.needs_alpha and process == "zero"):
    return
  grid = grid_of(solver, PROCESSES[process], steps)
  table = solver(grid)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(table))
  assert table.evaluations == steps + {"heun": steps - 1, "flow_heun": steps - 1,
                                       "plms": steps > 1}.get(name, 0) - (
    name == "heun" and steps > 1 and grid.alpha[0] == 0
  )
  if name == "plms" and steps > 1:
    return  # Its trial step reads noise where there is none left, and takes it for half of all.
  # Of one picture every solver knows the answer.
  x, _ = draw(solver, PROCESSES[process], exact(0.7, 0.0), steps, shape=(8,), rows=2)
  np.testing.assert_allclose(x, 0.7, rtol=2e-3)


def test_the_large_variance_is_exact_for_standard_normal_data():
  # Ho et al. 2020, section 3.2; in any number of steps, but for the last, which adds no noise.
  solver = make_solver("ddpm", variance="large")
  x, _ = draw(solver, PROCESSES["linear"], exact(0.0, 1.0), 4)
  last = make_grid(PROCESSES["linear"], 4).alpha[-2]
  np.testing.assert_allclose(x.std() / last, 1.0, atol=0.04)


def test_small_variance_loses_width_where_large_keeps_it():
  # What tells the two apart in few steps.
  small, large = (
    draw(make_solver("ddpm", variance=v), PROCESSES["linear"], exact(0.0, 1.0), 4)[0].std()
    for v in ("small", "large")
  )
  assert small < 0.95 * large


@pytest.mark.parametrize("share, name", [(0.0, "small"), (1.0, "large")])
def test_a_learned_variance_lies_between_the_two(share, name):
  def predict(x, row, memory):
    evaluation, memory = exact(0.5, 0.3)(x, row, memory)
    return evaluation._replace(variance=jnp.full_like(x, share)), memory

  learned, fixed = (
    draw(make_solver("ddpm", variance=v), PROCESSES["linear"], predict, 5)[0]
    for v in ("learned", name)
  )
  np.testing.assert_allclose(learned, fixed, atol=1e-5)


def test_a_learned_variance_that_is_not_learned_is_one_line():
  with pytest.raises(UserError, match="needs a network that predicts it"):
    draw(make_solver("ddpm", variance="learned"), PROCESSES["linear"], exact(0.5, 0.3), 2)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_2m", "unipc", "heun"])
def test_a_guide_moves_samples_to_what_it_knows(name):
  # Of data N(0, 1) a guide that observed y = x_0 + N(0, 1): the posterior has half the variance
  # around y / 2. Its log-probability at x_t is that of x_0's posterior given x_t.
  y = 1.5

  def predict(x, row, memory):
    evaluation, memory = exact(0.0, 1.0)(x, row, memory)
    size = row.alpha**2 + row.sigma**2
    spread = 1.0 + row.sigma**2 / size  # of y given x_t
    gradient = row.alpha / size * (y - evaluation.x_0) / spread
    return evaluation._replace(gradient=gradient), memory

  for process in ("linear", "zero", "flow"):
    x, _ = draw(make_solver(name), PROCESSES[process], predict, 500)
    np.testing.assert_allclose(x.mean(), y / 2, atol=0.04)
    np.testing.assert_allclose(x.std(), 0.5**0.5, atol=0.04)


@pytest.mark.parametrize("first, second", [
  (make_solver("ddim", eta=1.0), make_solver("ddpm")),  # Song et al. 2021a, section 4.1
  (make_solver("ddim", eta=1.0), make_solver("euler_ancestral")),
  (make_solver("ddim"), make_solver("euler")),
  (make_solver("ddim"), make_solver("dpmpp_2m")),
  (make_solver("ddpm"), make_solver("dpmpp_2m_sde")),
], ids=lambda solver: solver.name)
def test_solvers_that_are_one(first, second):
  # Those of higher order begin with the first.
  for process in PROCESSES.values():
    grid = make_grid(process, 8, "trailing")
    tables = [jax.tree.map(lambda x: x[:1], solver(grid)) for solver in (first, second)]
    width = min(table.point.shape[1] for table in tables)
    ours, theirs = (table.point[:, :width] for table in tables)
    np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_depends_on_its_key_alone(name):
  solver, process = make_solver(name), process_of(name)
  keys, grid = jax.random.split(jax.random.key(5), 3), grid_of(solver, process, 5)
  table = solver(grid)
  together, alone = (
    drawn(table, grid.deviation, k, exact(0.2, 0.4), (4, 4, 1))[0] for k in (keys, keys[1:2])
  )
  np.testing.assert_allclose(together[1:2], alone, atol=1e-5)
  assert np.abs(together[0] - together[1]).max() > 0.1


def test_every_step_draws_its_own_noise():
  keys = jax.random.split(jax.random.key(6), 2)
  streams = np.concatenate([
    start_noise(keys, (1000,)), *(solvers.step_noise(keys, i, (1000,)) for i in range(3))
  ])
  np.testing.assert_allclose(np.corrcoef(streams), np.eye(8), atol=0.15)
  # And these are the draws of `solve`.
  grid = make_grid(PROCESSES["linear"], 3)
  table = make_solver("ddpm")(grid)
  predict = lambda x, row, memory: (Evaluation(jnp.zeros_like(x), x), memory)  # noqa: E731
  x = np.asarray(start_noise(keys, (1000,)), np.float64)
  given = solve(jax.tree.map(lambda a: a[:2], table), predict, jnp.asarray(x, jnp.float32), keys)
  for k in range(2):
    x = table.point[k, 1] * x + table.point[k, 2] * solvers.step_noise(keys, k, (1000,))
  np.testing.assert_allclose(given, x, atol=1e-5)


def test_solve_evaluates_the_rows_in_order_and_hands_memory_on():
  table = make_solver("heun")(make_grid(PROCESSES["linear"], 3))
  seen = []

  def predict(x, row, memory):
    jax.debug.callback(lambda *a: seen.append([float(v) for v in a]), *row, memory, ordered=True)
    return Evaluation(x, jnp.zeros_like(x)), memory + 1

  solve(table, predict, jnp.ones((1, 2)), jax.random.split(jax.random.key(0), 1), jnp.int32(0))
  jax.effects_barrier()
  expected = np.stack([*table.rows, np.arange(5)], axis=1)
  np.testing.assert_allclose(seen, expected, rtol=1e-6)
  assert table.rows.time.tolist() == [999, 666, 666, 332, 332]


def test_only_what_a_table_needs_is_carried():
  def carried(name):
    table = make_solver(name)(make_grid(PROCESSES["linear"], 8))
    x, keys = jnp.zeros((1, 5, 7)), jax.random.split(jax.random.key(0), 1)
    jaxpr = jax.make_jaxpr(lambda x: solve(table, exact(0.0, 1.0), x, keys))(x)
    scan = next(e for e in jaxpr.jaxpr.eqns if e.primitive.name == "scan")
    drawn = "random_bits" in str(scan) or "threefry" in str(scan)
    pictures = sum(v.aval.shape == (1, 5, 7) for v in scan.outvars)
    return pictures, drawn

  assert carried("ddim") == (1, False)
  assert carried("ddpm") == (1, True)
  assert carried("dpmpp_2m") == (2, False)
  assert carried("dpmpp_3m_sde") == (3, True)
  assert carried("heun") == (3, False)
  assert carried("unipc") == (4, False)


def test_clipping_keeps_the_cosine_process_finite():
  # alpha is 5e-5 at its last step: x_0 of a predicted noise is 20,000 times that noise's error.
  def predict(x, row, memory):
    given = Prediction((x - row.sigma * 0.9 * x) / row.alpha, x)
    return Evaluation(*thresholding.static(given, x, row.alpha, row.sigma)), memory

  x, _ = draw(make_solver("ddim"), make_process("cosine"), predict, 10, shape=(8,), rows=2)
  assert np.abs(x).max() <= 1.0


def test_the_noise_of_a_prediction_is_that_of_its_x_0():
  x, row = jnp.linspace(-1, 1, 5), solvers.Row(*map(jnp.float32, (0.5, 0.6, 0.8)))
  x_0, noise, *_ = exact(0.5, 0.3)(x, row, ())[0]
  np.testing.assert_allclose(noise, noise_of(x, x_0, 0.6, 0.8), atol=1e-6)


def test_resolution_shift_is_the_papers():
  assert resolution_shift(1024, 512) == 2.0


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda: make_solver("dimm"), "did you mean 'ddim'"),
    (lambda: make_solver("ddpm", variance="smal"), "did you mean 'small'"),
    (lambda: make_solver("ddpm", eta=1.5), "eta=1.5 is outside 0 to 1"),
    (lambda: make_solver("ddpm", order=4), "order=4 is neither 2 nor 3"),
    (lambda: SOLVERS["flow_heun"](make_grid(PROCESSES["linear"], 4)), "use 'heun'"),
    (lambda: SOLVERS["flow_euler"](make_grid(PROCESSES["edm"], 4)), "use 'euler'"),
    (lambda: SOLVERS["plms"](make_grid(PROCESSES["zero"], 4)), "alpha is 0"),
  ],
)
def test_what_cannot_be_solved_is_one_line(make, message):
  with pytest.raises(UserError, match=message) as caught:
    make()
  assert "\n" not in str(caught.value)
