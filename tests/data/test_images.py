"""Modes, rotation, resizing and every kind of file that is no picture."""

import io
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image

from t2i_jax.data.images import BadImage, decode, resize_and_crop, size_of

RED = (220, 30, 40)


def encoded(image, **options):
  file = io.BytesIO()
  image.save(file, **({"format": "PNG"} | options))
  return file.getvalue()


def flat(mode, value, size=(12, 12)):
  return Image.new(mode, size, value)


@pytest.mark.parametrize(
  "data, expected",
  [
    (encoded(flat("RGB", RED)), RED),
    (encoded(flat("RGB", RED), format="JPEG", quality=95), RED),
    (encoded(flat("RGB", RED).quantize(4)), RED),
    (encoded(flat("L", 77)), (77, 77, 77)),
    (encoded(flat("1", 1)), (255, 255, 255)),
    (encoded(flat("CMYK", (0, 255, 255, 0)), format="JPEG", quality=95), (255, 0, 0)),
    (encoded(flat("RGBA", RED + (255,))), RED),
    (encoded(flat("RGBA", RED + (0,))), (255, 255, 255)),
    (encoded(flat("RGBA", (0, 0, 0, 128))), (127, 127, 127)),
    (encoded(flat("LA", (0, 0))), (255, 255, 255)),
    (encoded(flat("LA", (50, 255))), (50, 50, 50)),
    (encoded(flat("P", 0), transparency=0), (255, 255, 255)),
    (encoded(flat("RGB", RED), transparency=RED), (255, 255, 255)),
    (encoded(Image.fromarray(np.full((12, 12), 128 * 257, np.uint16))), (128, 128, 128)),
    (encoded(Image.fromarray(np.full((12, 12), 65535, np.uint16)), format="TIFF"), (255,) * 3),
  ],
  ids=range(15),
)
def test_modes(data, expected):
  picture = decode(data, 8)
  assert picture.shape == (8, 8, 3) and picture.dtype == np.uint8
  assert np.abs(picture.astype(int) - expected).max() <= 3


def test_rotation_tag_is_applied():
  image = Image.new("RGB", (16, 16), "white")
  image.paste(RED, (0, 0, 16, 8))  # red above
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned clockwise: red on the right
  picture = decode(encoded(image, format="JPEG", quality=95, exif=exif), 16)
  assert picture[:, 12:, 1].mean() < 60 and picture[:, :4, 1].mean() > 230


@pytest.mark.parametrize("size", [(96, 32), (32, 96)])
def test_centre_is_cropped_and_the_shorter_side_kept(size):
  image = Image.new("RGB", size, "black")
  left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
  image.paste("white", (left, top, left + 32, top + 32))
  picture = decode(encoded(image), 16)
  assert picture[4:-4, 4:-4].min() >= 250
  assert decode(encoded(image.crop((left, top, left + 32, top + 32))), 16).min() == 255


def test_shrinking_is_antialiased():
  stripes = np.zeros((128, 128, 3), np.uint8)
  stripes[:, ::2] = 255
  picture = decode(encoded(Image.fromarray(stripes)), 32)
  assert np.abs(picture[:, 4:-4].astype(int) - 127).max() < 12


def test_large_jpeg_is_close_to_its_full_decoding():
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 255, (12, 12, 3), np.uint8)).resize((800, 600))
  jpeg, png = decode(encoded(image, format="JPEG", quality=95), 48), decode(encoded(image), 48)
  assert np.abs(jpeg.astype(int) - png).mean() < 2


def test_same_size_is_untouched():
  pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
  np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels)), 16), pixels)


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))


@pytest.mark.parametrize("load", [decode, lambda data, _: size_of(data)])
@pytest.mark.parametrize(
  "data, reason",
  [
    (b"", "not a picture"),
    (b"<html>404</html>", "not a picture"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
  ],
)
def test_what_is_no_picture(load, data, reason):
  with pytest.raises(BadImage, match=reason) as raised:
    load(data, 8)
  assert raised.value.path == "<bytes>"


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated(form):
  data = encoded(NOISE, format=form)
  with pytest.raises(BadImage):
    decode(data[: len(data) // 2], 8)


def test_corrupt_png():
  data = bytearray(encoded(NOISE))
  data[200:220] = bytes(20)
  with pytest.raises(BadImage):
    decode(bytes(data), 8)


@pytest.mark.parametrize("limit", [1000, 3000])
def test_decompression_bomb(monkeypatch, limit):
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow only warns at 3000 of 4096
  with warnings.catch_warnings(), pytest.raises(BadImage, match="pixels"):
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    decode(encoded(NOISE), 8)


def test_files(tmp_path):
  path = tmp_path / "a.png"
  path.write_bytes(encoded(flat("RGB", RED)))
  assert decode(path, 4).shape == (4, 4, 3)
  size_of(str(path))
  with pytest.raises(BadImage, match="no such file") as raised:
    decode(str(tmp_path / "b.png"), 4)
  copy = pickle.loads(pickle.dumps(raised.value))
  assert (copy.path, copy.reason) == (str(tmp_path / "b.png"), "no such file")
  with pytest.raises(BadImage):
    decode(tmp_path, 4)


@pytest.mark.parametrize(
  "size, rotated, expected",
  [
    ((96, 32), False, (32, 96)),
    ((32, 96), False, (96, 32)),
    ((96, 32), True, (96, 32)),
  ],
)
def test_the_size_is_of_the_picture_as_it_is_looked_at(size, rotated, expected):
  image = Image.new("RGB", size)
  exif = image.getexif()
  if rotated:
    exif[0x0112] = 6
  assert size_of(encoded(image, format="JPEG", exif=exif)) == expected


def test_size_of_no_picture_is_an_error():
  with pytest.raises(BadImage, match="not a picture"):
    size_of(b"")


def test_pixels_that_need_no_resizing_are_cut_out_as_they_are():
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
  cut = resize_and_crop(image, 24)
  np.testing.assert_array_equal(cut, np.asarray(image)[:, 8:32])
  resized = image.resize((24, 24), Image.Resampling.BICUBIC, box=(8, 0, 32, 24))
  np.testing.assert_array_equal(cut, np.asarray(resized))
  np.testing.assert_array_equal(resize_and_crop(image, (24, 40)), np.asarray(image))
