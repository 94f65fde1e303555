"""How a condition is obeyed more than the data does."""

import jax
import jax.numpy as jnp

from t2i_jax.diffusion.process import expand

Array = jax.Array


def classifier_free(conditional: Array, unconditional: Array, scale: Array) -> Array:
  """unconditional + scale (conditional - unconditional).

  Ho and Salimans 2022, equation 6, in the convention where scale 1 is the
  conditional model alone (their w + 1). Outputs are affine in the score for
  every parameterization, and the two factors add up to 1, so any of them may
  be guided. `scale` is a scalar or [B].
  """
  scale = expand(jnp.asarray(scale, conditional.dtype), conditional.ndim)
  return unconditional + scale * (conditional - unconditional)


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
