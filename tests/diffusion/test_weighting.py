import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion.parameterization import PARAMETERIZATIONS, make_parameterization
from t2i_jax.diffusion.schedules import linear
from t2i_jax.diffusion.weighting import WEIGHTINGS, make_weighting
from t2i_jax.errors import UserError

PROCESS = linear()
T = jnp.array([0, 10, 300, 700, 999])
BOUND = 2.0
ALPHA, SIGMA, SNR = (f(T)[:, None] for f in (PROCESS.alpha, PROCESS.sigma, PROCESS.snr))


def direct(weighting, x_0, noise, prediction):
  """The loss as its paper writes it."""
  if weighting == "epsilon":
    return (prediction.noise - noise) ** 2
  if weighting == "v":
    v = make_parameterization("v")
    return (v.target(*prediction, ALPHA, SIGMA) - v.target(x_0, noise, ALPHA, SIGMA)) ** 2
  bounded = jnp.minimum(ALPHA**2 / SIGMA**2, BOUND)
  factor = {"x0": 1.0, "min_snr": bounded, "v_bounded": 1.0 + bounded}[weighting]
  return factor * (prediction.x_0 - x_0) ** 2


@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS))
@pytest.mark.parametrize("name", sorted(PARAMETERIZATIONS))
def test_a_weighted_output_error_is_the_direct_loss(name, weighting):
  kind = make_parameterization(name)
  x_0, noise = np.random.default_rng(0).normal(size=(2, 5, 16)).astype("f4")
  x_t = ALPHA * x_0 + SIGMA * noise
  target = kind.target(x_0, noise, ALPHA, SIGMA)
  # Errors of about the size of the target, so that the direct loss keeps its digits.
  output = target + np.random.default_rng(1).normal(size=target.shape).astype("f4")
  weight = make_weighting(weighting, BOUND)(SNR) / kind.error_scale(ALPHA, SIGMA) ** 2
  expected = direct(weighting, x_0, noise, kind.predict(x_t, output, ALPHA, SIGMA))
  np.testing.assert_allclose(
    jnp.mean(weight * (output - target) ** 2, axis=1), jnp.mean(expected, axis=1), rtol=2e-3
  )


def test_the_bound_is_the_papers_and_positive():
  assert make_weighting("min_snr")(jnp.array([4.0, 9.0])).tolist() == [4.0, 5.0]
  with pytest.raises(UserError, match="bound 0 is not positive"):
    make_weighting("min_snr", 0)


def test_an_unknown_name_is_one_line():
  with pytest.raises(UserError, match="did you mean 'min_snr'"):
    make_weighting("minsnr")
