"""How a condition is obeyed more than the data does.

All of it acts on arrays [B, ...] that are affine in the score with factors that
add up to 1: outputs of any parameterization, or predictions of x_0 or of noise.
A scale is a scalar or [B]; at 1 each returns its condition as it is, bit for
bit.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from t2i_jax.diffusion.parameterization import Prediction
from t2i_jax.diffusion.process import expand

Array = jax.Array


def classifier_free(conditional: Array, unconditional: Array, scale: Array) -> Array:
  """unconditional + scale (conditional - unconditional).

  Ho and Salimans 2022, equation 6, in the convention where scale 1 is the
  conditional model alone (their w + 1).
  """
  scale = _scale(scale, conditional)
  guided = unconditional + scale * (conditional - unconditional)
  return jnp.where(scale == 1.0, conditional, guided)


def composed(
  conditionals: Sequence[Array], unconditional: Array, scales: Sequence[Array]
) -> Array:
  """unconditional + the sum of scale (conditional - unconditional), of several conditions.

  Liu et al. 2022b, equation 11; a negative scale is a condition that is not to hold.
  """
  guided = classifier_free(conditionals[0], unconditional, scales[0])
  for conditional, scale in zip(conditionals[1:], scales[1:], strict=True):
    guided = guided + _scale(scale, conditional) * (conditional - unconditional)
  return guided


def scale_within(scale: Array, alpha: Array, sigma: Array, low: Array, high: Array) -> Array:
  """The scale while sigma / alpha is in (low, high], and 1 elsewhere.

  Kynkaanniemi et al. 2024, equation 5: guidance harms at high noise and does
  nothing at low.
  """
  # Multiplied out, for alpha may be 0.
  inside = (sigma > low * alpha) & ((sigma <= high * alpha) | jnp.isinf(high))
  return jnp.where(inside, scale, 1.0)


def rescaled(guided: Array, conditional: Array, share: Array) -> Array:
  """Guided pictures with, to a share, the standard deviation that they had without guidance.

  Lin et al. 2024, section 3.4; they take 0.7 of x_0 and v at a scale of 7.5.
  """
  axes = _all_but_batch(guided)
  ratio = jnp.std(conditional, axes, keepdims=True) / jnp.std(guided, axes, keepdims=True)
  # Compiled, two deviations of the same picture may differ by a rounding.
  ratio = jnp.where(jnp.all(guided == conditional, axes, keepdims=True), 1.0, ratio)
  return guided * (1.0 + _scale(share, guided) * (ratio - 1.0))


def projected(
  conditional: Array, unconditional: Array, scale: Array, average: Array,
  momentum: float = -0.5, threshold: float = 0.0, parallel: float = 0.0,
) -> tuple[Array, Array]:
  """Adaptive projected guidance (Sadat et al. 2024, algorithm 1), of predictions of x_0.

  What guidance adds along the prediction oversaturates; it is left out, the
  rest is bounded in length, and what was added at earlier steps is taken back.

  Args:
    conditional, unconditional: predictions of x_0, [B, ...].
    scale: as in `classifier_free`.
    average: of the differences at earlier steps, [B, ...]; zeros at first.
    momentum: their beta, the share of `average`; they use values from -0.75 to 0.
    threshold: their r, the largest length of a picture's difference; 0 for none.
    parallel: their eta, the share of the part along the prediction.

  Returns:
    The guided x_0, and the new average.
  """
  axes = _all_but_batch(conditional)
  average = conditional - unconditional + momentum * average
  difference = average
  if threshold:
    length = jnp.sqrt(jnp.sum(jnp.square(difference), axes, keepdims=True))
    difference = difference * jnp.minimum(1.0, threshold / jnp.maximum(length, 1e-12))
  square = jnp.maximum(jnp.sum(jnp.square(conditional), axes, keepdims=True), 1e-12)
  along = jnp.sum(difference * conditional, axes, keepdims=True) / square * conditional
  update = difference - (1.0 - parallel) * along
  return conditional + (_scale(scale, conditional) - 1.0) * update, average


def shifted_noise(
  prediction: Prediction, gradient: Array, alpha: Array, sigma: Array
) -> Prediction:
  """Guidance by the gradient of a log-probability at x_t (Dhariwal and Nichol 2021, algorithm 2).

  Where nothing is left of the picture, alpha 0, x_t says nothing that a guide
  could read, and the prediction stays.

  Args:
    prediction: of x_0 and noise, [B, ...].
    gradient: times the guide's scale, [B, ...].
    alpha, sigma: of x_t.
  """
  gain = jnp.where(alpha > 0, sigma / jnp.where(alpha > 0, alpha, 1.0), 0.0)
  shift = jnp.where(alpha > 0, sigma, 0.0) * gradient
  return Prediction(prediction.x_0 + gain * shift, prediction.noise - shift)


def both(x: Array) -> Array:
  """Each row twice, [B, ...] -> [2B, ...]: neighbours, so that a sharded batch stays in place."""
  return jnp.repeat(x, 2, axis=0)


def interleave(conditional: Array, unconditional: Array) -> Array:
  """Rows of two batches in turn, the layout of `both`."""
  stacked = jnp.stack([conditional, unconditional], axis=1)
  return stacked.reshape(-1, *conditional.shape[1:])


def separate(x: Array) -> tuple[Array, Array]:
  """What `interleave` joined: [2B, ...] -> two of [B, ...]."""
  pairs = x.reshape(-1, 2, *x.shape[1:])
  return pairs[:, 0], pairs[:, 1]


def _scale(scale: Any, like: Array) -> Array:
  """A scalar or [B] that broadcasts against `like`, in its type."""
  return expand(jnp.asarray(scale, like.dtype), like.ndim)


def _all_but_batch(x: Array) -> tuple[int, ...]:
  return tuple(range(1, x.ndim))
