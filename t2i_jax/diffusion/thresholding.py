"""Predictions of x_0 that are kept where pictures are: in [-1, 1], of pixels, not of latents.

The noise changes with x_0, so that x_t stays what it is.
"""

import jax
import jax.numpy as jnp

from t2i_jax.diffusion.parameterization import Prediction, noise_of

Array = jax.Array


def static(prediction: Prediction, x_t: Array, alpha: Array, sigma: Array) -> Prediction:
  """x_0 clipped to [-1, 1]."""
  x_0 = jnp.clip(prediction.x_0, -1.0, 1.0)
  return Prediction(x_0, noise_of(x_t, x_0, alpha, sigma))


def dynamic(
  prediction: Prediction, x_t: Array, alpha: Array, sigma: Array, share: float = 0.995
) -> Prediction:
  """x_0 clipped and scaled back to [-1, 1] (Saharia et al. 2022, section 2.3).

  Args:
    prediction, x_t, alpha, sigma: as everywhere.
    share: of all numbers of a picture that are not clipped, if it exceeds [-1, 1] at all.
  """
  x_0 = prediction.x_0
  sizes = jnp.abs(x_0).reshape(len(x_0), -1)
  limit = jnp.maximum(jnp.quantile(sizes, share, axis=1), 1.0)
  limit = limit.reshape(-1, *(1,) * (x_0.ndim - 1))
  x_0 = jnp.clip(x_0, -limit, limit) / limit
  return Prediction(x_0, noise_of(x_t, x_0, alpha, sigma))
