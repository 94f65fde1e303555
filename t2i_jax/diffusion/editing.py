"""Sampling that begins with a picture, whichever the solver: inpainting and image-to-image."""

import jax

from t2i_jax.diffusion.parameterization import Prediction, noise_of

Array = jax.Array


def inpainted(
  prediction: Prediction, x_t: Array, alpha: Array, sigma: Array, known: Array, mask: Array
) -> Prediction:
  """x_0 of which a part is known: `known` where `mask` is 1, what was predicted where it is 0.

  Every solver then paints around it. Both broadcast against x_t; a mask between
  0 and 1 blends.
  """
  x_0 = mask * known + (1.0 - mask) * prediction.x_0
  return Prediction(x_0, noise_of(x_t, x_0, alpha, sigma))


def noised(picture: Array, noise: Array, alpha: Array, sigma: Array) -> Array:
  """A picture at the point where image-to-image starts (Meng et al. 2022, algorithm 1).

  `alpha` and `sigma` are those of a grid's first point, see `grid.start_index`.
  """
  return alpha * picture + sigma * noise
