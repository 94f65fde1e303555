"""Distances between pictures in the features of a network."""

import jax
import jax.numpy as jnp

Array = jax.Array
_SMALLEST = 1e-20  # of a squared length


def unit(features: Array) -> Array:
  """[B, H, W, C], each position's channels scaled to length 1, or 0 where they are all 0."""
  features = features.astype(jnp.float32)
  squares = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
  return features * jax.lax.rsqrt(jnp.maximum(squares, _SMALLEST))


def squared_difference(a: Array, b: Array, weights: Array | float = 1.0) -> Array:
  """Between unit features at the same positions, averaged over them, [B, H, W, C] twice -> [B].

  Zhang et al. 2018, equation 1, of one layer.

  Args:
    a, b: features.
    weights: of the channels, [C].
  """
  distance = jnp.sum(weights * jnp.square(unit(a) - unit(b)), axis=-1)
  return jnp.mean(distance, axis=(1, 2))
