import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion.continuous import (
  RectifiedFlow,
  VarianceExploding,
  VariancePreserving,
  shifted,
)
from t2i_jax.diffusion.process import CLEAN, expand
from t2i_jax.diffusion.schedules import (
  OPTIONS,
  cosine,
  linear,
  make_process,
  scaled_linear,
  with_zero_terminal_snr,
)
from t2i_jax.errors import UserError

PROCESSES = [linear(), cosine(), scaled_linear()]
ZERO = with_zero_terminal_snr(scaled_linear())
CONTINUOUS = [VariancePreserving(), VarianceExploding(), RectifiedFlow()]


def betas(process):
  products = np.concatenate([[1.0], process.alphas_cumprod])
  return 1.0 - products[1:] / products[:-1]


def test_linear_is_the_published_one():
  process = linear()
  np.testing.assert_allclose(betas(process)[[0, -1]], [1e-4, 0.02], rtol=1e-9)
  np.testing.assert_allclose(np.diff(betas(process)), 0.0199 / 999, rtol=1e-6)
  # What is left of the picture at the end, in Ho et al. 2020, section 4: "as close to N(0, I)"
  # as a divergence of about 1e-5 bits a dimension.
  np.testing.assert_allclose(process.alphas_cumprod[-1], 4.0358e-5, rtol=1e-4)


def test_cosine_is_the_published_one():
  process = cosine()
  u = np.arange(1, 1000) / 1000
  angle = (u + 0.008) / 1.008 * np.pi / 2
  expected = np.cos(angle) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
  np.testing.assert_allclose(process.alphas_cumprod[:-1], expected, rtol=1e-9)
  assert betas(process).max() == pytest.approx(0.999)
  # They chose the offset so that sqrt(beta_0) is a little below a pixel's bin, 1 / 127.5.
  assert 0.8 / 127.5 < np.sqrt(betas(process)[0]) < 1 / 127.5


def test_scaled_linear_is_the_published_one():
  roots = np.sqrt(betas(scaled_linear()))
  np.testing.assert_allclose(roots[[0, -1]] ** 2, [8.5e-4, 0.012], rtol=1e-9)
  np.testing.assert_allclose(np.diff(roots), np.diff(roots)[0], rtol=1e-6)
  # Its known flaw: 0.068 of the picture is left (Lin et al. 2024, table 1).
  np.testing.assert_allclose(np.sqrt(scaled_linear().alphas_cumprod[-1]), 0.068265, rtol=1e-4)


def test_zero_terminal_snr_stretches_the_alphas():
  before, after = (np.sqrt(p.alphas_cumprod) for p in (scaled_linear(), ZERO))
  assert after[-1] == 0 and after[0] == pytest.approx(before[0])
  slopes = np.diff(after) / np.diff(before)
  np.testing.assert_allclose(slopes, slopes[0], rtol=1e-6)
  assert ZERO.ends_in_noise and not scaled_linear().ends_in_noise
  assert float(ZERO.alpha(jnp.asarray(999))) == 0 and float(ZERO.sigma(jnp.asarray(999))) == 1


@pytest.mark.parametrize("steps", [21, 50, 250, 4000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_number_of_steps_ends_in_noise(schedule, steps):
  process = make_process(schedule, steps)
  assert process.steps == steps
  assert np.all(np.diff(process.alphas_cumprod) < 0)
  assert 0 < process.alphas_cumprod[-1] < 1e-4


@pytest.mark.parametrize("process", [*PROCESSES, ZERO])
def test_variance_is_preserved_and_the_clean_end_is_clean(process):
  t = jnp.arange(-1, process.steps)
  alpha, sigma = process.alpha(t), process.sigma(t)
  assert alpha.dtype == sigma.dtype == jnp.float32
  np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=2e-7)
  assert alpha[0] == 1.0 and sigma[0] == 0.0
  np.testing.assert_allclose(process.snr(t[1:]), (alpha[1:] / sigma[1:]) ** 2, rtol=1e-5)
  assert np.all(np.diff(process.snr(t)) < 0)


@pytest.mark.parametrize("process", [*PROCESSES, ZERO, *CONTINUOUS])
def test_host_and_device_agree(process):
  times = process.time(jnp.linspace(0, 0.999, 50))
  assert times.dtype == (jnp.int32 if process in [*PROCESSES, ZERO] else jnp.float32)
  assert np.all(np.diff(times) > 0)
  for function in (process.alpha, process.sigma, process.snr):
    device, host = function(times), function(np.asarray(times, float))
    assert device.dtype == jnp.float32 and host.dtype == np.float64
    np.testing.assert_allclose(device, host, rtol=2e-5)


@pytest.mark.parametrize("process", [*PROCESSES, *CONTINUOUS])
def test_times_are_found_by_their_ratio(process):
  at = np.array([process.first, 0.3 * process.last, 0.99 * process.last])
  if process in PROCESSES:
    at = np.round(at)
  ratio = process.sigma(at) / process.alpha(at)
  np.testing.assert_allclose(process.time_of(ratio), at, rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(process.alpha_of(ratio), process.alpha(at), rtol=1e-9)


def test_between_two_steps_the_ratio_is_linear():
  process = linear()
  ratio = lambda t: process.sigma(t) / process.alpha(t)  # noqa: E731
  ends = ratio(np.array([100, 101]))
  np.testing.assert_allclose(ratio(np.array([100.25])), ends @ [0.75, 0.25], rtol=1e-12)
  # Towards a ratio without bound, alpha / sigma is.
  inverse = ZERO.alpha(np.array([998, 998.25, 999])) / ZERO.sigma(np.array([998, 998.25, 999]))
  np.testing.assert_allclose(inverse, inverse[0] * np.array([1, 0.75, 0]), rtol=1e-9)


def test_the_continuous_process_is_the_limit_of_the_discrete():
  # Song et al. 2021b, appendix B: beta from 0.1 to 20 is the linear process of 1000 steps.
  t = np.array([10, 300, 700, 999])
  np.testing.assert_allclose(
    VariancePreserving().alpha((t + 1) / 1000), linear().alpha(t), rtol=0.04
  )
  np.testing.assert_allclose(VariancePreserving().embedded(np.array(1.0)), 999.0)
  assert linear().embedded(5) == 5


def test_vp_is_the_integral_of_its_rate():
  t = np.linspace(0, 0.6, 100_001)
  integral = np.trapezoid(0.1 + t * 19.9, t)
  np.testing.assert_allclose(VariancePreserving().alpha(t[-1:]), np.exp(-integral / 2), rtol=1e-8)


def test_edm_is_the_papers():
  process = VarianceExploding()
  u = jnp.linspace(0, 0.9999, 101)
  np.testing.assert_allclose(np.diff(np.log(process.time(u))), np.log(40_000) * np.diff(u),
                             rtol=2e-3)
  np.testing.assert_allclose(process.time(jnp.zeros(1)), 0.002, rtol=1e-6)
  np.testing.assert_allclose(process.embedded(np.array([1.0, 80.0])), [0.0, np.log(80) / 4])
  assert process.first == 0.002 and process.last == 80.0


def test_flow_is_a_straight_line_and_shifts_once():
  process = make_process("flow", shift=3.0)
  u = jnp.array([0.1, 0.5, 0.9])
  t = process.time(u)
  np.testing.assert_allclose(t, shifted(u, 3.0), rtol=1e-6)
  np.testing.assert_allclose(process.alpha(t) + process.sigma(t), 1.0, rtol=1e-6)
  np.testing.assert_allclose(process.embedded(t), 1000 * t)
  # The time at which the picture is gone is trained, and so is one at which no noise is left, but
  # for what a weight can be finite at.
  assert 0 < process.time(jnp.zeros(1))[0] < 1e-4
  assert np.isfinite(process.snr(process.time(jnp.zeros(1))))


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shifting_keeps_the_ends_and_reaches_every_step(shift):
  u = jnp.linspace(0, 1, 20_001)
  moved = shifted(u, shift)
  assert moved[0] == 0 and moved[-1] == pytest.approx(1) and np.all(np.diff(moved) > 0)
  assert set(np.asarray(linear(50).time(moved))) == set(range(50))
  if shift == 1.0:
    np.testing.assert_array_equal(moved, u)


def test_shifting_scales_the_noise_to_signal_ratio():
  # What Esser et al. 2024, section 5.3.2, ask of it, for the straight process sigma = u.
  u = jnp.array([0.1, 0.5, 0.9])
  moved = shifted(u, 3.0)
  np.testing.assert_allclose(moved / (1 - moved), 3.0 * u / (1 - u), rtol=1e-5)


def test_discrete_times_are_equal_parts_and_the_last_is_the_last():
  u = (jnp.arange(4000) + 0.5) / 4000
  np.testing.assert_array_equal(np.bincount(linear(40).time(u)), 100)
  ends = jnp.array([0.0, np.nextafter(np.float32(1), np.float32(0)), 1.0])
  for steps in (50, 1000, 4000):
    assert linear(steps).time(ends).tolist() == [0, steps - 1, steps - 1]


def test_corrupt_takes_each_picture_to_its_own_time():
  process = linear()
  x_0, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 3)).astype("f4")
  t = jnp.array([0, 500, 999])
  x_t = process.corrupt(x_0, noise, t)
  for i in range(3):
    kept = process.alphas_cumprod[t[i]]
    expected = np.sqrt(kept) * x_0[i] + np.sqrt(1 - kept) * noise[i]
    np.testing.assert_allclose(x_t[i], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("t, s", [(1, 0), (500, 499), (999, 998), (300, 100), (999, 0)])
def test_posterior_is_bayes_rule(process, t, s):
  # q(x_s | x_t, x_0) on a grid: the process's steps to s times those from s to t.
  keep = 1.0 - betas(process)
  kept = np.prod(keep[: t + 1])
  x_0 = 0.4
  x_t = np.sqrt(kept) * x_0 - 1.3 * np.sqrt(1 - kept)
  before, between = np.prod(keep[: s + 1]), np.prod(keep[s + 1 : t + 1])
  center = np.sqrt(before) * x_0
  grid = center + np.sqrt(1 - before) * np.linspace(-12, 12, 200_001)
  log = -((grid - center) ** 2) / (1 - before) / 2
  log -= (x_t - np.sqrt(between) * grid) ** 2 / (1 - between) / 2
  weight = np.exp(log - log.max())
  weight /= weight.sum()
  mean = np.sum(weight * grid)
  variance = np.sum(weight * (grid - mean) ** 2)

  given = process.posterior(jnp.float32(x_t), jnp.float32(x_0), jnp.asarray(t), jnp.asarray(s))
  np.testing.assert_allclose(given, [mean, variance, 1 - between], rtol=1e-4)


@pytest.mark.parametrize("process, t, s", [
  *((ZERO, t, s) for t, s in [(999, 998), (999, 0), (500, 499)]),
  *((VariancePreserving(), t, s) for t, s in [(1.0, 0.999), (0.5, 0.1)]),
  *((VarianceExploding(), t, s) for t, s in [(80.0, 79.0), (3.0, 0.01)]),
  *((RectifiedFlow(), t, s) for t, s in [(1.0, 0.999), (0.999, 0.998), (0.4, 0.1)]),
])
def test_posterior_of_any_process_is_bayes_rule(process, t, s):
  # x_s = alpha_s x_0 + sigma_s e, and x_t is x_s times their alphas' ratio, plus noise.
  (a_t, a_s), (s_t, s_s) = (f(np.array([t, s], float)) for f in (process.alpha, process.sigma))
  if process in CONTINUOUS:
    at = np.array([t, s], np.float32).astype(float)
    (a_t, a_s), (s_t, s_s) = process.alpha(at), process.sigma(at)
  x_0, x_t, ratio = 0.4, -1.3 * s_t, a_t / a_s
  added = s_t**2 - ratio**2 * s_s**2
  precision = 1 / s_s**2 + ratio**2 / added
  mean = (a_s * x_0 / s_s**2 + ratio * x_t / added) / precision
  given = process.posterior(jnp.float32(x_t), jnp.float32(x_0), jnp.asarray(t), jnp.asarray(s))
  np.testing.assert_allclose(given, [mean, 1 / precision, added], rtol=1e-4)


@pytest.mark.parametrize("process", [*PROCESSES, cosine(4000)])
def test_variances_of_neighbours_keep_their_digits(process):
  # Neighbours' alphas agree in most of float32's digits, so a plain difference loses them.
  t = np.arange(1, process.steps)
  kept = process.alphas_cumprod
  added = 1 - kept[t] / kept[t - 1]
  zeros = jnp.zeros(len(t))
  _, small, large = process.posterior(zeros, zeros, jnp.asarray(t), jnp.asarray(t - 1))
  np.testing.assert_allclose(large, added, rtol=1e-6)
  np.testing.assert_allclose(small, added * (1 - kept[t - 1]) / (1 - kept[t]), rtol=1e-6)


@pytest.mark.parametrize("t, s, r", [(2, 1, 0), (999, 700, 300), (600, 599, 10)])
def test_respaced_posteriors_agree(t, s, r):
  # x_t to x_r in one stride has the law of x_t to x_s to x_r.
  process = linear()
  x_0, x_t = jnp.float32(0.7), jnp.float32(-1.1)
  t, s, r = jnp.asarray(t), jnp.asarray(s), jnp.asarray(r)
  mean, variance, _ = process.posterior(x_t, x_0, t, s)
  onward = lambda x_s: process.posterior(x_s, x_0, s, r)[0]  # noqa: E731
  slope = jax.grad(onward)(mean)
  direct_mean, direct_variance, _ = process.posterior(x_t, x_0, t, r)
  np.testing.assert_allclose(onward(mean), direct_mean, rtol=1e-5)
  twice = process.posterior(mean, x_0, s, r)[1] + slope**2 * variance
  np.testing.assert_allclose(twice, direct_variance, rtol=1e-5)


def test_posterior_takes_a_time_for_each_picture():
  process = cosine()
  x_t, x_0 = np.random.default_rng(1).normal(size=(2, 3, 4, 4, 3)).astype("f4")
  t, s = jnp.array([10, 500, 7]), jnp.array([9, 100, CLEAN])
  mean, small, large = process.posterior(x_t, x_0, t, s)
  assert mean.shape == x_t.shape and small.shape == large.shape == (3, 1, 1, 1)
  for i in range(3):
    one = process.posterior(x_t[i], x_0[i], t[i], s[i])
    np.testing.assert_allclose(mean[i], one[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose([small[i, 0, 0, 0], large[i, 0, 0, 0]], one[1:], rtol=1e-6)


@pytest.mark.parametrize("t", [0, 1, 700, 999])
def test_posterior_of_the_clean_end_is_the_picture(t):
  x_t, x_0 = np.random.default_rng(2).normal(size=(2, 8)).astype("f4")
  mean, small, _ = linear().posterior(x_t, x_0, jnp.asarray(t), jnp.asarray(CLEAN))
  np.testing.assert_allclose(mean, x_0, rtol=1e-6)
  assert small == 0.0


def test_expand_puts_axes_behind():
  assert expand(jnp.zeros(3), 4).shape == (3, 1, 1, 1)
  assert expand(jnp.float32(2.0), 4).shape == ()


@pytest.mark.parametrize(
  "schedule, options, message",
  [
    ("cosinus", {}, "did you mean 'cosine'"),
    ("cosine", {"steps": 1}, "at least 2"),
    ("linear", {"steps": 20}, "beta"),
    ("scaled_linear", {"steps": 12}, "use more than 12 steps"),
    ("linear", {"shift": 3.0}, "shift=3.0 is not read by the schedule 'linear', but by 'flow'"),
    ("flow", {"beta_start": 0.1}, "by 'linear', 'scaled_linear', 'vp'"),
    ("flow", {"zero_terminal_snr": True}, "of discrete processes, not of 'flow'"),
    ("flow", {"shift": 0.0}, "shift=0.0 of the schedule 'flow' is not positive"),
    ("edm", {"sigma_min": 3.0, "sigma_max": 2.0}, "sigma_min=3.0 is not below"),
  ],
)
def test_what_makes_no_process_is_one_line(schedule, options, message):
  with pytest.raises(UserError, match=message) as caught:
    make_process(schedule, **options)
  assert "\n" not in str(caught.value)


def test_options_reach_the_process():
  values = {"beta_start": 2e-4, "beta_end": 0.03, "sigma_min": 0.1, "sigma_max": 9.0, "shift": 2.0}
  for schedule, names in OPTIONS.items():
    given = {name: values[name] for name in names}
    process = make_process(schedule, **given)
    if schedule in ("linear", "scaled_linear"):
      np.testing.assert_allclose(betas(process)[[0, -1]], [2e-4, 0.03], rtol=1e-9)
    else:
      for name, value in given.items():
        assert getattr(process, name) == value
