"""Several data sets as one, each with its share."""

import itertools
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from t2i_jax import data
from t2i_jax.data.base import FileSource, digest_of
from t2i_jax.data.buckets import Buckets, Shape
from t2i_jax.errors import UserError, unknown
from t2i_jax.values import typed

SPLITS = ("train", "held_out")


class Mixture(FileSource):
  """Rows of several data sets; an epoch draws each row with replacement, by its set's share.

  Rows are at a position as in every other set: a function of (seed, epoch, global row).

  Args:
    split: "train", or "held_out": the first split of each set that is not trained on, all rows
      of which are rows here.
    resolution: side of the pictures.
    seed: handed to the sets.
    parts: of the mixture, as "NAME SHARE OPTION=VALUE OPTION=VALUE ...", such as "coco 0.7" and
      "folder 0.3 path=photos". Shares are relative.

  Raises:
    UserError: a part is written wrongly, is made on the fly, or has other arrays than the first.
  """

  has_buckets = True

  def __init__(self, split: str = "train", resolution: int = 256, seed: int = 0,
               parts: tuple[str, ...] = ()):
    if split not in SPLITS:
      raise unknown("split of data set 'mixture'", split, SPLITS)
    if not parts:
      raise UserError("data set 'mixture' needs its option 'parts', such as "
                      "data.options.parts='coco 0.7, folder 0.3 path=photos'")
    self.resolution, self._draws = resolution, split == "train"
    self._parts, self._shares = [], []
    for part in parts:
      name, share, options = _read(part)
      its = data.splits(name)[0 if split == "train" else 1]
      source = data.open_source(name, its, resolution, seed, options)
      if not isinstance(source, FileSource):
        raise UserError(f"part '{part}' of the mixture is made on the fly, and has no rows to "
                        "draw; name sets of files")
      self._parts.append(source)
      self._shares.append(share)
    self._check_arrays(parts)
    self._lay_out()
    self.varies = any(source.varies for source in self._parts)
    self.mirrors = any(source.mirrors for source in self._parts)
    self.quick = all(source.quick for source in self._parts)

  def _lay_out(self) -> None:
    """Puts the parts' rows behind each other."""
    lengths = [len(source) for source in self._parts]
    self._starts = np.cumsum([0, *lengths])
    if self._draws:
      within = [np.full(n, 1 / n) if source.weights is None else source.weights
                for n, source in zip(lengths, self._parts, strict=True)]
      total = sum(self._shares)
      self.weights = np.concatenate([
        share / total * weights for share, weights in zip(self._shares, within, strict=True)
      ])  # fmt: skip
      self.weights /= self.weights.sum()

  def _check_arrays(self, parts: Sequence[str]) -> None:
    first, *others = [{k: (v.shape, v.dtype) for k, v in source.extra(0, 0).items()}
                      for source in self._parts]
    for part, other in zip(parts[1:], others, strict=True):
      if other != first:
        raise UserError(f"parts '{parts[0]}' and '{part}' of the mixture give other arrays beside "
                        f"pictures, {sorted(first)} and {sorted(other)}; set the same of labels "
                        "and sizes for all")

  def bucket(self, shapes: tuple[Shape, ...]) -> None:
    for source in self._parts:
      source.bucket(shapes)  # which may leave out rows whose shape is not known
    self._lay_out()
    self.buckets = Buckets(shapes, np.concatenate([s.buckets.of for s in self._parts]))

  def __len__(self) -> int:
    return int(self._starts[-1])

  def part_of(self, index: int) -> tuple[FileSource, int]:
    """The set of a row, and its index there."""
    part = int(np.searchsorted(self._starts, index, side="right")) - 1
    return self._parts[part], index - int(self._starts[part])

  def image(self, index: int) -> np.ndarray:
    """Row's picture, uint8 [H, W, 3]; raises `BadImage`."""
    source, row = self.part_of(index)
    return source.image(row)

  def drawn(self, index: int, draw: int) -> np.ndarray:
    source, row = self.part_of(index)
    return source.drawn(row, draw)

  def mirrored(self, index: int, draw: int) -> bool:
    source, row = self.part_of(index)
    return source.mirrored(row, draw)

  def captions_of(self, index: int) -> tuple[str, ...]:
    """Row's captions."""
    source, row = self.part_of(index)
    return source.captions_of(row)

  def caption(self, index: int, draw: int) -> str:
    source, row = self.part_of(index)
    return source.caption(row, draw)

  def extra_of(self, index: int) -> dict[str, np.ndarray]:
    return self.extra(index, 0)

  def extra(self, index: int, draw: int) -> dict[str, np.ndarray]:
    source, row = self.part_of(index)
    return source.extra(row, draw)

  def captions(self) -> Iterator[str]:
    """Of all sets in turns, so that the first ones that a reader takes are of each."""
    missing = object()
    turns = itertools.zip_longest(*(s.captions() for s in self._parts), fillvalue=missing)
    return (text for turn in turns for text in turn if text is not missing)

  def every_caption(self) -> Iterator[str]:
    return itertools.chain.from_iterable(source.every_caption() for source in self._parts)

  def digest(self) -> str:
    return digest_of(*(source.digest() for source in self._parts))


def _read(part: str) -> tuple[str, float, dict[str, Any]]:
  """A part's name, share and options."""
  try:
    name, *rest = shlex.split(part) or [""]
  except ValueError as error:
    raise UserError(f"part '{part}' of the mixture: {error}; close the quotation") from None
  defaults = data.default_options(name)
  try:
    share = float(rest[0])
  except (IndexError, ValueError):
    raise UserError(f"part '{part}' of the mixture has no share; write '{name} 0.5'") from None
  if not 0 < share < float("inf"):
    raise UserError(f"part '{part}' of the mixture has the share {share}; use a positive number")
  options = {}
  for word in rest[1:]:
    key, equals, value = word.partition("=")
    if not equals or key not in defaults:
      raise unknown(f"option of data set '{name}'", key, defaults)
    if key == data.BUCKETS:
      raise UserError(f"part '{part}' of the mixture has buckets of its own, and batches are of "
                      f"all parts; set data.options.{data.BUCKETS} of the mixture")
    options[key] = typed(f"option {key} of part '{part}'", value, defaults[key])
  return name, share, options
