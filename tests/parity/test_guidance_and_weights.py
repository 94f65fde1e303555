"""Guidance, thresholding, densities and weights against diffusers' functions."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")
diffusers = pytest.importorskip(
  "diffusers", reason="the reference needs diffusers: install t2i_jax[parity]"
)

from diffusers import training_utils  # noqa: E402
from diffusers.guiders import adaptive_projected_guidance as reference  # noqa: E402
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion  # noqa: E402

from t2i_jax.diffusion import guidance, thresholding  # noqa: E402
from t2i_jax.diffusion.parameterization import Prediction  # noqa: E402
from t2i_jax.diffusion.weighting import make_weighting  # noqa: E402

SHAPE = (2, 4, 4, 3)


def draw(seed, scale=1.0):
  return np.float32(scale * np.random.default_rng(seed).normal(size=SHAPE))


@pytest.mark.parametrize("momentum, threshold, parallel", [
  (0.0, 0.0, 0.0), (-0.5, 2.0, 0.0), (-0.75, 5.0, 0.3),
])
def test_projected_guidance(momentum, threshold, parallel):
  buffer, average = reference.MomentumBuffer(momentum), jnp.zeros(SHAPE)
  for k in range(4):
    conditional, unconditional = draw((k, 0)), draw((k, 1))
    expected = reference.normalized_guidance(
      torch.from_numpy(conditional), torch.from_numpy(unconditional), 6.5, buffer, parallel,
      threshold, use_original_formulation=True,
    )
    # Its scale is one less than ours.
    given, average = guidance.projected(
      conditional, unconditional, 7.5, average, momentum, threshold, parallel
    )
    np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
def test_rescaled_guidance(share):
  guided, conditional = draw(0, 3.0), draw(1)
  expected = pipeline_stable_diffusion.rescale_noise_cfg(
    torch.from_numpy(guided), torch.from_numpy(conditional), share
  )
  # Its deviations have n - 1 below, in both; their ratio is the same.
  np.testing.assert_allclose(
    guidance.rescaled(guided, conditional, share), expected, rtol=1e-5, atol=1e-6
  )


def test_dynamic_thresholding():
  scheduler = diffusers.DDPMScheduler(
    thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0
  )
  x_0, x_t = draw(0, 2.0), draw(1)
  given = thresholding.dynamic(Prediction(x_0, x_t), x_t, jnp.float32(0.6), jnp.float32(0.8), 0.9)
  expected = scheduler._threshold_sample(torch.from_numpy(x_0))
  np.testing.assert_allclose(given.x_0, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_weights_of_rectified_flow(name):
  sigma = np.array([0.05, 0.3, 0.5, 0.9])
  snr = ((1 - sigma) / sigma) ** 2
  expected = training_utils.compute_loss_weighting_for_sd3(name, torch.from_numpy(sigma)).numpy()
  # Its trainer puts the first on x_0; the second is on the velocity in the paper.
  on_x_0 = expected if name == "sigma_sqrt" else expected / sigma**2
  np.testing.assert_allclose(make_weighting(name)(snr), on_x_0, rtol=1e-5)
