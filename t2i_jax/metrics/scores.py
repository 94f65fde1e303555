"""Pictures in, numbers out: the scores of one stream of pictures."""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.metrics.parts import Batch, Collected, Part
from t2i_jax.metrics.reference import read_arrays, write_arrays
from t2i_jax.metrics.result import Result


@dataclasses.dataclass(frozen=True)
class Seen:
  """The pictures that scores are of.

  Attributes:
    n: how many.
    order: rows of a `Collected` in the order of the pictures' indices, so that no score depends on
      the order in which they came.
    index: of each picture, ascending.
    captions: in that order; empty where there are none.
  """

  n: int
  order: np.ndarray
  index: np.ndarray
  captions: tuple[str, ...]

  def rows(self, part: Collected) -> np.ndarray:
    """What a part collected, in order."""
    return part.array()[self.order]


@dataclasses.dataclass(frozen=True, eq=False)
class Metric:
  """One or a few scores.

  Attributes:
    name: in the registry.
    parts: what it needs kept, by a key that says all of what it is: equal keys are kept once.
    compute: the scores of what was seen, by name.
    needs: what pictures must bring: "captions", "originals", "codes", "latents".
    least: pictures below which there is no score.
    check: raises UserError for pictures of a size (height, width) that cannot be measured.
  """

  name: str
  parts: Mapping[str, Part]
  compute: Callable[[Seen], Sequence[Result]]
  needs: frozenset[str] = frozenset()
  least: int = 2
  check: Callable[[tuple[int, int]], None] = lambda resolution: None


class Scores:
  """Some metrics of one stream of pictures; each network runs once on a picture.

  On several processes each passes the same pictures and has the same results.

  Attributes:
    metrics: by name.
    identity: which metrics, networks, references and options these are; a saved state is of one.
    resolution: (height, width) of the pictures; None before the first.
  """

  def __init__(self, metrics: Sequence[Metric], identity: Mapping[str, Any]):
    self.metrics, self.identity = {metric.name: metric for metric in metrics}, dict(identity)
    self.resolution: tuple[int, int] | None = None
    self._parts = {key: part for metric in metrics for key, part in metric.parts.items()}
    self._index: list[np.ndarray] = []
    self._captions: list[str] = []

  @property
  def n(self) -> int:
    """Pictures so far."""
    return sum(map(len, self._index))

  @functools.cached_property
  def needs(self) -> frozenset[str]:
    """What pictures must bring, of "captions", "originals", "codes" and "latents"."""
    return frozenset().union(*(metric.needs for metric in self.metrics.values()))

  def check(self, resolution: tuple[int, int]) -> None:
    """Raises UserError where pictures (height, width) cannot be measured, before any is drawn."""
    for metric in self.metrics.values():
      metric.check(tuple(resolution))

  def update(
    self, images: np.ndarray, index: Sequence[int] | None = None,
    captions: Sequence[str] | None = None, originals: np.ndarray | None = None,
    codes: np.ndarray | None = None, latents: np.ndarray | None = None,
  ) -> None:
    """Adds pictures.

    Args:
      images: uint8 [N, H, W, 3], all of one size.
      index: of each picture among all; counted on from the last one by default.
      captions: of the pictures.
      originals: uint8, as `images`: what they are reconstructions of.
      codes: int [N, ...] of a tokenizer.
      latents: float32 [N, 4, c] of an autoencoder, as of `latents.sums_of`.

    Raises:
      UserError: a picture is there already, or of another size, or something needed is missing.
    """
    if not len(images):
      return
    index = self._new_index(len(images), index)
    size = tuple(images.shape[1:3])
    if self.resolution is None:
      self.check(size)
    elif size != self.resolution:
      raise UserError(f"pictures of {size[1]}x{size[0]} after some of {self.resolution[1]}x"
                      f"{self.resolution[0]}; measure those of one size together")
    given = {"captions": captions, "originals": originals, "codes": codes, "latents": latents}
    for name, value in given.items():
      wanting = [m.name for m in self.metrics.values() if name in m.needs]
      if wanting and value is None:
        raise UserError(f"{wanting[0]} needs the pictures' {name}; give them, or leave it out")
      if value is not None and len(value) != len(images):
        raise UserError(f"{len(value)} {name} for {len(images)} pictures; give one of each")
    texts = None if captions is None else tuple(captions)
    batch = Batch(np.asarray(images), texts, originals, codes, latents)
    measured = {key: part.measure(batch) for key, part in self._parts.items()}
    # All or nothing: what failed above has left no part with more pictures than others.
    for key, part in self._parts.items():
      part.add(measured[key])
    self.resolution = size
    self._index.append(index)
    if "captions" in self.needs:
      self._captions += texts

  def _new_index(self, count: int, index: Sequence[int] | None) -> np.ndarray:
    seen = np.concatenate([np.zeros(0, np.int64), *self._index])
    if index is None:
      return np.arange(count) + (seen.max() + 1 if len(seen) else 0)
    index = np.asarray(index, np.int64)
    if index.shape != (count,):
      raise UserError(f"{len(index)} indices for {count} pictures; give one of each")
    twice = np.concatenate([index[np.isin(index, seen)], _repeated(index)])
    if len(twice):
      raise UserError(f"picture {twice[0]} was measured already; leave it out")
    if index.min() < 0:
      raise UserError(f"picture {index.min()}: indices begin at 0")
    return index

  def save(self, path: str | os.PathLike) -> None:
    """Writes all that is kept to a file, beside it first."""
    arrays = {"index": np.concatenate([np.zeros(0, np.int64), *self._index])}
    for key, part in self._parts.items():
      arrays |= {f"{key}/{name}": value for name, value in part.state().items()}
    meta = {"identity": self.identity, "resolution": self.resolution, "captions": self._captions}
    write_arrays(path, meta, arrays)

  def restore(self, path: str | os.PathLike) -> None:
    """Takes what `save` wrote; going on from there gives what an uninterrupted run gives.

    Raises:
      UserError: the file is of other metrics, networks, references or options, or not whole.
    """
    meta, arrays = read_arrays(path, required=("index",))
    for name, ours in self.identity.items():
      theirs = meta.get("identity", {}).get(name)
      if theirs != ours:
        raise UserError(f"{path} was measured with {name} {theirs}, and this is {ours}; measure "
                        "anew, or with the same")
    for key, part in self._parts.items():
      prefix = f"{key}/"
      part.restore({
        name.removeprefix(prefix): array for name, array in arrays.items()
        if name.startswith(prefix)
      })
    self._index, self._captions = [arrays["index"]], list(meta["captions"])
    self.resolution = tuple(meta["resolution"]) if meta["resolution"] else None

  def merge(self, other: "Scores") -> None:
    """Adds what another one has of other pictures.

    Raises:
      UserError: it is of other metrics, or of pictures that are there already or of another size.
    """
    if other.identity != self.identity:
      raise UserError("scores of other metrics, networks or references cannot be merged")
    if not other.n:
      return
    if self.resolution not in (None, other.resolution):
      raise UserError(f"scores of pictures of {other.resolution} and {self.resolution} (height, "
                      "width) cannot be merged")
    self._index.append(self._new_index(other.n, np.concatenate(other._index)))
    self._captions += other._captions
    self.resolution = other.resolution
    for key, part in self._parts.items():
      part.merge(other._parts[key])

  def results(self) -> dict[str, Result]:
    """The scores by name.

    Raises:
      UserError: there are fewer pictures than a metric needs.
    """
    for metric in self.metrics.values():
      if self.n < metric.least:
        raise UserError(f"{metric.name} needs at least {metric.least} pictures, and there are "
                        f"{self.n}; draw more, or leave it out")
    index = np.concatenate([np.zeros(0, np.int64), *self._index])
    order = np.argsort(index)
    captions = tuple(self._captions[i] for i in order) if self._captions else ()
    seen = Seen(self.n, order, index[order], captions)
    return {
      result.name: result for metric in self.metrics.values() for result in metric.compute(seen)
    }


def _repeated(index: np.ndarray) -> np.ndarray:
  values, counts = np.unique(index, return_counts=True)
  return values[counts > 1]
