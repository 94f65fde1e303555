"""Small data sets, decoded once and kept in memory as uint8.

A gather from memory gives several hundred thousand pictures a second, decoding
a few thousand: what fits is decoded once.
"""

import dataclasses
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import numpy as np

from t2i_jax.data.base import FileSource, Rows, Source, digest_of
from t2i_jax.data.buckets import Buckets
from t2i_jax.data.images import BadImage
from t2i_jax.errors import UserError

MEMORY_LIMIT = 2 << 30


@runtime_checkable
class Checked(Protocol):
  """A source that can tell without decoding which of its files are no pictures."""

  def checked(self) -> FileSource:
    """The source without those rows."""


class InMemory(Source):
  """The readable rows of a `FileSource` whose pictures do not vary, decoded.

  Raises:
    UserError: not one row can be read.
  """

  def __init__(self, source: FileSource, progress: Callable[[int, int], None] | None = None):
    total = len(source)
    buckets = _buckets(source)
    images = [np.empty((np.count_nonzero(buckets.of == n), *shape, 3), np.uint8)
              for n, shape in enumerate(buckets.shapes)]
    # The place of each row among those of its bucket.
    places = np.empty(total, np.int64)
    for n in buckets.used:
      rows = buckets.rows(n)
      places[rows] = np.arange(len(rows))

    def decode(index: int) -> BadImage | None:
      try:
        images[buckets.of[index]][places[index]] = source.image(index)
      except BadImage as error:
        return error
      return None

    errors = []
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
      for done, error in enumerate(pool.map(decode, range(total)), start=1):
        errors.append(error)
        if progress:
          progress(done, total)
    kept = np.array([n for n, error in enumerate(errors) if error is None], np.int64)
    if not len(kept):
      raise UserError(f"not one of {total} pictures can be read, the first is {errors[0]}")
    if len(kept) < total:
      logging.warning("%d of %d pictures cannot be read and are left out", total - len(kept), total)
    self.resolution = source.resolution
    self._buckets, places = buckets.taken(kept), places[kept]
    self.buckets = None if source.buckets is None else self._buckets
    if source.weights is not None:
      weights = source.weights[kept]
      self.weights = weights / weights.sum()
    self._images, self._places, self._source, self._kept = images, places, source, kept
    if not source.quick:
      self._captions = [source.captions_of(int(i)) for i in kept]
      extras = [source.extra_of(int(i)) for i in kept]
      self._extra = {k: np.stack([e[k] for e in extras]) for k in extras[0]}

  def __len__(self) -> int:
    return len(self._kept)

  def fetch(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    buckets = np.unique(self._buckets.of[indices])
    if len(buckets) != 1:
      raise ValueError("rows that are fetched together are of one bucket, these "
                       f"{len(indices)} are of {len(buckets)}: {buckets.tolist()}")
    images = self._images[buckets[0]][self._places[indices]]
    if self._source.mirrors:
      for n, (row, draw) in enumerate(zip(self._kept[indices], draws, strict=True)):
        if self._source.mirrored(int(row), int(draw)):
          images[n] = images[n, :, ::-1]
    return dataclasses.replace(self.describe(indices, draws), image=images)

  def describe(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    if self._source.quick:
      return self._source.describe(self._kept[indices], draws)
    choices = [self._captions[i] for i in indices]
    return Rows(
      image=None,
      captions=[c[int(d) % len(c)] for c, d in zip(choices, draws, strict=True)],
      extra={k: v[indices] for k, v in self._extra.items()},
    )

  def digest(self) -> str:
    """That of the source; where rows are left out, also of which are kept."""
    digest = self._source.digest()
    if len(self) == len(self._source):
      return digest
    return digest_of(digest, self._kept.astype("<i8").tobytes())

  def captions(self) -> Iterator[str]:
    if not self._source.quick:
      return itertools.chain.from_iterable(self._captions)
    if len(self) == len(self._source):
      return self._source.captions()
    return itertools.chain.from_iterable(self._source.captions_of(int(i)) for i in self._kept)

  def every_caption(self) -> Iterator[str]:
    if self._source.quick and len(self) == len(self._source):
      return self._source.every_caption()
    return self.captions()


def in_memory(
  source: Source,
  progress: Callable[[int, int], None] | None = None,
  memory_limit: int = MEMORY_LIMIT,
) -> Source:
  """`source` decoded into memory where it reads files and is small enough.

  Args:
    source: any source; one that does not read files is returned as it is, and so
      is one whose pictures vary.
    progress: called with (rows done, rows) while decoding.
    memory_limit: bytes of uint8 pictures from which on rows are decoded again
      in each epoch instead.

  Raises:
    UserError: not one row can be read.
  """
  if not isinstance(source, FileSource):
    return source
  if source.varies or _pixels(_buckets(source)) * 3 > memory_limit:
    return source.checked() if isinstance(source, Checked) else source
  return InMemory(source, progress)


def _buckets(source: Source) -> Buckets:
  """A source's buckets; one of squares where it has none."""
  if source.buckets is not None:
    return source.buckets
  square = (source.resolution, source.resolution)
  return Buckets((square,), np.zeros(len(source), np.uint8))


def _pixels(buckets: Buckets) -> int:
  counts = np.bincount(buckets.of, minlength=len(buckets.shapes))
  return sum(int(n) * math.prod(shape) for n, shape in zip(counts, buckets.shapes, strict=True))
