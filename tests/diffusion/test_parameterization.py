import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion.parameterization import PARAMETERIZATIONS, make_parameterization, noise_of
from t2i_jax.diffusion.schedules import cosine, make_process
from t2i_jax.errors import UserError

NAMES = sorted(PARAMETERIZATIONS)
# Not the last steps, where alpha is so small that noise alone says nothing of the picture.
T = jnp.array([5, 100, 500, 900])
PROCESS = cosine()
ALPHA, SIGMA = PROCESS.alpha(T)[:, None], PROCESS.sigma(T)[:, None]


# Of other processes, and where nothing is left of the picture.
ANY = jnp.array([[1.0, 2.0], [0.3, 0.7], [0.9, 0.1], [0.0, 1.0]])


def draw(seed=0):
  x_0, noise = np.random.default_rng(seed).normal(size=(2, 4, 6)).astype("f4")
  return x_0, noise, ALPHA * x_0 + SIGMA * noise


@pytest.mark.parametrize("name", NAMES)
def test_the_target_predicts_the_truth(name):
  x_0, noise, x_t = draw()
  kind = make_parameterization(name)
  prediction = kind.predict(x_t, kind.target(x_0, noise, ALPHA, SIGMA), ALPHA, SIGMA)
  np.testing.assert_allclose(prediction.x_0, x_0, atol=1e-4)
  np.testing.assert_allclose(prediction.noise, noise, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_any_prediction_lies_on_the_line_through_x_t(name):
  x_t, output = np.random.default_rng(3).normal(size=(2, 4, 6)).astype("f4")
  x_0, noise = make_parameterization(name).predict(x_t, output, ALPHA, SIGMA)
  np.testing.assert_allclose(ALPHA * x_0 + SIGMA * noise, x_t, atol=1e-5)
  np.testing.assert_allclose(noise_of(x_t, x_0, ALPHA, SIGMA), noise, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_one_parameterizations_output_is_anothers(name):
  x_0, noise, x_t = draw()
  first = make_parameterization(name)
  prediction = first.predict(x_t, first.target(x_0, noise, ALPHA, SIGMA), ALPHA, SIGMA)
  for other in map(make_parameterization, NAMES):
    np.testing.assert_allclose(
      other.target(*prediction, ALPHA, SIGMA), other.target(x_0, noise, ALPHA, SIGMA), atol=1e-4
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "epsilon"])
def test_all_but_epsilon_hold_for_any_process(name):
  alpha, sigma = ANY[:, :1], ANY[:, 1:]
  kind, (x_0, noise, _) = make_parameterization(name), draw()
  x_t = alpha * x_0 + sigma * noise
  output = kind.target(x_0, noise, alpha, sigma)
  prediction = kind.predict(x_t, output, alpha, sigma)
  np.testing.assert_allclose(prediction.x_0, x_0, atol=1e-4)
  np.testing.assert_allclose(prediction.noise, noise, atol=1e-4)
  _, moved = jax.jvp(
    lambda o: kind.predict(x_t, o, alpha, sigma).x_0, (output,), (jnp.ones_like(output),)
  )
  scale = jnp.broadcast_to(kind.error_scale(alpha, sigma), moved.shape)
  np.testing.assert_allclose(jnp.abs(moved) * scale, 1.0, rtol=1e-5)


def test_flow_is_the_velocity_of_the_straight_line():
  process, (x_0, noise, _) = make_process("flow"), draw()
  at = lambda t: process.corrupt(x_0, noise, t)  # noqa: E731
  t = jnp.array([0.1, 0.3, 0.5, 0.9])
  _, velocity = jax.jvp(at, (t,), (jnp.ones_like(t),))
  output = make_parameterization("flow").target(x_0, noise, t[:, None], t[:, None])
  np.testing.assert_allclose(output, velocity, atol=1e-5)


def test_only_edm_scales_its_input_to_unit_variance():
  alpha, sigma = ANY[:, :1], ANY[:, 1:]
  for name in NAMES:
    scale = make_parameterization(name, 0.3).input_scale(alpha, sigma)
    size = jnp.sqrt((0.3 * alpha) ** 2 + sigma**2) if name == "edm" else 1.0
    np.testing.assert_allclose(scale * size, 1.0, rtol=1e-6)


def test_v_is_the_angular_derivative():
  # Salimans and Ho 2022, appendix D: with alpha = cos(phi) and sigma = sin(phi), v = dx/dphi.
  x_0, noise, _ = draw()
  phi = jnp.arctan2(SIGMA, ALPHA)
  at = lambda phi: jnp.cos(phi) * x_0 + jnp.sin(phi) * noise  # noqa: E731
  _, derivative = jax.jvp(at, (phi,), (jnp.ones_like(phi),))
  v = make_parameterization("v").target(x_0, noise, ALPHA, SIGMA)
  np.testing.assert_allclose(v, derivative, atol=1e-5)


def test_edm_is_minus_v_at_unit_sigma_data():
  x_0, noise, x_t = draw()
  edm, v = make_parameterization("edm", 1.0), make_parameterization("v")
  np.testing.assert_allclose(
    edm.target(x_0, noise, ALPHA, SIGMA), -v.target(x_0, noise, ALPHA, SIGMA), atol=1e-5
  )
  output = draw(1)[0]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    edm.predict(x_t, output, ALPHA, SIGMA), v.predict(x_t, -output, ALPHA, SIGMA),
  )


def test_edm_is_the_papers():
  # Karras et al. 2022, table 1: D(y) = c_skip y + c_out F at noise level s, y = x_t / alpha.
  x_0, noise, x_t = draw()
  output, s, data = draw(1)[0], SIGMA / ALPHA, 0.3
  edm = make_parameterization("edm", data)
  c_skip, c_out = data**2 / (s**2 + data**2), s * data / np.sqrt(s**2 + data**2)
  expected = c_skip * x_t / ALPHA + c_out * output
  np.testing.assert_allclose(
    edm.predict(x_t, output, ALPHA, SIGMA).x_0, expected, rtol=1e-4, atol=1e-5
  )
  # The target has unit variance at every noise level.
  x_0, noise = np.random.default_rng(0).normal(size=(2, 4, 100_000)).astype("f4")
  np.testing.assert_allclose(
    np.std(edm.target(data * x_0, noise, ALPHA, SIGMA), axis=1), 1.0, atol=0.01
  )


@pytest.mark.parametrize("name", NAMES)
def test_error_scale_is_the_ratio_of_the_errors(name):
  x_t, output = np.random.default_rng(4).normal(size=(2, 4, 6)).astype("f4")
  kind = make_parameterization(name)
  # |d x_0 / d output| of each row, through which an error of the output reaches x_0.
  _, moved = jax.jvp(
    lambda o: kind.predict(x_t, o, ALPHA, SIGMA).x_0, (output,), (jnp.ones_like(output),)
  )
  scale = jnp.broadcast_to(kind.error_scale(ALPHA, SIGMA), moved.shape)
  np.testing.assert_allclose(jnp.abs(moved) * scale, 1.0, rtol=1e-5)


def test_an_unknown_name_is_one_line():
  with pytest.raises(UserError, match="did you mean 'epsilon'"):
    make_parameterization("epsilom")
  with pytest.raises(UserError, match="sigma_data=0 is not positive"):
    make_parameterization("edm", 0)
