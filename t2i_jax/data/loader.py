"""Batches from sources: which row comes when, on which host, and in what state.

The order is a pure function of (seed, epoch, global row), and a loader's whole
state is one integer, the number of examples that all hosts together have
consumed. So 1, 2 or 64 hosts see the same global batches, with 0 or 8 workers,
and a run resumes exactly on another number of hosts.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator

import numpy as np

from t2i_jax.data.base import FileSource, Rows, Source
from t2i_jax.data.images import BadImage
from t2i_jax.errors import UserError

# Captions to a batch's `text`, or to its `text_embedding`.
ReadText = Callable[[list[str]], dict[str, dict[str, dict[str, np.ndarray]]]]
Batch = dict[str, np.ndarray | dict]

# Rows tried in place of one that cannot be decoded, before giving up.
_SUBSTITUTES = 64
# Elements of the virtual data set behind grain: more batches than any run takes.
_ENDLESS = 2**40


def _mix(x: np.ndarray) -> np.ndarray:
  """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014, section 4)."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def draws_at(seed: int, positions: np.ndarray) -> np.ndarray:
  """A uint64 random number for each global position [n], a pure function of both."""
  gamma = np.uint64(0x9E3779B97F4A7C15)
  start = _mix(np.array([seed], np.int64).view(np.uint64) + gamma)
  return _mix(start + (np.asarray(positions).astype(np.uint64) + np.uint64(1)) * gamma)


class Order:
  """Which row of a source stands at a global position.

  Position p lies in epoch p // N; each epoch is a permutation of all N rows, or
  N draws with replacement where the source has weights. Rows of an infinite
  source are their own positions.
  """

  def __init__(self, seed: int, source: Source):
    self.seed = seed
    self.length = len(source)
    self.infinite = source.infinite
    self.weights = source.weights
    self._epochs: dict[int, np.ndarray] = {}
    if not self.infinite and self.length == 0:
      raise UserError("the data set has no rows")

  def epoch(self, epoch: int) -> np.ndarray:
    """Rows of one epoch in order, int64 [N]."""
    order = self._epochs.get(epoch)
    if order is None:
      rng = np.random.default_rng([self.seed % 2**64, epoch])
      if self.weights is None:
        order = rng.permutation(self.length)
      else:
        order = rng.choice(self.length, self.length, p=self.weights)
      # Two epochs meet in one batch. The dict is replaced, never changed, since
      # several threads read it.
      self._epochs = {e: o for e, o in self._epochs.items() if abs(e - epoch) <= 1} | {epoch: order}
    return order

  def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (int64 [n]) and draws (uint64 [n]) at global positions (int64 [n])."""
    positions = np.asarray(positions, np.int64)
    draws = draws_at(self.seed, positions)
    if self.infinite:
      return positions, draws
    epochs, offsets = np.divmod(positions, self.length)
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs):
      here = epochs == epoch
      indices[here] = self.epoch(int(epoch))[offsets[here]]
    return indices, draws


def own_rows(batch_size: int, rows: np.ndarray | None) -> np.ndarray:
  """Which rows of each global batch this host reads, int64, ascending; all of them for None.

  Raises:
    UserError: there are none, or they are not rows of such a batch.
  """
  if batch_size <= 0:
    raise UserError(f"batch_size {batch_size} is not a positive number")
  own = np.arange(batch_size) if rows is None else np.asarray(rows, np.int64)
  if not len(own) or own.min() < 0 or own.max() >= batch_size:
    raise UserError(f"this host's rows {own} are not rows of a batch of {batch_size}")
  return own


def fetch_rows(source: Source, indices: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, Rows]:
  """Rows `indices`, and the rows really taken: a picture that cannot be decoded
  is replaced by another row that follows from its draw, so the same on all hosts.

  Raises:
    UserError: no substitute could be decoded either.
  """
  if not isinstance(source, FileSource):
    return indices, source.fetch(indices, draws)
  taken, images = np.array(indices), []
  for n, draw in enumerate(draws):
    for attempt in range(_SUBSTITUTES):
      try:
        images.append(source.shown(int(taken[n]), int(draw)))
        break
      except BadImage as error:
        last = error
        taken[n] = draws_at(attempt, draw[None])[0] % np.uint64(len(source))
    else:
      raise UserError(f"{_SUBSTITUTES} pictures in a row cannot be read, the last is {last}")
  return taken, dataclasses.replace(source.describe(taken, draws), image=np.stack(images))


def _batch(rows: Rows, indices: np.ndarray, read_text: ReadText) -> Batch:
  # An infinite source's positions may pass 2^31; `index` is an int32 on devices.
  return {
    **({} if rows.image is None else {"image": rows.image}),
    **read_text(rows.captions),
    "index": (indices % 2**31).astype(np.int32),
    **rows.extra,
  }


class _HostBatches:
  """This host's batches from a position on, as the random access that grain maps."""

  def __init__(self, source: Source, order: Order, batch_size: int, first: np.ndarray):
    """`first` holds the global positions of this host's rows in the first batch."""
    self._source, self._order = source, order
    self._batch_size, self._first = batch_size, first

  def __len__(self) -> int:
    return _ENDLESS

  def __getitem__(self, step: int) -> tuple[np.ndarray, Rows] | UserError:
    positions = self._first + int(step) * self._batch_size
    try:
      return fetch_rows(self._source, *self._order(positions))
    except UserError as error:
      return error  # raised again by the loader: grain would wrap it


def _through_grain(batches: _HostBatches, workers: int) -> Iterator:
  """`batches` read ahead: by threads of this process, or by worker processes.

  Threads suit large JPEGs, whose decoding releases the interpreter's lock;
  small pictures want processes.
  """
  try:
    from absl import flags
    from grain import python as grain
  except ImportError as error:
    raise UserError(f"this data set is read through grain, which cannot be imported ({error}): "
                    "pip install grain, or raise data.memory_limit_mb and set data.workers=0 to "
                    "keep its pictures in memory") from error

  if not flags.FLAGS.is_parsed():  # grain's workers read absl flags
    flags.FLAGS.mark_as_parsed()
  threads = 1 if workers else min(4, os.cpu_count() or 1)
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  dataset = grain.MapDataset.source(batches).to_iter_dataset(options)
  if workers:
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    )
  return iter(dataset)


class Loader:
  """Endless iterator of this host's numpy batches.

  A batch has `image` uint8 [b, R, R, 3] if the source gives pictures, what `read_text`
  returns, `index` int32 [b] and the source's further arrays, where b is how many of
  the global batch's B rows this host reads.

  Args:
    source: where rows come from; see `in_memory`.
    read_text: captions to {"text": {encoder: {"ids", "mask"}}}, or to {"text_embedding":
      {encoder: features by field}}.
    batch_size: B, over all hosts.
    seed: of the order and of the draws.
    rows: of the global batch, that this host reads; `parallel.mesh.host_rows`
      knows them. All of them by default.
    workers: processes that fetch rows; 0 fetches in this process (in threads,
      if the source reads files).

  Raises:
    UserError: `rows` are not rows of such a batch.
  """

  def __init__(
    self,
    source: Source,
    read_text: ReadText,
    batch_size: int,
    seed: int,
    rows: np.ndarray | None = None,
    workers: int = 0,
  ):
    self._source, self._read_text, self._workers = source, read_text, workers
    self._batch_size = batch_size
    self._rows = own_rows(batch_size, rows)
    self._order = Order(seed, source)
    self._position = 0
    self._peeked: Batch | None = None
    self._fetched: Iterator | None = None

  def __iter__(self) -> "Loader":
    return self

  def _start(self) -> Iterator:
    batches = _HostBatches(
      self._source, self._order, self._batch_size, self._position + self._rows
    )
    if self._workers or isinstance(self._source, FileSource):
      return _through_grain(batches, self._workers)
    return (batches[step] for step in range(_ENDLESS))

  def peek(self) -> Batch:
    """The batch that the next `next` gives; the state does not change."""
    if self._peeked is None:
      if self._fetched is None:
        self._fetched = self._start()
      fetched = next(self._fetched)
      if isinstance(fetched, UserError):
        raise fetched
      indices, rows = fetched
      self._peeked = _batch(rows, indices, self._read_text)
    return self._peeked

  def __next__(self) -> Batch:
    batch = self.peek()
    self._peeked = None
    self._position += self._batch_size
    return batch

  def state(self) -> dict[str, int]:
    """{"position": examples consumed so far by all hosts together}."""
    return {"position": self._position}

  def restore(self, state: dict[str, int]) -> None:
    """Continues from a `state`, of this or another number of hosts."""
    self.close()
    self._position = int(state["position"])

  def close(self) -> None:
    """Ends the workers; a later `next` starts them again."""
    fetched, self._fetched, self._peeked = self._fetched, None, None
    if fetched is not None:
      fetched.close()


def evaluation_batches(
  source: Source,
  read_text: ReadText,
  batch_size: int,
  rows: np.ndarray | None = None,
) -> Iterator[Batch]:
  """Every row once, in order: this host's part of each global batch.

  The last batch is filled up with row 0, and `valid` bool [b] is False there,
  as it is for a row whose picture cannot be read. Every host gives the same
  number of batches. A row's caption is always the same one.

  Raises:
    UserError: `rows` are not rows of such a batch.
  """
  own = own_rows(batch_size, rows)
  for start in range(0, len(source), batch_size):
    positions = start + own
    valid = positions < len(source)
    indices = np.where(valid, positions, 0)
    taken, rows = fetch_rows(source, indices, draws_at(0, indices))
    yield _batch(rows, indices, read_text) | {"valid": valid & (taken == indices)}
