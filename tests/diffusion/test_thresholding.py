import jax.numpy as jnp
import numpy as np

from t2i_jax.diffusion.parameterization import Prediction
from t2i_jax.diffusion.thresholding import dynamic, static

X = jnp.array([[3.0, 0.1, -2.0]])
ALPHA, SIGMA = jnp.float32(0.8), jnp.float32(0.6)


def test_static_thresholding_clips_x_0_and_keeps_x_t():
  prediction = Prediction(jnp.array([[2.0, 0.3, -1.5]]), jnp.zeros((1, 3)))
  x_0, noise = static(prediction, X, ALPHA, SIGMA)
  np.testing.assert_allclose(x_0, [[1.0, 0.3, -1.0]])
  np.testing.assert_allclose(ALPHA * x_0 + SIGMA * noise, X, atol=1e-6)


def test_dynamic_thresholding_scales_each_picture_by_its_percentile():
  # Saharia et al. 2022, section 2.3; the 0.995-quantile of |x_0|, over all of a picture's numbers.
  random = np.random.default_rng(0)
  x_0 = jnp.asarray(random.normal(size=(2, 8, 8, 3)) * np.array([3.0, 0.1])[:, None, None, None],
                    jnp.float32)
  x_t = jnp.asarray(random.normal(size=x_0.shape), jnp.float32)
  given, noise = dynamic(Prediction(x_0, x_t), x_t, ALPHA, SIGMA)
  limit = np.quantile(np.abs(x_0[0]), 0.995)
  np.testing.assert_allclose(given[0], np.clip(x_0[0], -limit, limit) / limit, rtol=1e-5)
  assert np.abs(given).max() <= 1.0
  # A picture within [-1, 1] stays as it is.
  np.testing.assert_array_equal(given[1], x_0[1])
  np.testing.assert_allclose(ALPHA * given + SIGMA * noise, x_t, atol=1e-5)


def test_the_share_is_of_what_is_not_clipped():
  x_0 = jnp.linspace(-10, 10, 101)[None]
  half, _ = dynamic(Prediction(x_0, x_0), x_0, ALPHA, SIGMA, share=0.5)
  assert np.mean(np.abs(half) == 1.0) > 0.45
