"""What a data set is to the rest of the project.

A `Source` gives random access to the rows of one split. It knows nothing of
batches, hosts or order: `data/loader.py` decides which global row comes when,
so that the order is the same on 1, 2 or 64 hosts.
"""

import abc
import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass
class Rows:
  """Some rows of a source, decoded.

  Attributes:
    image: uint8 [n, R, R, 3], RGB.
    captions: n strings, one drawn for each row.
    extra: further arrays with leading axis n (`label`, `size`, `crop`...);
      each becomes a key of the batch.
  """

  image: np.ndarray
  captions: list[str]
  extra: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class Source(abc.ABC):
  """One split of a data set, by index.

  Attributes:
    resolution: side of the square pictures, in pixels.
    infinite: rows are made on the fly and any index >= 0 is valid; the loader
      then neither shuffles nor counts epochs.
    weights: probabilities [len] by which an epoch is drawn (with replacement),
      or None for a permutation of all rows.
  """

  resolution: int
  infinite: bool = False
  weights: np.ndarray | None = None

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
  otherwise hands `image` to grain's workers.
  """

  @abc.abstractmethod
  def image(self, index: int) -> np.ndarray:
    """Row's picture, uint8 [R, R, 3] RGB."""

  @abc.abstractmethod
  def captions_of(self, index: int) -> tuple[str, ...]:
    """Row's captions, at least one."""

  def extra_of(self, index: int) -> dict[str, np.ndarray]:
    """Row's further arrays (scalars or fixed shapes); empty by default."""
    return {}

  def caption(self, index: int, draw: int) -> str:
    """The caption that `draw` picks among the row's."""
    choices = self.captions_of(index)
    return choices[int(draw) % len(choices)]

  def fetch(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    extras = [self.extra_of(int(i)) for i in indices]
    return Rows(
      image=np.stack([self.image(int(i)) for i in indices]),
      captions=[self.caption(int(i), d) for i, d in zip(indices, draws, strict=True)],
      extra={k: np.stack([e[k] for e in extras]) for k in extras[0]} if extras else {},
    )

  def captions(self) -> Iterator[str]:
    for index in range(len(self)):
      yield from self.captions_of(index)

  def every_caption(self) -> Iterator[str]:
    return self.captions()
