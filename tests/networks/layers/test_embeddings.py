import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.layers.embeddings import (
  coordinate_channels,
  sincos_1d,
  sincos_2d,
  timestep_embedding,
)


def test_timestep_embedding_is_cosines_then_sines():
  t = np.array([0, 1, 37, 999])
  frequencies = 10000.0 ** (-np.arange(4) / 4)
  angles = t[:, None] * frequencies
  expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
  # Angles of 1,000 radians keep 4 digits after the point in float32.
  np.testing.assert_allclose(timestep_embedding(jnp.asarray(t), 8), expected, atol=2e-4)


@pytest.mark.parametrize("sine_first", [False, True])
def test_times_are_embedded_with_the_frequencies_of_published_networks(sine_first):
  """To the last place: exponents of float32, as PyTorch computes them, and no other rounding."""
  half = 128
  last = np.float32(half - sine_first)
  exponents = np.float32(-np.log(10000)) * np.arange(half, dtype=np.float32) / last
  angles = np.float32(801) * np.exp(exponents.astype(np.float64)).astype(np.float32)
  waves = [np.cos(angles), np.sin(angles)]
  expected = np.concatenate(waves[::-1] if sine_first else waves)
  found = timestep_embedding(jnp.array([801.0]), 2 * half, sine_first=sine_first)[0]
  np.testing.assert_allclose(found, expected, atol=2e-6)


def test_timestep_embedding_of_odd_width_is_padded():
  embedding = timestep_embedding(jnp.array([5]), 7)
  assert embedding.shape == (1, 7) and embedding[0, -1] == 0


def test_timestep_embedding_is_float32_and_tells_all_times_apart():
  embedding = timestep_embedding(jnp.arange(1000, dtype=jnp.int32), 16)
  assert embedding.dtype == jnp.float32
  distance = np.linalg.norm(np.diff(embedding, axis=0), axis=1)
  assert distance.min() > 0.5


def test_sincos_2d_holds_rows_and_columns():
  table = sincos_2d(3, 5, 16).reshape(3, 5, 16)
  np.testing.assert_allclose(table[2, :, :8], np.tile(sincos_1d(np.array([2]), 8), (5, 1)))
  np.testing.assert_allclose(table[:, 4, 8:], np.tile(sincos_1d(np.array([4]), 8), (3, 1)))
  assert table.dtype == np.float32


@pytest.mark.parametrize("make", [sincos_2d, coordinate_channels])
def test_every_place_has_its_own_vector(make):
  table = make(6, 9, 8).reshape(54, -1)
  distance = np.linalg.norm(table[:, None] - table[None], axis=-1) + 10 * np.eye(54)
  assert distance.min() > 0.1


def test_coordinates_do_not_depend_on_the_resolution():
  # The corner of a coarse picture is where the corner of a fine one is.
  coarse, fine = coordinate_channels(4, 4, 1), coordinate_channels(8, 8, 1)
  between = fine.reshape(4, 2, 4, 2, 4).mean(axis=(1, 3))
  np.testing.assert_allclose(coarse, between, atol=0.02)
  assert coarse.shape == (4, 4, 4) and np.abs(coarse).max() <= 1
