"""What a data set is to the rest of the project.

A `Source` gives random access to the rows of one split. It knows nothing of
batches, hosts or order: `data/loader.py` decides which global row comes when,
so that the order is the same on 1, 2 or 64 hosts.
"""

import abc
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np

from t2i_jax.data.buckets import Buckets, Shape
from t2i_jax.errors import UserError

# Rows whose captions are looked at to tell one data set from another.
_DESCRIBED = 1024


def digest_of(*parts: Any) -> str:
  """A digest, in hexadecimal, of texts, bytes and whatever else says all of itself as a text."""
  digest = hashlib.sha256()
  for part in parts:
    content = part if isinstance(part, bytes) else str(part).encode(errors="surrogatepass")
    digest.update(b"%d:%b" % (len(content), content))
  return digest.hexdigest()


@dataclasses.dataclass
class Rows:
  """Some rows of a source, decoded.

  Attributes:
    image: uint8 [n, H, W, 3], RGB; None where something in `extra` takes its place.
    captions: n strings, one drawn for each row.
    extra: further arrays with leading axis n (`label`, `size`, `crop`...);
      each becomes a key of the batch.
  """

  image: np.ndarray | None
  captions: list[str]
  extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Source(abc.ABC):
  """One split of a data set, by index.

  Attributes:
    resolution: side of the square pictures, in pixels.
    infinite: rows are made on the fly and any index >= 0 is valid; the loader
      then neither shuffles nor counts epochs.
    shuffled: the first rows are a sample of all of them.
    weights: probabilities [len] by which an epoch is drawn (with replacement),
      or None for a permutation of all rows.
    buckets: which rows have pictures of which shape, or None where all are squares;
      the rows that are fetched together are then of one bucket.
  """

  resolution: int
  infinite: bool = False
  shuffled: bool = False
  weights: np.ndarray | None = None
  buckets: Buckets | None = None

  @abc.abstractmethod
  def __len__(self) -> int:
    """Rows in one epoch."""

  @abc.abstractmethod
  def fetch(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    """Rows `indices` (int64 [n]).

    `draws` (uint64 [n]) is each row's own random number, a pure function of
    (seed, epoch, global row): caption choice and augmentation come from it
    and from nothing else.
    """

  @abc.abstractmethod
  def describe(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    """As `fetch`, but for the pictures, which are not read or made: `image` is None."""

  def digest(self) -> str:
    """Which picture each row has, as far as can be told without reading pictures, in hexadecimal.

    By default a digest of the first rows' captions.
    """
    count = _DESCRIBED if self.infinite else min(len(self), _DESCRIBED)
    rows = self.describe(np.arange(count), np.zeros(count, np.uint64))
    return digest_of(len(self), *rows.captions)

  @abc.abstractmethod
  def captions(self) -> Iterator[str]:
    """Captions of this split, for training a tokenizer; a procedural source
    gives enough of them to hold every word that it can say."""

  @abc.abstractmethod
  def every_caption(self) -> Iterator[str]:
    """Every caption that `fetch` can give, at least once each.

    Raises:
      UserError: there are too many to list.
    """


class FileSource(Source):
  """A source whose rows are read and decoded one by one.

  The loader decodes such a source once into memory if it is small, and
  otherwise hands `shown` to grain's workers.

  Attributes:
    varies: whether a row's picture depends on its draw by more than `mirrored`, so
      that it cannot be decoded once for all.
    mirrors: whether draws mirror pictures at all.
    quick: whether `describe` is answered without opening files.

  Class attributes:
    has_buckets: whether `bucket` can be called, which the data set's option `buckets` does.
  """

  varies: bool = False
  mirrors: bool = False
  quick: bool = False
  has_buckets: ClassVar[bool] = False

  def bucket(self, shapes: tuple[Shape, ...]) -> None:
    """Gives each row's picture the one of these shapes, (height, width), that suits it best.

    Raises:
      UserError: this data set's pictures are squares.
    """
    raise UserError(f"the pictures of {type(self).__name__} are squares; leave option buckets out")

  def substitute(self, index: int, number: int) -> int:
    """The row that is taken in place of one that cannot be read, by a random number."""
    if self.buckets is None:
      return number % len(self)
    rows = self.buckets.rows(int(self.buckets.of[index]))
    return int(rows[number % len(rows)])

  @abc.abstractmethod
  def image(self, index: int) -> np.ndarray:
    """Row's picture, uint8 [H, W, 3] RGB: [R, R, 3], or of its bucket's shape."""

  def drawn(self, index: int, draw: int) -> np.ndarray:
    """Row's picture as its draw crops it, uint8 [H, W, 3]; `image` by default."""
    return self.image(index)

  def mirrored(self, index: int, draw: int) -> bool:
    """Whether the row's draw mirrors its picture."""
    return False

  def shown(self, index: int, draw: int) -> np.ndarray:
    """Row's picture as its draw has it, uint8 [H, W, 3]."""
    image = self.drawn(index, draw)
    return image[:, ::-1] if self.mirrored(index, draw) else image

  @abc.abstractmethod
  def captions_of(self, index: int) -> tuple[str, ...]:
    """Row's captions, at least one."""

  def extra_of(self, index: int) -> dict[str, np.ndarray]:
    """Row's further arrays (scalars or fixed shapes); empty by default."""
    return {}

  def extra(self, index: int, draw: int) -> dict[str, np.ndarray]:
    """Row's further arrays as its draw has them; `extra_of` by default."""
    return self.extra_of(index)

  def caption(self, index: int, draw: int) -> str:
    """The caption that `draw` picks among the row's."""
    choices = self.captions_of(index)
    return choices[int(draw) % len(choices)]

  def fetch(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    images = np.stack([self.shown(int(i), int(d)) for i, d in zip(indices, draws, strict=True)])
    return dataclasses.replace(self.describe(indices, draws), image=images)

  def describe(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    extras = [self.extra(int(i), int(d)) for i, d in zip(indices, draws, strict=True)]
    return Rows(
      image=None,
      captions=[self.caption(int(i), int(d)) for i, d in zip(indices, draws, strict=True)],
      extra={k: np.stack([e[k] for e in extras]) for k in extras[0]} if extras else {},
    )

  def captions(self) -> Iterator[str]:
    for index in range(len(self)):
      yield from self.captions_of(index)

  def every_caption(self) -> Iterator[str]:
    return self.captions()
