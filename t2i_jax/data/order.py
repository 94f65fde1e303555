"""Which row comes when: pure functions of the seed and of a row's place in the run.

Nothing is remembered from one batch to the next, so that a run goes on at any position, on any
number of hosts.
"""

import numpy as np

from t2i_jax.data.base import Source
from t2i_jax.errors import UserError


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


class BucketedOrder:
  """The same for a source with buckets: all rows of a global batch are of one of them.

  A bucket with n of the N rows fills n / B batches of B rows an epoch; what is not a whole batch is
  carried over, so that after e epochs it has filled e n / B, rounded. The batches of an epoch are
  shuffled. The rows of a bucket follow each other in permutations of all of them, one behind the
  other, or, where the source has weights, in draws with replacement. So each row is used once while
  its bucket's permutation lasts, which is an epoch, give or take a batch; none is left out, and a
  bucket with fewer rows than a batch has its turn now and then.
  """

  def __init__(self, seed: int, source: Source, batch_size: int):
    self.seed, self._size = seed, batch_size
    buckets = source.buckets
    self._rows = [buckets.rows(n) for n in range(len(buckets.shapes))]
    self._shares: list[np.ndarray | None] = [None] * len(self._rows)
    amounts = np.array([len(rows) for rows in self._rows], np.float64)
    if source.weights is not None:
      weights = [source.weights[rows] for rows in self._rows]
      amounts = len(source) * np.array([w.sum() for w in weights])
      self._shares = [w / w.sum() if w.sum() else w for w in weights]
    self._batches_an_epoch = amounts / batch_size
    if not len(source):
      raise UserError("the data set has no rows")
    self._plans: dict[int, np.ndarray] = {}
    self._streams: dict[tuple[int, int], np.ndarray] = {}

  @property
  def shares(self) -> np.ndarray:
    """What part of all batches is of each bucket, [buckets]."""
    return self._batches_an_epoch / self._batches_an_epoch.sum()

  def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (int64 [n]) and draws (uint64 [n]) at global positions (int64 [n]) of one batch."""
    positions = np.asarray(positions, np.int64)
    step = int(positions[0]) // self._size
    bucket, batch = self._place(step)
    rows = self._rows[bucket]
    rounds, offsets = np.divmod(batch * self._size + positions % self._size, len(rows))
    indices = np.empty_like(positions)
    for number in np.unique(rounds):
      here = rounds == number
      indices[here] = rows[self._stream(bucket, int(number))[offsets[here]]]
    return indices, draws_at(self.seed, positions)

  def _done(self, epoch: int) -> np.ndarray:
    """Batches of each bucket before an epoch, int64 [buckets]."""
    return np.floor(epoch * self._batches_an_epoch + 0.5).astype(np.int64)

  def _place(self, step: int) -> tuple[int, int]:
    """The bucket of global batch `step`, and how many batches it has had before."""
    epoch = max(int(step / self._batches_an_epoch.sum()) - 1, 0)
    while self._done(epoch).sum() > step:
      epoch -= 1
    while self._done(epoch + 1).sum() <= step:
      epoch += 1
    plan, before = self._plan(epoch), self._done(epoch)
    place = step - int(before.sum())
    bucket = int(plan[place])
    return bucket, int(before[bucket] + np.count_nonzero(plan[:place] == bucket))

  def _plan(self, epoch: int) -> np.ndarray:
    """The buckets of an epoch's batches, in order."""
    plan = self._plans.get(epoch)
    if plan is None:
      counts = self._done(epoch + 1) - self._done(epoch)
      plan = np.repeat(np.arange(len(counts)), counts)
      plan = np.random.default_rng([self.seed % 2**64, 0, epoch]).permutation(plan)
      # The dict is replaced, never changed, since several threads read it.
      self._plans = {e: p for e, p in self._plans.items() if abs(e - epoch) <= 1} | {epoch: plan}
    return plan

  def _stream(self, bucket: int, number: int) -> np.ndarray:
    """Places in a bucket's rows, in the order of its permutation `number`."""
    order = self._streams.get((bucket, number))
    if order is None:
      rng = np.random.default_rng([self.seed % 2**64, 1 + bucket, number])
      share, count = self._shares[bucket], len(self._rows[bucket])
      order = rng.permutation(count) if share is None else rng.choice(count, count, p=share)
      kept = {k: o for k, o in self._streams.items() if k[0] != bucket or abs(k[1] - number) <= 1}
      self._streams = kept | {(bucket, number): order}
    return order


def order_of(seed: int, source: Source, batch_size: int) -> Order | BucketedOrder:
  """The order of a source's rows in global batches."""
  if source.buckets is None:
    return Order(seed, source)
  return BucketedOrder(seed, source, batch_size)
