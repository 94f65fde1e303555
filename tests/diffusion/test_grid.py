import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion.continuous import shifted
from t2i_jax.diffusion.grid import CONVENTIONS, Grid, make_grid, start_index
from t2i_jax.diffusion.process import CLEAN
from t2i_jax.diffusion.schedules import linear, make_process, scaled_linear
from t2i_jax.errors import UserError

LINEAR = linear()


@pytest.mark.parametrize("process_steps", [25, 50, 1000])
def test_trailing_times_visit_both_ends_and_no_time_twice(process_steps):
  process = linear(process_steps)
  for steps in range(1, process_steps + 1):
    times = make_grid(process, steps).times
    assert times.dtype == np.float64 and len(times) == steps + 1
    assert times[0] == process_steps - 1 and times[-1] == CLEAN
    strides = -np.diff(times)
    assert strides.min() >= 1 and strides.max() - strides.min() <= 2


def test_all_steps_are_the_process():
  np.testing.assert_array_equal(make_grid(linear(50), 50).times, np.arange(49, -2, -1))


@pytest.mark.parametrize("spacing, convention, expected", [
  ("trailing", "ddim", [999, 749, 499, 249, -1]),
  ("trailing", "dpm", [999, 749, 499, 249, -1]),
  ("leading", "ddim", [751, 501, 251, 1, -1]),
  ("leading", "dpm", [801, 601, 401, 201, -1]),
  ("linspace", "ddim", [999, 666, 333, 0, -1]),
  ("linspace", "k", [999, 666, 333, 0, -1]),
  ("linspace", "dpm", [999, 749, 500, 250, -1]),
])
def test_spacings_of_a_discrete_process(spacing, convention, expected):
  # Lin et al. 2024, table 2, and the offset that Stable Diffusion has.
  grid = make_grid(LINEAR, 4, spacing, convention=convention, offset=int(spacing == "leading"))
  assert grid.times.tolist() == expected
  np.testing.assert_allclose(grid.alpha, LINEAR.alpha(grid.times))
  np.testing.assert_allclose(grid.sigma, LINEAR.sigma(grid.times))
  assert grid.alpha[-1] == 1.0 and grid.sigma[-1] == 0.0


def test_only_the_k_convention_stops_between_steps():
  for convention in CONVENTIONS:
    for spacing in ("linspace", "karras"):
      times = make_grid(LINEAR, 7, spacing, convention=convention).times
      assert np.all(times == np.round(times)) == (convention != "k")


@pytest.mark.parametrize("process", [scaled_linear(), make_process("edm")])
def test_karras_is_the_papers(process):
  grid = make_grid(process, 5, "karras", convention="k")
  ends = process.sigma(np.array([process.last, process.first], float))
  ends = ends / process.alpha(np.array([process.last, process.first], float))
  roots = (grid.sigma / grid.alpha)[:-1] ** (1 / 7)
  np.testing.assert_allclose(roots, np.linspace(*ends ** (1 / 7), 5), rtol=1e-9)
  np.testing.assert_allclose(process.sigma(grid.times[:1]), grid.sigma[:1], rtol=1e-6)
  straight = make_grid(process, 5, "karras", convention="k", rho=1.0)
  np.testing.assert_allclose(np.diff((straight.sigma / straight.alpha)[:-1], 2), 0, atol=1e-9)


def test_what_goes_with_a_process():
  flow, vp, edm = (make_process(name) for name in ("flow", "vp", "edm"))
  np.testing.assert_allclose(make_grid(flow, 4).times, [1, 0.75, 0.5, 0.25, 0])
  np.testing.assert_allclose(make_grid(vp, 3).times, [1, 0.5005, 1e-3, 0])
  np.testing.assert_allclose(make_grid(edm, 3).times[[0, 2, 3]], [80, 0.002, 0])
  np.testing.assert_allclose(make_grid(edm, 4, "trailing").times[:-1],
                             0.002 * 40_000 ** np.array([1, 0.75, 0.5, 0.25]))
  np.testing.assert_allclose(make_grid(flow, 4, "linspace").times[3:], [1e-3, 0])


def test_a_flow_is_shifted_once():
  grid = make_grid(make_process("flow", shift=3.0), 4)
  np.testing.assert_allclose(grid.times, shifted(np.array([1, 0.75, 0.5, 0.25, 0]), 3.0))
  np.testing.assert_allclose(grid.sigma, grid.times)


def test_a_grid_may_end_at_the_least_noise():
  grid = make_grid(LINEAR, 4, "leading", offset=1, final_sigma="sigma_min")
  assert grid.times.tolist() == [751, 501, 251, 1, 0]
  assert grid.sigma[-1] == pytest.approx(0.01)  # the root of the first beta
  assert make_grid(make_process("edm"), 4, "trailing", final_sigma="sigma_min").times[-1] == 0.002


def test_the_start_has_the_deviation_of_noised_pictures():
  assert make_grid(LINEAR, 4).deviation == pytest.approx(1.0)
  assert make_grid(make_process("flow"), 4).deviation == 1.0
  assert make_grid(make_process("edm"), 4).deviation == pytest.approx(np.hypot(1, 80))


def test_half_log_snr_has_its_ends():
  grid = make_grid(make_process("flow"), 4)
  np.testing.assert_allclose(grid.half_log_snr, [-np.inf, -np.log(3), 0, np.log(3), np.inf])


@pytest.mark.parametrize("steps, strength, start", [(50, 1.0, 0), (50, 0.8, 10), (10, 0.75, 3)])
def test_image_to_image_takes_its_share_of_the_steps(steps, strength, start):
  index = start_index(steps, strength)
  assert index == start
  whole = make_grid(LINEAR, steps)
  grid = whole.after(index)
  assert isinstance(grid, Grid) and grid.steps == steps - start
  np.testing.assert_array_equal(grid.times, whole.times[start:])


def test_numbers_of_the_host_are_float64():
  grid = make_grid(LINEAR, 4)
  assert not isinstance(grid.alpha, jnp.ndarray)
  assert {x.dtype for x in (grid.times, grid.alpha, grid.sigma)} == {np.dtype(np.float64)}


@pytest.mark.parametrize("make, message", [
  (lambda: make_grid(linear(25), 26), "steps=26 is outside 1 to 25"),
  (lambda: make_grid(LINEAR, 0), "steps=0"),
  (lambda: make_grid(LINEAR, 4, "traling"), "did you mean 'trailing'"),
  (lambda: make_grid(LINEAR, 4, convention="dmp"), "did you mean 'dpm'"),
  (lambda: make_grid(LINEAR, 4, final_sigma="one"), "unknown final_sigma"),
  (lambda: make_grid(LINEAR, 4, offset=1), "read by the spacing 'leading' only"),
  (lambda: make_grid(LINEAR, 4, "leading", offset=250), "with offset=250 do not fit"),
  (lambda: make_grid(LINEAR, 1000, "leading", convention="dpm"), "1000 steps of the spacing"),
  (lambda: make_grid(make_process("flow"), 4, "leading"), "of discrete processes"),
  (lambda: make_grid(make_process("flow"), 4, "karras"), "use 'trailing'"),
  (lambda: make_grid(make_process("edm"), 4, rho=0.0), "rho=0.0 is not positive"),
  (lambda: make_grid(LINEAR, 4, "leading", final_sigma="sigma_min"), "some noise twice"),
  (lambda: make_grid(LINEAR, 4).after(4), "leaves no step"),
  (lambda: start_index(50, 0.0), "outside 0"),
  (lambda: start_index(50, 1.1), "outside 0"),
  (lambda: start_index(10, 0.05), "leaves none of 10 steps"),
])
def test_what_makes_no_grid_is_one_line(make, message):
  with pytest.raises(UserError, match=message) as caught:
    make()
  assert "\n" not in str(caught.value)
