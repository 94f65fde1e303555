"""How pictures are brought to a network's size."""

import numpy as np
import pytest
from PIL import Image

from t2i_jax.metrics import resize


def picture(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("side, wanted", [(24, 37), (37, 24), (64, 9), (24, 24)])
def test_clean_is_pillows_bicubic_of_floating_point_numbers(side, wanted):
  images = picture(side, side)
  channels = [
    np.asarray(Image.fromarray(images[0, ..., c].astype("f4"), mode="F").resize(
      (wanted, wanted), Image.Resampling.BICUBIC
    )) for c in range(3)
  ]  # fmt: skip
  expected = (np.clip(np.stack(channels, -1), 0, 255) - 128) / 128
  found = resize.inception_input(images, wanted, "clean")[0]
  np.testing.assert_allclose(found, expected, atol=0.005 / 128)


def test_tf1_takes_points_at_the_top_left_corner():
  images = picture(5, 5)
  found = resize.inception_input(images, 8, "tf1")[0]
  x = images[0].astype(float)
  for i in range(8):
    for j in range(8):
      (a, b), (c, d) = (divmod(k * 5 / 8, 1) for k in (i, j))
      a, c = int(a), int(c)
      down, right = min(a + 1, 4), min(c + 1, 4)
      top = x[a, c] * (1 - d) + x[a, right] * d
      bottom = x[down, c] * (1 - d) + x[down, right] * d
      np.testing.assert_allclose(found[i, j], (top * (1 - b) + bottom * b - 128) / 128, atol=1e-5)


def test_modes_differ_and_are_the_identity_at_the_networks_own_size():
  images = picture(12, 12)
  for mode in resize.MODES:
    same = np.asarray(resize.inception_input(images, 12, mode))
    x = images.astype(float)
    np.testing.assert_allclose(same, x / 127.5 - 1 if mode == "torch" else (x - 128) / 128,
                               atol=1e-5)  # fmt: skip
  smaller = [np.asarray(resize.inception_input(images, 7, mode)) for mode in resize.MODES]
  for i in range(3):
    assert np.abs(smaller[i] - smaller[i - 1]).max() > 0.02


@pytest.mark.parametrize("height, width", [(30, 30), (20, 33), (33, 20), (9, 9)])
def test_the_shorter_side_is_pillows_and_the_middle_is_cut_out(height, width):
  found = resize.shorter_side(picture(height, width), 16)
  assert found.shape == (1, 16, 16, 3) and found.dtype == np.uint8
  scale = 16 / min(height, width)
  size = int(width * scale + 1e-9), int(height * scale + 1e-9)
  whole = np.asarray(Image.fromarray(picture(height, width)[0]).resize(
    size, Image.Resampling.BICUBIC
  ))  # fmt: skip
  top, left = round((size[1] - 16) / 2), round((size[0] - 16) / 2)
  np.testing.assert_array_equal(found[0], whole[top : top + 16, left : left + 16])


def test_pillow_on_whole_levels_is_not_what_a_device_computes():
  """Why pictures for CLIP are resized on the host."""
  images = picture(48, 48)
  ours = np.round(np.clip(resize.antialiased(images.astype("f4"), 16), 0, 255))
  assert np.abs(ours - resize.shorter_side(images, 16)).max() >= 1
