import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion.process import CLEAN, cosine, expand, linear, make_process
from t2i_jax.errors import UserError

PROCESSES = [linear(), cosine()]


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


@pytest.mark.parametrize("steps", [21, 50, 250, 4000])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_every_number_of_steps_ends_in_noise(schedule, steps):
  process = make_process(schedule, steps)
  assert process.steps == steps
  assert np.all(np.diff(process.alphas_cumprod) < 0)
  assert 0 < process.alphas_cumprod[-1] < 1e-4


@pytest.mark.parametrize("process", PROCESSES)
def test_variance_is_preserved_and_the_clean_end_is_clean(process):
  t = jnp.arange(-1, process.steps)
  alpha, sigma = process.alpha(t), process.sigma(t)
  assert alpha.dtype == sigma.dtype == jnp.float32
  np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, atol=2e-7)
  assert alpha[0] == 1.0 and sigma[0] == 0.0
  np.testing.assert_allclose(process.snr(t[1:]), (alpha[1:] / sigma[1:]) ** 2, rtol=1e-5)
  assert np.all(np.diff(process.snr(t)) < 0)


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
  "schedule, steps, message",
  [("cosinus", 10, "did you mean 'cosine'"), ("cosine", 1, "at least 2"), ("linear", 20, "beta")],
)
def test_what_makes_no_process_is_one_line(schedule, steps, message):
  with pytest.raises(UserError, match=message) as caught:
    make_process(schedule, steps)
  assert "\n" not in str(caught.value)
