"""Embeddings of time and of place."""

import math

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def timestep_embedding(
  t: Array, width: int, max_period: float = 10000.0, sine_first: bool = False
) -> Array:
  """Sinusoidal embedding of times [B] -> float32 [B, width].

  Vaswani et al. 2017, section 3.5. Cosines first and frequencies
  max_period^(-i / half) as Dhariwal and Nichol 2021 have them, or, with
  `sine_first`, sines first and frequencies max_period^(-i / (half - 1)) as Ho et
  al. 2020 do.
  """
  half = width // 2
  last = half - 1 if sine_first else half
  # Exponents are rounded to float32 and nothing else is, as in the networks that are
  # loaded: at t = 1000 one place more or less in a frequency is 1e-4 of a radian.
  exponents = np.float32(-math.log(max_period)) * np.arange(half, dtype=np.float32)
  frequencies = np.exp((exponents / np.float32(last)).astype(np.float64)).astype(np.float32)
  angles = t.astype(jnp.float32)[:, None] * frequencies
  waves = [jnp.cos(angles), jnp.sin(angles)]
  embedding = jnp.concatenate(waves[::-1] if sine_first else waves, axis=-1)
  return jnp.pad(embedding, ((0, 0), (0, width - 2 * half)))


def sincos_1d(positions: np.ndarray, width: int) -> np.ndarray:
  """Sine-cosine embedding of positions [N] -> float32 [N, width]; width is even."""
  frequencies = 10000.0 ** (-np.arange(width // 2) / (width / 2.0))
  angles = positions.reshape(-1).astype(np.float64)[:, None] * frequencies
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def sincos_2d(height: int, width: int, channels: int) -> np.ndarray:
  """Fixed 2-D positions [height * width, channels]: half for rows, half for columns."""
  rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
  half = channels // 2
  return np.concatenate([sincos_1d(rows, half), sincos_1d(columns, channels - half)], axis=1)


def patch_positions(rows: np.ndarray, columns: np.ndarray, channels: int) -> np.ndarray:
  """Fixed positions of patches, [len(rows) * len(columns), channels]: half for columns, then rows.

  As diffusion transformers have them; they may be fractional. `sincos_2d` has the halves the other
  way round.
  """
  grid = np.meshgrid(rows, columns, indexing="ij")
  half = channels // 2
  return np.concatenate([sincos_1d(grid[1], half), sincos_1d(grid[0], channels - half)], axis=1)


def coordinate_channels(height: int, width: int, frequencies: int) -> np.ndarray:
  """Sines and cosines of the coordinates in [0, 1], [height, width, 4 * frequencies].

  Added to a convolutional network's input they tell it where it is, which
  global conditioning and convolutions alone cannot (Liu et al. 2018, CoordConv).
  """
  rows, columns = np.meshgrid(
    (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width, indexing="ij"
  )
  scales = np.pi * 2.0 ** np.arange(frequencies)
  angles = np.concatenate([rows[..., None] * scales, columns[..., None] * scales], axis=-1)
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
