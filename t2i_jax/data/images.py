"""Picture files and bytes to uint8 RGB arrays, and what cannot be read.

Pillow's plain `convert("RGB")` is wrong for several modes found in the wild:
16-bit grey is clipped to white, transparency shows whatever colour lies under
it, and a camera's rotation tag is ignored. `decode` handles these; everything
that it cannot read raises `BadImage`, so that a data set can skip the file.
"""

import functools
import io
import math
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
# All of a picture (top, left, bottom, right), and a square in the middle of it (down, across).
WHOLE = (0.0, 0.0, 1.0, 1.0)
CENTRE = (0.5, 0.5)


class BadImage(Exception):
  """A picture that cannot be read.

  Attributes:
    path: the file, or "<bytes>".
    reason: why, in a few words.
  """

  def __init__(self, path: str, reason: str):
    super().__init__(path, reason)  # both as args, so that it can be pickled
    self.path = path
    self.reason = reason

  def __str__(self) -> str:
    return f"{self.path}: {self.reason}"


def reason_of(error: Exception) -> str:
  """What was wrong with a picture, in a few words."""
  if isinstance(error, UnidentifiedImageError):
    return "not a picture in a known format"
  if isinstance(error, FileNotFoundError):
    return "no such file"
  if isinstance(error, PermissionError):
    return "no permission to read it"
  return " ".join(str(error).split()) or type(error).__name__


def to_rgb(image: Image.Image, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
  """`image` of any mode as 8-bit RGB, transparent parts over `background`."""
  if image.mode == "RGB" and "transparency" not in image.info:
    return image
  if image.mode.startswith("I"):
    # 16 bits of grey, which Pillow would clip to 255 when converting.
    grey = np.clip(np.rint(np.asarray(image) / 257), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
  if image.has_transparency_data:
    layer = image.convert("RGBA")
    canvas = Image.new("RGBA", layer.size, background + (255,))
    return Image.alpha_composite(canvas, layer).convert("RGB")
  return image.convert("RGB")


def side_lengths(size: int | tuple[int, int]) -> tuple[int, int]:
  """Height and width of a size; one number is a square's side."""
  return (size, size) if isinstance(size, int) else size


def resize_and_crop(
  image: Image.Image,
  size: int | tuple[int, int],
  part: Sequence[float] = WHOLE,
  place: tuple[float, float] = CENTRE,
) -> np.ndarray:
  """RGB picture to uint8 [H, W, 3]: resized until it just covers that, of which a box is cut out.

  Resampling is Pillow's bicubic, whose support grows with the reduction, which is
  what antialiases. The crop is taken before the resize, as a box in source
  pixels, so that what is thrown away is never computed.

  Args:
    image: the picture.
    size: height and width, H and W, or the side of a square.
    part: of the picture that is looked at: top, left, bottom, right, as fractions.
    place: of the box in that part, down and across: 0 at its beginning, 1 at its end.
  """
  height, width = side_lengths(size)
  top, left, bottom, right = np.multiply(part, (*image.size[::-1], *image.size[::-1])).tolist()
  pixels = min((bottom - top) / height, (right - left) / width)  # of the source, for each of ours
  y = top + (bottom - top - pixels * height) * place[0]
  x = left + (right - left - pixels * width) * place[1]
  box = (x, y, x + pixels * width, y + pixels * height)
  if tuple(part) != WHOLE:
    # Pillow's filter reaches over a box's edges, into what is not to be looked at.
    # Fractions are rounded: a thousandth of a pixel is none.
    edges = (math.floor(left + 1e-3), math.floor(top + 1e-3), math.ceil(right - 1e-3),
             math.ceil(bottom - 1e-3))
    image = image.crop(edges)
    box = tuple(np.subtract(box, edges[:2] * 2).tolist())
  # Rounding may put an edge outside by less than that; Pillow refuses it.
  box = tuple(np.clip(box, 0, image.size * 2).tolist())
  corner = round(box[0]), round(box[1])
  whole = (*corner, corner[0] + width, corner[1] + height)
  if box == whole:  # whole pixels as they are; Pillow would go through all of them for the same
    image = image if whole == (0, 0, *image.size) else image.crop(whole)
  else:
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
  return np.asarray(image)


@functools.cache
def _formats() -> tuple[str, ...]:
  """Raster formats that this Pillow reads; others (EPS) would start programs."""
  Image.init()
  return tuple(name for name in _FORMATS if name in Image.OPEN)


def open_picture(source: str | os.PathLike | bytes) -> Image.Image:
  """The picture, not yet decoded. Pillow itself refuses only twice its limit."""
  file = io.BytesIO(source) if isinstance(source, bytes) else source
  image = Image.open(file, formats=_formats())
  limit = Image.MAX_IMAGE_PIXELS
  if limit and image.width * image.height > limit:
    image.close()
    raise ValueError(f"{image.width}x{image.height}, more than {limit} pixels")
  return image


def _name(source: str | os.PathLike | bytes) -> str:
  return "<bytes>" if isinstance(source, bytes) else os.fspath(source)


# Pillow's decoders raise nearly anything on damaged files: OSError, SyntaxError,
# ValueError, RuntimeError, struct.error... So all of it is taken for damage below.


def decode(
  source: str | os.PathLike | bytes,
  size: int | tuple[int, int],
  part: Sequence[float] = WHOLE,
  place: tuple[float, float] = CENTRE,
) -> np.ndarray:
  """A picture file, or its bytes, as uint8 [H, W, 3] RGB.

  The camera's rotation tag is applied, transparency is laid over white, the
  picture is resized (bicubic, antialiased) until it just covers `size`, and its
  centre is cropped, or what `part` and `place` say (see `resize_and_crop`). Of
  an animation the first frame is taken.

  Args:
    source: the file, or its bytes.
    size: H and W, or the side of a square.
    part, place: as of `resize_and_crop`.

  Raises:
    BadImage: missing, empty, truncated, corrupt, of an unknown format, or
      larger than `PIL.Image.MAX_IMAGE_PIXELS`.
  """
  try:
    with open_picture(source) as image:
      # JPEG can be decoded at 1/2, 1/4 or 1/8; the resize is left twice the size.
      if image.format == "JPEG":
        least = [math.ceil(2 * side / (part[n + 2] - part[n]))
                 for n, side in enumerate(side_lengths(size))]
        image.draft(None, tuple(least if lay_on_its_side(image) else least[::-1]))
      image.load()
      rgb = to_rgb(ImageOps.exif_transpose(image))
  except Exception as error:
    raise BadImage(_name(source), reason_of(error)) from error
  return resize_and_crop(rgb, size, part, place)


def lay_on_its_side(image: Image.Image) -> bool:
  """Whether a picture is looked at turned by a quarter, as far as what has been read of it says."""
  # Not PNG's own method, which decodes the whole picture to find tags behind the pixels.
  return Image.Image.getexif(image).get(0x0112, 1) >= 5


def size_of(source: str | os.PathLike | bytes) -> tuple[int, int]:
  """Height and width of a picture as it is looked at, from its header.

  Raises:
    BadImage: missing, empty, of an unknown format, or too large.
  """
  try:
    with open_picture(source) as image:
      return image.size if lay_on_its_side(image) else image.size[::-1]
  except Exception as error:
    raise BadImage(_name(source), reason_of(error)) from error
