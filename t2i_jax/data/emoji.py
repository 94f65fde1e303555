"""About 3,800 real drawings with names: the emoji of a font that is installed.

They are drawn by people, not made by a rule, and nothing has to be downloaded:
the pictures are in the font Noto Color Emoji (Debian's fonts-noto-color-emoji)
and the names, in 14 languages, in the Python package `emoji`.
"""

import collections
import hashlib
import io
import logging
import os
import shutil
import tempfile
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from t2i_jax.data.base import FileSource, digest_of
from t2i_jax.data.emoji_font import find_font
from t2i_jax.data.images import BadImage, resize_and_crop, to_rgb
from t2i_jax.errors import UserError, unknown

SPLITS = ("train", "test")


def _cache_dir() -> str:
  home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return os.path.join(home, "t2i_jax", "emoji")


def _prepare(font: str, directory: str) -> None:
  """Writes the data set to `directory`, which appears only when it is whole: two
  hosts may prepare it on a shared disk at the same time."""
  from t2i_jax.data.emoji_builder import EmojiBuilder

  logging.info("preparing the emoji of %s in %s", font, directory)
  os.makedirs(os.path.dirname(directory), exist_ok=True)
  unfinished = tempfile.mkdtemp(prefix="unfinished-", dir=os.path.dirname(directory))
  try:
    builder = EmojiBuilder(font=font, data_dir=unfinished)
    builder.download_and_prepare(file_format="array_record")
    try:
      os.rename(builder.data_dir, directory)
    except OSError:
      if not os.path.isdir(directory):
        raise
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)


def prepared(font: str = "", data_dir: str = "") -> str:
  """The directory of the prepared data set, which is made on first use.

  One directory for each content of the font and version of the names.

  Raises:
    UserError: no such font, a package is missing, or `data_dir` cannot be written.
  """
  font = find_font(font)
  try:
    import emoji

    from t2i_jax.data.emoji_builder import EmojiBuilder
  except ImportError as error:
    raise UserError(
      f"data set 'emoji' needs the packages emoji, fonttools and tensorflow-datasets: {error}"
    ) from None
  try:
    with open(font, "rb") as file:
      digest = hashlib.file_digest(file, "sha256")
  except OSError as error:
    raise UserError(f"cannot read the font '{font}': {error.strerror}") from None
  digest.update(f"{emoji.__version__} {EmojiBuilder.VERSION}".encode())
  directory = os.path.join(data_dir or _cache_dir(), digest.hexdigest()[:16])
  if not os.path.isdir(directory):
    try:
      _prepare(font, directory)
    except OSError as error:
      raise UserError(
        f"cannot write the emoji to '{directory}': {error.strerror}; set option 'data_dir'"
      ) from None
  return directory


def _read(directory: str, split: str) -> list[dict[str, Any]]:
  """Rows of one split, with pictures as PNG and texts as UTF-8."""
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(directory)
    skip = {"image": tfds.decode.SkipDecoding()}
    return list(builder.as_data_source(split=split, decoders=skip))
  except Exception as error:  # the formats' own, such as RuntimeError for a short file
    reason = str(error).split("\n")[0]
    raise UserError(f"cannot read the emoji in '{directory}': {reason}; delete it") from error


class Emoji(FileSource):
  """Emoji over white, padded to a square and resized, with their names.

  Test emoji are about one base in ten with all their variants (`emoji_builder`).
  More than half of all emoji are people, in up to 104 variants of skin tone and
  gender. So an epoch draws every base equally often, with replacement: that gives
  people 10 %, flags 16 %, faces 10 %, food 8 % of it.

  Args:
    split: "train" or "test".
    resolution: side of the pictures, in pixels; drawings have 136.
    seed: not used; the split follows from the emoji.
    data_dir: where the prepared data set is kept; empty is
      `~/.cache/t2i_jax/emoji`, or in `$XDG_CACHE_HOME`.
    font: path of the font; empty finds the installed one.
    languages: of the names; one is drawn each time. Of en, es, ja, ko, pt, it,
      fr, de, fa, id, zh, ru, tr, ar.
    balance: draw bases equally often, not drawings.

  Raises:
    UserError: an unknown split or language, no font, a package is missing, or
      `data_dir` cannot be written.
  """

  def __init__(
    self,
    split: str = "train",
    resolution: int = 64,
    seed: int = 0,
    data_dir: str = "",
    font: str = "",
    languages: tuple[str, ...] = ("en",),
    balance: bool = True,
  ):
    del seed
    if split not in SPLITS:
      raise unknown("split of data set 'emoji'", split, SPLITS)
    rows = _read(prepared(font, data_dir), split)
    if not languages:
      raise UserError("option 'languages' of data set 'emoji' is empty")
    for language in languages:
      if language not in rows[0]["names"]:
        raise unknown("language of emoji names", language, rows[0]["names"])
    self.resolution = resolution
    self._pictures = [row["image"] for row in rows]
    self._names = [tuple(row["names"][k].decode() for k in languages) for row in rows]
    self.emoji = [row["emoji"].decode() for row in rows]
    self.bases = [row["base"].decode() for row in rows]
    if balance:
      count = collections.Counter(self.bases)
      self.weights = np.array([1 / (len(count) * count[base]) for base in self.bases])

  def __len__(self) -> int:
    return len(self._pictures)

  def image(self, index: int) -> np.ndarray:
    """Row's picture, uint8 [R, R, 3]; raises `BadImage` if the file is damaged."""
    try:
      picture = to_rgb(Image.open(io.BytesIO(self._pictures[index])))
    except Exception as error:
      raise BadImage(self.emoji[index], str(error)) from error
    side = max(picture.size)
    return resize_and_crop(ImageOps.pad(picture, (side, side), color="white"), self.resolution)

  def digest(self) -> str:
    return digest_of(*self._pictures)

  def captions_of(self, index: int) -> tuple[str, ...]:
    """Row's names, one for each of the languages."""
    return self._names[index]
