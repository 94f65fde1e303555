"""Sheets of samples, each with its prompt below it."""

import functools
import io
import math
import os
import subprocess
from collections.abc import Sequence

import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from t2i_jax.files import write_whole

_CELL = 128  # pixels that a picture has at least, by default
_MARGIN = 4
_LINES = 3  # of a prompt
_NO_GLYPH = "\uffff"  # a code point that no font draws


def prompt_grid(images: np.ndarray, prompts: Sequence[str], columns: int | None = None,
                scale: int | None = None) -> Image.Image:
  """Pictures in rows, each with its prompt wrapped below it.

  Args:
    images: [n,H,W,3], uint8, or floats in [-1,1].
    prompts: n texts; what does not fit into three lines ends in an ellipsis.
    columns: pictures a row; a sheet about as wide as high by default.
    scale: integer enlargement, nearest neighbour; by default to 128 pixels at least.

  Returns:
    An RGB picture.
  """
  images = _to_uint8(np.asarray(images))
  if len(images) != len(prompts) or not prompts:
    raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts")
  count, height, width, _ = images.shape
  columns = min(columns or math.ceil(math.sqrt(count * height / width)), count)
  scale = scale or math.ceil(_CELL / min(height, width))
  images = images.repeat(scale, axis=1).repeat(scale, axis=2)
  height, width = height * scale, width * scale

  size = min(max(width // 11, 10), 22)
  fonts = [_font_for(_drawable(prompt), size) for prompt in prompts]
  texts = [_wrap(_drawable(prompt), font, width) for prompt, font in zip(prompts, fonts,
                                                                         strict=True)]
  line = max(sum(font.getmetrics()) for font in fonts) + 1
  cell_width = width + 2 * _MARGIN
  cell_height = height + line * max(map(len, texts)) + 3 * _MARGIN

  rows = math.ceil(count / columns)
  sheet = Image.new("RGB", (columns * cell_width, rows * cell_height), "white")
  draw = ImageDraw.Draw(sheet)
  for i, (image, font, text) in enumerate(zip(images, fonts, texts, strict=True)):
    x = i % columns * cell_width + _MARGIN
    y = i // columns * cell_height + _MARGIN
    sheet.paste(Image.fromarray(image), (x, y))
    for j, words in enumerate(text):
      draw.text((x, y + height + _MARGIN + j * line), words, font=font, fill="black")
  return sheet


def save_picture(path: str | epath.PathLike, image: Image.Image | np.ndarray) -> None:
  """Writes a PNG, beside and then renamed; creates its folder.

  Raises:
    UserError: it cannot be written.
  """
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  data = io.BytesIO()
  image.save(data, format="PNG")
  write_whole(path, data.getvalue())


def _to_uint8(images: np.ndarray) -> np.ndarray:
  if images.dtype == np.uint8:
    return images
  levels = np.nan_to_num((images.astype(np.float32) + 1) * 127.5)
  return np.round(np.clip(levels, 0, 255)).astype(np.uint8)


def _drawable(prompt: str) -> str:
  """One line of text that every font accepts."""
  return " ".join(prompt.encode("utf-8", "replace").decode().replace("\0", " ").split())


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
  """At most three lines that fit `width`; words longer than a line are cut."""
  lines, rest = [], text
  while rest:
    if len(lines) == _LINES - 1 and font.getlength(rest) > width:
      dots = "..." if _missing(font, "…") else "…"
      end = _fitting(rest, font, width - font.getlength(dots))
      return [*lines, rest[:end].rstrip() + dots]
    end = _fitting(rest, font, width)
    if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 0:
      end = space
    lines.append(rest[:end])
    rest = rest[end:].lstrip()
  return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
  """How many characters fit `width`; one at least."""
  low, high = 1, len(text)
  while low < high:
    middle = (low + high + 1) // 2
    low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
  return low


def _font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
  """Pillow's own font, or a system font that has more of the text's characters."""
  font = _default_font(size)
  missing = "".join(sorted(set(_missing(font, text))))
  if not missing:
    return font
  system = _system_font(missing, size)
  return system if system and len(_missing(system, text)) < len(_missing(font, text)) else font


@functools.lru_cache
def _default_font(size: int) -> ImageFont.FreeTypeFont:
  return ImageFont.load_default(size)


@functools.lru_cache
def _system_font(characters: str, size: int) -> ImageFont.FreeTypeFont | None:
  """What fontconfig offers for some characters, or None without fontconfig or a usable font."""
  pattern = "sans:charset=" + " ".join(f"{ord(c):x}" for c in characters[:64])
  try:
    found = subprocess.run(["fc-match", "-f", "%{file}\n%{index}", pattern],
                           capture_output=True, text=True, check=True, timeout=10).stdout
    path, index = found.split("\n")
    return ImageFont.truetype(os.fspath(path), size, index=int(index))
  except (OSError, ValueError, subprocess.SubprocessError):
    return None


def _missing(font: ImageFont.FreeTypeFont, text: str) -> str:
  """The characters that the font draws as its sign for "no glyph"."""
  box = bytes(font.getmask(_NO_GLYPH))
  return "".join(c for c in text if not c.isspace() and bytes(font.getmask(c)) == box)
