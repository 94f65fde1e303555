"""The pictures and captions of one tar shard, for the index."""

import dataclasses
import io
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from t2i_jax.data.images import BadImage, reason_of, size_of, to_rgb
from t2i_jax.data.sets import table
from t2i_jax.data.sets.listing import clean
from t2i_jax.data.sets.tar_index import BadArchive, Member, members, read_at

PICTURES = ("jpg", "jpeg", "png", "webp")
# Bytes of a picture that are read for its size; the headers of some are after large previews.
_HEADER = 64 << 10
# Pictures of a shard that are decoded to see whether it was padded, and how white its bands are.
_TRIED, _WHITE = 8, 250


@dataclasses.dataclass
class Part:
  """A shard's columns, and (name, reason) of what was skipped."""

  columns: dict[str, np.ndarray]
  skipped: list[tuple[str, str]]


@dataclasses.dataclass
class _Sample:
  name: str
  picture: Member
  caption: str
  size: tuple[int, int]  # height, width, as stored
  original: tuple[int, int]


def index(path: Path, name: str, number: int, to: Path) -> None:
  """Indexes a shard.

  Args:
    path: of the tar file.
    name: of the shard in names of pictures and messages.
    number: of the shard in the index.
    to: the file to write, which `read` reads.
  """
  skipped: list[tuple[str, str]] = []
  samples = []
  for key, found in _grouped(path, name, skipped).items():
    try:
      samples.append(_sample(path, f"{name}/{key}", found))
    except _Skip as reason:
      skipped.append((f"{name}/{key}", str(reason)))
  columns = table.columns(
    [sample.name for sample in samples], [[sample.caption] for sample in samples],
    size=np.array([sample.size for sample in samples], np.int32).reshape(-1, 2),
    original=np.array([sample.original for sample in samples], np.int32).reshape(-1, 2),
    place=np.array([(number, s.picture.offset, s.picture.length) for s in samples],
                   np.int64).reshape(-1, 3),
    seen=np.array(_seen(path, samples), np.float32).reshape(-1, 4),
  )
  writing = to.with_suffix(f".{uuid.uuid4().hex[:8]}.writing")  # two may do it at once
  with open(writing, "wb") as file:
    np.savez(file, skipped=np.array(json.dumps(skipped)), **columns)
  writing.replace(to)


def read(path: Path) -> Part:
  """What `index` wrote."""
  with np.load(path, allow_pickle=False) as content:
    columns = dict(content)
  return Part(columns, [tuple(pair) for pair in json.loads(str(columns.pop("skipped")))])


class _Skip(Exception):
  """Why a key is left out."""


def _grouped(path: Path, name: str, skipped: list) -> dict[str, dict[str, Member]]:
  """Members by key and ending; the key is the path up to its last part's first dot."""
  found: dict[str, dict[str, Member]] = {}
  try:
    for member in members(path):
      folder, slash, last = member.name.removeprefix("./").rpartition("/")
      stem, _, ending = last.partition(".")
      if stem and ending:
        found.setdefault(f"{folder}{slash}{stem}", {})[ending.lower()] = member
  except BadArchive as error:
    skipped.append((name, str(error)))
  return found


def _sample(path: Path, name: str, found: Mapping[str, Member]) -> _Sample:
  about = _description(path, found)
  picture = next((found[ending] for ending in PICTURES if ending in found), None)
  if picture is None:
    # img2dataset keeps the captions of what it could not download.
    status = about.get("status", "success")
    raise _Skip("has no picture" if status == "success" else f"has no picture ({status})")
  caption = about.get("caption")
  if "txt" in found:
    caption = read_at(path, found["txt"].offset, found["txt"].length).decode(errors="replace")
  if not isinstance(caption, str) or not clean(caption):
    raise _Skip("has no caption")
  size = _pair(about, "height", "width") or _size(path, picture)
  return _Sample(name, picture, clean(caption), size,
                 _pair(about, "original_height", "original_width") or size)


def _description(path: Path, found: Mapping[str, Member]) -> dict[str, Any]:
  if "json" not in found:
    return {}
  try:
    about = json.loads(read_at(path, found["json"].offset, found["json"].length))
  except (ValueError, RecursionError):
    return {}
  return about if isinstance(about, dict) else {}


def _pair(about: Mapping[str, Any], *keys: str) -> tuple[int, int] | None:
  values = tuple(about.get(key) for key in keys)
  return values if all(type(v) is int and v > 0 for v in values) else None


def _size(path: Path, picture: Member) -> tuple[int, int]:
  """Height and width as it is looked at, from the picture's header."""
  try:
    try:
      return size_of(read_at(path, picture.offset, min(picture.length, _HEADER)))
    except BadImage:
      return size_of(read_at(path, picture.offset, picture.length))
  except BadImage as error:
    raise _Skip(error.reason) from error
  except Exception as error:
    raise _Skip(reason_of(error)) from error


def _seen(path: Path, samples: list[_Sample]) -> list[tuple[float, ...]]:
  """The part of each picture that is no padding: top, left, bottom, right, as fractions."""
  parts = [_unpadded(sample) for sample in samples]
  padded = [n for n, part in enumerate(parts) if part is not None]
  tried = [_has_white_bands(path, samples[n], parts[n]) for n in padded[:_TRIED]]
  whole = (0.0, 0.0, 1.0, 1.0)
  # Most of them: a picture may have bands of its own, or be damaged.
  if 2 * sum(tried) <= len(tried):
    return [whole] * len(samples)
  return [part or whole for part in parts]


def _unpadded(sample: _Sample) -> tuple[float, ...] | None:
  """Where a square's content lies if it was padded; None where it was not square or need not be."""
  (height, width), (tall, wide) = sample.size, sample.original
  if height != width or tall == wide:
    return None
  shares = np.array([tall, wide]) / max(tall, wide)
  # Rounded inwards by half a pixel, which is mixed with the padding.
  before = np.where(shares < 1, (1 - shares) / 2 + 0.5 / height, 0)
  return (*before.tolist(), *(1 - before).tolist())


def _has_white_bands(path: Path, sample: _Sample, part: tuple[float, ...]) -> bool:
  content = read_at(path, sample.picture.offset, sample.picture.length)
  try:
    with Image.open(io.BytesIO(content)) as image:
      pixels = np.asarray(to_rgb(image))
  except Exception:
    return False
  top, left = (int(n * side) for n, side in zip(part[:2], pixels.shape, strict=False))
  bands = (pixels[:top], pixels[pixels.shape[0] - top :], pixels[:, :left],
           pixels[:, pixels.shape[1] - left :])
  bands = [band for band in bands if band.size]
  return bool(bands) and all(band.mean() >= _WHITE for band in bands)
