"""One shard of a prepared set: its records, its part of the table, and what was skipped.

  PATH.array_record   the rows, as TFDS serializes them
  PATH.npz            columns of the table
  PATH.json           names and reasons of pictures that were skipped; written last
"""

import dataclasses
import io
import json
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from t2i_jax.data.images import BadImage, lay_on_its_side, open_picture, reason_of, to_rgb
from t2i_jax.data.sets import table
from t2i_jax.data.sets.listing import Picture
from t2i_jax.errors import UserError

# Of pictures that are shrunk: of JPEG, and the longest side that its library writes.
_QUALITY, _LONGEST = 95, 65_500


@dataclasses.dataclass
class Made:
  """A finished shard: its columns, and (name, reason) of what was skipped."""

  columns: dict[str, np.ndarray]
  skipped: list[tuple[str, str]]


def records(path: Path) -> Path:
  """The file of a shard's rows."""
  return path.with_name(f"{path.name}.array_record")


def _with(path: Path, suffix: str) -> Path:
  return path.with_name(f"{path.name}{suffix}")


def is_made(path: Path) -> bool:
  """Whether the shard is there whole."""
  return _with(path, ".json").is_file()


def read(path: Path) -> Made:
  """What `make` wrote beside the records."""
  with np.load(_with(path, ".npz"), allow_pickle=False) as columns:
    return Made(dict(columns), json.loads(_with(path, ".json").read_text()))


def write_job(path: Path, pictures: Sequence[Picture], *arguments: int) -> None:
  """Writes what `make` is to be called with beside a shard, for `make_written`."""
  rows = [dataclasses.astuple(picture) for picture in pictures]
  writing = _with(path, ".job.writing")
  writing.write_text(json.dumps({"pictures": rows, "arguments": arguments}))
  writing.replace(_with(path, ".job"))


def make_written(path: Path) -> None:
  """`make` with the arguments that `write_job` wrote; nothing where the shard is there."""
  if is_made(path):
    return
  job = json.loads(_with(path, ".job").read_text())
  pictures = [
    Picture(name, file, tuple(captions), label, boxes and tuple(map(tuple, boxes)))
    for name, file, captions, label, boxes in job["pictures"]
  ]
  make(path, pictures, *job["arguments"])


def make(path: Path, pictures: Sequence[Picture], size: int, classes: int, boxes: bool) -> None:
  """Reads pictures and writes their shard, whole or not at all, also where two do at once.

  Args:
    path: of the shard, without an ending.
    pictures: to read.
    size: shorter side that larger pictures are shrunk to; 0 takes the files as they are.
    classes: how many the set has, or 0.
    boxes: whether captions are of parts of pictures.

  Raises:
    UserError: the disk is full, or cannot be written.
  """
  from tensorflow_datasets.core import example_serializer, file_adapters

  from t2i_jax.data.sets.builder import features

  kinds = features(classes, boxes)
  serializer = example_serializer.ExampleSerializer(kinds.get_serialized_info())
  names, captions, sizes, labels, parts, skipped = [], [], [], [], [], []

  def rows() -> Iterator[tuple[str, bytes]]:
    for example in examples(pictures, size, skipped):
      names.append(example["name"])
      captions.append(example["captions"])
      sizes.append(example["size"])
      labels.append([example.get("label", -1)])
      parts.extend(example.get("boxes", ()))
      yield example["name"], serializer.serialize_example(kinds.encode_example(example))

  mine = uuid.uuid4().hex[:8]
  writing = _with(path, f".{mine}.writing")
  files = file_adapters.ArrayRecordFileAdapter
  try:
    files.write_examples(writing, rows())
    # The format's writer does not say that the disk was full.
    written = files.num_examples(writing) if names else 0
  except RuntimeError as error:  # the format's own error
    raise UserError(f"cannot write {writing}: {str(error).splitlines()[0]}; check the space "
                    "left") from error
  if written != len(names):
    raise UserError(f"{writing} has {written} of {len(names)} rows; check the space left")
  more = {"label": np.array(labels, np.int32).reshape(-1, 1)} if classes else {}
  if boxes:
    more["boxes"] = np.array(parts, np.float32).reshape(-1, 4)
  columns = table.columns(names, captions, size=np.array(sizes, np.int32).reshape(-1, 2), **more)
  beside = _with(path, f".npz.{mine}.writing")
  with open(beside, "wb") as file:
    np.savez(file, **columns)
  beside.replace(_with(path, ".npz"))
  writing.replace(records(path))
  done = _with(path, f".json.{mine}.writing")
  done.write_text(json.dumps(skipped))
  done.replace(_with(path, ".json"))


def examples(
  pictures: Sequence[Picture], size: int, skipped: list[tuple[str, str]]
) -> Iterator[dict[str, Any]]:
  """Rows as TFDS's features encode them; pictures that cannot be read are added to `skipped`."""
  for picture in pictures:
    try:
      example = _example(picture, size)
    except BadImage as error:
      skipped.append((picture.name, error.reason))
      continue
    if example["captions"]:
      yield example
    else:
      skipped.append((picture.name, "none of its captions is of a part inside it"))


def _example(picture: Picture, size: int) -> dict[str, Any]:
  content, width, height = load(picture.file, size)
  example = {"image": content, "name": picture.name, "captions": list(picture.captions),
             "size": np.array([height, width], np.int32)}
  if picture.label is not None:
    example["label"] = picture.label
  if picture.boxes is not None:
    fractions = [_fractions(box, width, height) for box in picture.boxes]
    kept = [n for n, box in enumerate(fractions) if box is not None]
    example["captions"] = [picture.captions[n] for n in kept]
    example["boxes"] = np.array([fractions[n] for n in kept], np.float32).reshape(-1, 4)
  return example


def _fractions(box: Sequence[float], width: int, height: int) -> tuple[float, ...] | None:
  """(left, top, width, height) in pixels to (top, left, bottom, right) inside the picture; None
  for less than a pixel."""
  left, right = (min(max(x, 0), width) for x in (box[0], box[0] + box[2]))
  top, bottom = (min(max(y, 0), height) for y in (box[1], box[1] + box[3]))
  if not (right - left >= 1 and bottom - top >= 1):  # nor of what is no number
    return None
  return top / height, left / width, bottom / height, right / width


def load(file: str, size: int) -> tuple[bytes, int, int]:
  """A picture file's bytes, shrunk if it is larger, and its own width and height.

  All of it is decoded, JPEG at an eighth if it may be: most downloads have files that end too
  early, whose headers are whole.

  Raises:
    BadImage: it cannot be read.
  """
  try:
    content = Path(file).read_bytes()
    with open_picture(content) as image:
      width, height = image.size
      shrink = size and min(width, height) > size
      if image.format == "JPEG":
        image.draft(None, (2 * size, 2 * size) if shrink else (1, 1))
      image.load()
      if lay_on_its_side(image):
        width, height = height, width
      if not shrink:
        return content, width, height
      rgb = to_rgb(ImageOps.exif_transpose(image))
  except Exception as error:
    raise BadImage(file, reason_of(error)) from error
  scale = size / min(width, height)
  shrunk = round(width * scale), round(height * scale)
  if max(shrunk) > _LONGEST:
    raise BadImage(file, f"{width}x{height}, which at a shorter side of {size} is longer than the "
                   f"{_LONGEST} pixels that JPEG has")
  out = io.BytesIO()
  rgb.resize(shrunk, Image.Resampling.BICUBIC).save(out, "JPEG", quality=_QUALITY, subsampling=0)
  return out.getvalue(), width, height
