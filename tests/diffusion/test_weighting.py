import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion.parameterization import PARAMETERIZATIONS, make_parameterization
from t2i_jax.diffusion.schedules import linear, make_process
from t2i_jax.diffusion.weighting import WEIGHTINGS, make_weighting
from t2i_jax.errors import UserError

PROCESS = linear()
T = jnp.array([0, 10, 300, 700, 999])
BOUND, GAMMA, DATA = 2.0, 0.5, 0.7
ALPHA, SIGMA, SNR = (f(T)[:, None] for f in (PROCESS.alpha, PROCESS.sigma, PROCESS.snr))


def direct(weighting, x_0, noise, prediction):
  """The loss as its paper writes it."""
  plain = {"simple": "epsilon", "sigma_sqrt": "flow"}.get(weighting, weighting)
  if plain in PARAMETERIZATIONS:
    kind = make_parameterization(plain, DATA)
    return (kind.target(*prediction, ALPHA, SIGMA) - kind.target(x_0, noise, ALPHA, SIGMA)) ** 2
  snr = ALPHA**2 / SIGMA**2
  bounded = jnp.minimum(snr, BOUND)
  sigma = SIGMA / (ALPHA + SIGMA)  # of rectified flow
  cosmap = 2 / (np.pi - 2 * np.pi * sigma + 2 * np.pi * sigma**2) / sigma**2
  factor = {
    "min_snr": bounded, "v_bounded": 1.0 + bounded, "p2": snr / (1.0 + snr) ** GAMMA,
    "cosmap": cosmap,
  }[weighting]
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
  make = make_weighting(weighting, BOUND, gamma=GAMMA, sigma_data=DATA)
  weight = make(SNR) / kind.error_scale(ALPHA, SIGMA) ** 2
  expected = direct(weighting, x_0, noise, kind.predict(x_t, output, ALPHA, SIGMA))
  np.testing.assert_allclose(
    jnp.mean(weight * (output - target) ** 2, axis=1), jnp.mean(expected, axis=1), rtol=2e-3
  )


def test_the_bound_is_the_papers_and_positive():
  assert make_weighting("min_snr")(jnp.array([4.0, 9.0])).tolist() == [4.0, 5.0]
  with pytest.raises(UserError, match="bound 0 is not positive"):
    make_weighting("min_snr", 0)


def test_weights_by_the_papers_own_sigma():
  snr = lambda name: make_process(name).snr(np.array([0.1, 0.5, 0.9]))  # noqa: E731
  sigma = np.array([0.1, 0.5, 0.9])
  # Karras et al. 2022, table 1, at alpha = 1.
  np.testing.assert_allclose(
    make_weighting("edm", sigma_data=0.4)(snr("edm")), (sigma**2 + 0.16) / (0.4 * sigma) ** 2,
    rtol=1e-6,
  )
  # At alpha = 1 - sigma.
  np.testing.assert_allclose(make_weighting("sigma_sqrt")(snr("flow")), sigma**-2, rtol=1e-6)
  np.testing.assert_allclose(
    make_weighting("cosmap")(snr("flow")) * sigma**2,
    2 / (np.pi * (1 - 2 * sigma + 2 * sigma**2)), rtol=1e-6,
  )


@pytest.mark.parametrize("option", ["gamma", "sigma_data"])
def test_options_are_positive_whichever_weighting_reads_them(option):
  with pytest.raises(UserError, match="is not positive"):
    make_weighting("epsilon", **{option: 0.0})


def test_an_unknown_name_is_one_line():
  with pytest.raises(UserError, match="did you mean 'min_snr'"):
    make_weighting("minsnr")
