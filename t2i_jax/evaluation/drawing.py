"""Pictures drawn in batches over all devices, kept as they come."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from t2i_jax.data.base import Source
from t2i_jax.evaluation.folder import Shards
from t2i_jax.evaluation.prompt_sets import PromptSet
from t2i_jax.evaluation.reconstructing import Reconstructor
from t2i_jax.parallel.distributed import agree_any, barrier, is_primary
from t2i_jax.pipeline import Pipeline

PICTURES = "pictures"
# Indices of pictures, the first of a shard, to arrays of each shard's pictures; of the last ones
# there may be more than are asked for.
Batches = Callable[[range], Iterator[Mapping[str, np.ndarray]]]


class Stopped(Exception):
  """The command was asked to stop, and has kept what was done."""


def of_prompts(
  pipeline: Pipeline, prompts: PromptSet, seed: int, options: dict[str, Any], size: int
) -> Batches:
  """Drawn pictures: picture i is of prompt i // each with the key of (seed, i).

  Every batch has `size` pictures, the last filled up with its last prompt again: each picture then
  comes from the same compiled program, whatever was interrupted where.
  """
  captions = prompts.captions

  def batches(rows: range) -> Iterator[Mapping[str, np.ndarray]]:
    wanted = captions[rows.start : rows.stop]
    wanted += wanted[-1:] * (-len(wanted) % size)
    drawn = pipeline.batches(wanted, seed, first=rows.start, batch_size=size, **options)
    return ({"images": images} for images in drawn)

  return batches


def of_split(reconstructor: Reconstructor, source: Source, total: int, size: int) -> Batches:
  """The `total` real pictures of a split, encoded and decoded."""
  return lambda rows: reconstructor.batches(source, rows, total, size)


def draw(batches: Batches, shards: Shards, stop: Callable[[], bool], progress: "Progress") -> None:
  """Draws, or reconstructs, what is missing of a point's pictures.

  Args:
    batches: gives them; on several hosts all make each batch together, and the primary writes.
    shards: where they are kept, with the seconds that each batch took.
    stop: whether to end after the batch under way.
    progress: is told.

  Raises:
    Stopped: `stop` said so.
  """
  missing = shards.missing(PICTURES)
  progress.begin(shards.total, shards.total - sum(len(shards.rows(i)) for i in missing))
  for run in _runs(missing):
    drawn = batches(range(shards.rows(run[0]).start, shards.rows(run[-1]).stop))
    for shard in run:
      started, count = time.monotonic(), len(shards.rows(shard))
      arrays = {name: array[:count] for name, array in next(drawn).items()}
      seconds = time.monotonic() - started
      if is_primary():
        warm = shard != missing[0]  # the first of a point compiles
        shards.write(PICTURES, shard, {**arrays, "seconds": seconds, "warm": warm})
      progress.add(count)
      if agree_any(stop()):
        raise Stopped
  barrier("drawn")
  progress.end()


def _runs(shards: list[int]) -> Iterator[list[int]]:
  """Neighbouring shards together, so that a call draws them all."""
  run: list[int] = []
  for shard in shards:
    if run and shard != run[-1] + 1:
      yield run
      run = []
    run.append(shard)
  if run:
    yield run


def seconds_a_picture(shards: Shards) -> tuple[float, bool]:
  """Of the batches that compiled nothing, and True; of all, and False, where there is no such."""
  times = [shards.read(PICTURES, shard) for shard in range(len(shards))]
  warm = [part for part in times if part["warm"]]
  used = warm or times
  # A whole batch is drawn where the last one is filled up.
  return sum(float(part["seconds"]) for part in used) / (len(used) * shards.size), bool(warm)


class Progress:
  """Tells of pictures drawn and their rate: a bar on a terminal, else a line every so often."""

  SECONDS = 15.0  # between two lines

  def __init__(self, name: str, verb: str = "drawn"):
    self._name, self._verb, self._bar = name, verb, None
    self._enabled = is_primary()

  def begin(self, total: int, done: int) -> None:
    self._total, self._done, self._before = total, done, done
    self._started = self._said = time.monotonic()
    if done and self._enabled:
      line = f"  {self._name}: {done}/{total} pictures are {self._verb} already"
      print(line, file=sys.stderr)
    if self._enabled and sys.stderr.isatty() and done < total:
      from tqdm import tqdm

      name = f"{self._name}, {self._verb}"
      self._bar = tqdm(total=total, initial=done, desc=name, unit="picture")

  def add(self, count: int) -> None:
    self.reach(self._done + count)

  def reach(self, done: int) -> None:
    count, self._done = done - self._done, done
    if self._bar is not None:
      self._bar.update(count)
    elif self._enabled and time.monotonic() - self._said > self.SECONDS:
      self._say()

  def end(self) -> None:
    if self._bar is not None:
      self._bar.close()
    elif self._enabled and self._done > self._before:
      self._say()

  def _say(self) -> None:
    self._said = time.monotonic()
    rate = (self._done - self._before) / max(self._said - self._started, 1e-9)
    counts = f"{self._done}/{self._total} pictures {self._verb}"
    print(f"  {self._name}: {counts}, {rate:.3g} a second", file=sys.stderr)


def spread(total: int, count: int) -> np.ndarray:
  """Indices of `count` pictures out of `total`, evenly, the first among them."""
  return np.unique(np.arange(min(count, total)) * total // min(count, total))
