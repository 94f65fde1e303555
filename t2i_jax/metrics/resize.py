"""How pictures are brought to the size that a network takes, named as scores depend on it.

Parmar, Zhang and Zhu 2022 (On Aliased Resizing and Surprising Subtleties in GAN Evaluation)
measured what the choice does to a Frechet distance.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

Array = jax.Array

# Of the Inception network; each with the words that stand beside a score.
MODES = {
  "clean": "bicubic, antialiased, as clean-fid; (x - 128) / 128",
  "tf1": "bilinear, not antialiased, corners as TensorFlow 1; (x - 128) / 128",
  "torch": "bilinear, not antialiased, as pytorch-fid; x / 127.5 - 1",
}
HIGHEST = jax.lax.Precision.HIGHEST


def inception_input(images: Array, side: int, mode: str) -> Array:
  """Pictures uint8 [B, H, W, 3] -> float32 [B, side, side, 3], as a mode of `MODES` has it."""
  x = images.astype(jnp.float32)
  if mode == "clean":
    x = jnp.clip(antialiased(x, side), 0.0, 255.0)
  elif mode == "tf1":
    x = apply_weights(x, tf1_weights(x.shape[1], side), tf1_weights(x.shape[2], side))
  elif x.shape[1:3] != (side, side):
    shape = (len(x), side, side, x.shape[3])
    x = jax.image.resize(x, shape, "bilinear", antialias=False, precision=HIGHEST)
  return x / 127.5 - 1.0 if mode == "torch" else (x - 128.0) / 128.0


def antialiased(x: Array, side: int) -> Array:
  """Bicubic with a support that grows with the reduction, float [B, H, W, C] -> [B, side, side, C].

  It is what Pillow does to pictures of floating point numbers.
  """
  if x.shape[1:3] == (side, side):
    return x
  return jax.image.resize(x, (len(x), side, side, x.shape[3]), "bicubic", precision=HIGHEST)


def apply_weights(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
  """[B, h, w, C] by weights [H, h] and [W, w] -> [B, H, W, C]."""
  x = jnp.einsum("oh,bhwc->bowc", jnp.asarray(rows, x.dtype), x, precision=HIGHEST)
  return jnp.einsum("pw,bowc->bopc", jnp.asarray(columns, x.dtype), x, precision=HIGHEST)


def tf1_weights(size: int, wanted: int) -> np.ndarray:
  """Of TensorFlow 1's bilinear resize, whose pixels are points at their top left corner: [W, w].

  Its positions are computed in float32, which decides the neighbour now and then.
  """
  at = np.arange(wanted, dtype=np.float32) * np.float32(size / wanted)
  low = np.floor(at).astype(int)
  weights = np.zeros((wanted, size))
  rows, part = np.arange(wanted), at - low
  np.add.at(weights, (rows, np.minimum(low, size - 1)), 1 - part)
  np.add.at(weights, (rows, np.minimum(low + 1, size - 1)), part)
  return weights


def torch_bicubic_weights(size: int, wanted: int) -> np.ndarray:
  """Of PyTorch's bicubic interpolation, a = -0.75, not antialiased, edges repeated: [wanted, size].

  (`jax.image.resize` leaves what lies beyond an edge out instead.)
  """
  a = -0.75
  at = (np.arange(wanted) + 0.5) * (size / wanted) - 0.5
  low = np.floor(at).astype(int)
  weights = np.zeros((wanted, size))
  for step in range(-1, 3):
    distance = np.abs(at - (low + step))
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    values = np.where(distance <= 1, near, far)
    np.add.at(weights, (np.arange(wanted), np.clip(low + step, 0, size - 1)), values)
  return weights


def shorter_side(images: np.ndarray, side: int) -> np.ndarray:
  """As CLIP's pictures are published to be prepared: Pillow's bicubic and the middle, on the host.

  uint8 [N, H, W, 3] -> uint8 [N, side, side, 3]: the shorter side becomes `side`, the longer one is
  rounded down, and the middle is cut out. Pillow rounds to whole levels once for each axis, which
  nothing on a device does.
  """
  height, width = images.shape[1:3]
  if (height, width) == (side, side):
    return images
  shorter = min(height, width)
  size = (math.floor(side * width / shorter), math.floor(side * height / shorter))
  left, top = (round((length - side) / 2) for length in size)
  box = (slice(top, top + side), slice(left, left + side))
  return np.stack([
    np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))[box]
    for image in images
  ])
