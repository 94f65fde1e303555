"""Batches made and moved to the devices ahead of their use."""

import collections
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Prefetcher:
  """Iterates over `put(batch)`, computed up to `depth` batches ahead in a thread.

  `state()` is the iterator's state as of the batches that were consumed here,
  whatever the thread has read ahead. An exception in the iterator or in `put`
  comes out of `next` in its turn, after the batches before it, and again on
  every later call.

  Args:
    iterator: gives host batches; its `state()` is recorded if it has one.
    put: moves a batch to the devices; runs in the thread.
    depth: batches kept ready, at least 1.
  """

  def __init__(self, iterator: Iterator, put: Callable[[Any], Any], depth: int = 2):
    self._iterator, self._put, self._depth = iterator, put, depth
    self._state_of = getattr(iterator, "state", lambda: None)
    self._state = self._state_of()
    self._ready = collections.deque()  # of (batch, state)
    self._end: BaseException | None = None
    self._closed = False
    self._changed = threading.Condition()
    self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
    self._thread.start()

  def _run(self) -> None:
    try:
      while True:
        with self._changed:
          self._changed.wait_for(lambda: self._closed or len(self._ready) < self._depth)
          if self._closed:
            return
        item = self._put(next(self._iterator)), self._state_of()
        with self._changed:
          self._ready.append(item)
          self._changed.notify_all()
    except BaseException as error:  # handed to the consumer
      with self._changed:
        self._end = error
        self._changed.notify_all()

  def __iter__(self) -> "Prefetcher":
    return self

  def __next__(self) -> Any:
    with self._changed:
      self._changed.wait_for(lambda: self._ready or self._end is not None or self._closed)
      if self._closed:
        raise StopIteration
      if not self._ready:
        raise self._end
      batch, self._state = self._ready.popleft()
      self._changed.notify_all()
    return batch

  def state(self) -> Any:
    """The iterator's state after the last batch that `next` gave."""
    return self._state

  def close(self) -> None:
    """Stops the thread, waits for it, and closes the iterator if it can be."""
    with self._changed:
      self._closed = True
      self._ready.clear()
      self._changed.notify_all()
    self._thread.join()
    if hasattr(self._iterator, "close"):
      self._iterator.close()

  def __enter__(self) -> "Prefetcher":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()
