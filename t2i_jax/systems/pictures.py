"""Pictures as data sets and files have them, and as systems compute with them."""

import jax
import jax.numpy as jnp

Array = jax.Array


def normalize_images(images: Array) -> Array:
  """uint8 [B, H, W, 3] to float32 in [-1, 1], on the device."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def quantize_images(images: Array) -> Array:
  """Pictures [B, H, W, 3] in [-1, 1], clipped, to uint8: the inverse of `normalize_images`."""
  return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
