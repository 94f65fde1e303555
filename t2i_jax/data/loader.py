"""Batches from sources: which rows are in them, on which host, and in what state.

The order is a pure function of (seed, epoch, global row), and a loader's whole
state is one integer, the number of examples that all hosts together have
consumed. So 1, 2 or 64 hosts see the same global batches, with 0 or 8 workers,
and a run resumes exactly on another number of hosts.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator

import numpy as np

from t2i_jax.data.base import FileSource, Rows, Source
from t2i_jax.data.buckets import Shape
from t2i_jax.data.images import BadImage
from t2i_jax.data.order import BucketedOrder, Order, draws_at, order_of
from t2i_jax.errors import UserError

# Captions to a batch's `text`, or to its `text_embedding`.
ReadText = Callable[[list[str]], dict[str, dict[str, dict[str, np.ndarray]]]]
Batch = dict[str, np.ndarray | dict]

# Rows tried in place of one that cannot be decoded, before giving up.
_SUBSTITUTES = 64
# Shapes that a warning names one by one.
_NAMED = 5
# Elements of the virtual data set behind grain: more batches than any run takes.
_ENDLESS = 2**40


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
  """Rows `indices`, all of one bucket if there are buckets, and the rows really taken: a picture
  that cannot be decoded is replaced by another row that follows from its draw, so the same on all
  hosts.

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
        taken[n] = source.substitute(int(indices[n]), int(draws_at(attempt, draw[None])[0]))
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

  def __init__(self, source: Source, order: Order | BucketedOrder, batch_size: int,
               first: np.ndarray):
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

  A batch has `image` uint8 [b, H, W, 3] if the source gives pictures (squares, or all of the shape
  of one bucket, which is the same on all hosts), what `read_text`
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
    self._order = order_of(seed, source, batch_size)
    self._warn_of_copies()
    self._position = 0
    self._peeked: Batch | None = None
    self._fetched: Iterator | None = None

  def _warn_of_copies(self) -> None:
    """Says which shapes have too few pictures to fill one batch, so that it has some repeatedly."""
    used = self.shapes()
    counts = {shape: len(self._source.buckets.rows(self._source.buckets.shapes.index(shape)))
              for shape, _ in used}
    few = [(count, shape) for shape, count in counts.items() if count < self._batch_size]
    if not few:
      return
    from t2i_jax.parallel.distributed import is_primary  # jax, which no worker process needs

    if not is_primary():
      return
    named = [f"{height}x{width} has {count}" for count, (height, width) in sorted(few)[:_NAMED]]
    logging.warning(
      "%d of %d shapes have fewer pictures than a batch of %d, which is filled with copies of them:"
      " %s%s; use fewer shapes (data.options.buckets)",
      len(few), len(used), self._batch_size, ", ".join(named),
      "..." if len(few) > _NAMED else "",
    )  # fmt: skip

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

  def shapes(self) -> list[tuple[Shape, float]]:
    """(height, width) of the pictures of batches, and what share of the batches has each; empty
    where all are squares."""
    if not isinstance(self._order, BucketedOrder):
      return []
    shares = self._order.shares
    return [(self._source.buckets.shapes[n], float(shares[n]))
            for n in self._source.buckets.used if shares[n]]

  def state(self) -> dict[str, int]:
    """{"position": examples consumed so far by all hosts together}."""
    return {"position": self._position}

  def restore(self, state: dict[str, int]) -> None:
    """Continues from a `state`, of this or another number of hosts."""
    self.close()
    self._position = int(state["position"])
    if isinstance(self._order, BucketedOrder):
      # A whole number of batches, also after a run with batches of another size.
      self._position = -(-self._position // self._batch_size) * self._batch_size

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

  The last batch is filled up with its first row, and `valid` bool [b] is False there,
  as it is for a row whose picture cannot be read. Every host gives the same
  number of batches. A row's caption is always the same one. Where there are buckets, each has
  batches of its own, spread evenly over all of them, so that the first n are in proportion.

  Raises:
    UserError: `rows` are not rows of such a batch.
  """
  own = own_rows(batch_size, rows)
  for batch in _in_turns(source, batch_size):
    valid = own < len(batch)
    indices = batch[np.where(valid, own, 0)]
    taken, rows = fetch_rows(source, indices, draws_at(0, indices))
    yield _batch(rows, indices, read_text) | {"valid": valid & (taken == indices)}


def _in_turns(source: Source, batch_size: int) -> Iterator[np.ndarray]:
  """All rows in batches of one bucket each, of at most `batch_size`.

  Who reads only the first batches shall see the buckets in proportion. So the batches of a bucket
  lie in the middles of as many equal parts of the whole; where those of several coincide, the
  bucket with more rows comes first.
  """
  parts = [np.arange(len(source))]
  if source.buckets is not None:
    parts = [source.buckets.rows(bucket) for bucket in source.buckets.used]
  cut = []
  for rows in parts:
    count = -(-len(rows) // batch_size)
    cut += [((n + 0.5) / count, -len(rows), rows[n * batch_size : (n + 1) * batch_size])
            for n in range(count)]
  return (rows for *_, rows in sorted(cut, key=lambda batch: batch[:2]))
