"""Order, hosts, resumption, memory, workers, prefetching and evaluation."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from t2i_jax.data.base import FileSource, Rows, Source
from t2i_jax.data.images import BadImage
from t2i_jax.data.loader import Loader, Order, draws_at, evaluation_batches
from t2i_jax.data.memory import InMemory, in_memory
from t2i_jax.data.prefetch import Prefetcher
from t2i_jax.errors import UserError


class Numbers(FileSource):
  """Row i is a picture of colour i, with three captions; rows in `bad` are unreadable."""

  def __init__(self, length=10, weights=None, bad=()):
    self.resolution = 2
    self.weights = weights
    self.length, self.bad = length, frozenset(bad)

  def __len__(self):
    return self.length

  def image(self, index):
    if index in self.bad:
      raise BadImage(f"{index}.png", "damaged")
    return np.full((2, 2, 3), index, np.uint8)

  def captions_of(self, index):
    return tuple(f"{index} {word}" for word in ("a", "b", "c"))

  def extra_of(self, index):
    return {"label": np.int32(index * 10)}


class Endless(Source):
  """Row p is p, at any p."""

  resolution, infinite = 2, True

  def __len__(self):
    return 5

  def fetch(self, indices, draws):
    image = np.broadcast_to(indices.astype(np.uint8)[:, None, None, None], (len(indices), 2, 2, 3))
    return dataclasses.replace(self.describe(indices, draws), image=image)

  def describe(self, indices, draws):
    return Rows(image=None, captions=[f"{i} {d % 7}" for i, d in zip(indices, draws, strict=True)])

  def captions(self):
    return iter(())

  def every_caption(self):
    return iter(())


def tokenize(captions):
  ids = np.array([[int(c.split()[0]), ord(c.split()[1])] for c in captions], np.int32)
  return {"text": {"words": {"ids": ids, "mask": np.ones(ids.shape, bool)}}}


def take(loader, count):
  batches = [next(loader) for _ in range(count)]
  loader.close()
  return batches


def leaves(batch):
  return {**{k: v for k, v in batch.items() if k != "text"}, **batch["text"]["words"]}


def assert_same(ours, theirs):
  assert len(ours) == len(theirs)
  for a, b in zip(map(leaves, ours), map(leaves, theirs), strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key], err_msg=key)
      assert a[key].dtype == b[key].dtype


def joined(hosts):
  """One host's view of the batches that several hosts made."""
  steps = []
  for parts in zip(*hosts, strict=True):
    flat = [leaves(p) for p in parts]
    whole = {k: np.concatenate([f[k] for f in flat]) for k in flat[0]}
    text = {"words": {k: whole.pop(k) for k in ("ids", "mask")}}
    steps.append(whole | {"text": text})
  return steps


def part(batch_size: int, host: int, hosts: int) -> np.ndarray:
  """Rows of host `host`."""
  count = batch_size // hosts
  return np.arange(host * count, (host + 1) * count)


@pytest.fixture(params=["memory", "streaming", "endless"])
def source(request):
  if request.param == "endless":
    return Endless()
  return in_memory(Numbers()) if request.param == "memory" else Numbers()


def test_an_epoch_holds_every_row_once_and_epochs_differ():
  order = Order(3, Numbers(50))
  first, _ = order(np.arange(50))
  second, _ = order(np.arange(50, 100))
  assert sorted(first) == sorted(second) == list(range(50))
  assert list(first) != list(second) != list(range(50))


def test_order_is_a_function_of_seed_and_position_only():
  order = Order(3, Numbers(7))
  whole = order(np.arange(40))
  pieces = [Order(3, Numbers(7))(np.arange(p, p + 5)) for p in range(35, -1, -5)][::-1]
  for n in range(2):
    np.testing.assert_array_equal(whole[n], np.concatenate([p[n] for p in pieces]))
  assert list(Order(4, Numbers(7))(np.arange(40))[0]) != list(whole[0])
  # The value itself is part of the contract: a checkpoint's position names it.
  assert list(whole[0][:7]) == list(np.random.default_rng([3, 0]).permutation(7))


def test_draws_are_uniform_and_distinct():
  draws = draws_at(0, np.arange(100_000))
  assert draws.dtype == np.uint64 and len(np.unique(draws)) == len(draws)
  for shift in (0, 30, 60):
    counts = np.bincount(((draws >> np.uint64(shift)) % np.uint64(16)).astype(int), minlength=16)
    assert abs(counts / len(draws) - 1 / 16).max() < 0.005
  assert not np.intersect1d(draws, draws_at(1, np.arange(100_000))).size
  assert draws_at(-1, np.arange(3)).shape == (3,)


def test_weights_set_the_frequency_of_rows():
  weights = np.array([0.0, 0.1, 0.2, 0.7])
  counts = np.bincount(Order(0, Numbers(4, weights))(np.arange(20_000))[0], minlength=4)
  np.testing.assert_allclose(counts / 20_000, weights, atol=0.015)


def test_captions_vary_between_epochs():
  batches = take(Loader(Numbers(3), tokenize, 3, 0), 30)
  seen = {str(row) for batch in batches for row in leaves(batch)["ids"]}
  assert len(seen) == 9  # three rows, three captions each


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_global_batches(source, hosts):
  one = take(Loader(source, tokenize, 8, 1), 5)  # crosses epochs of 10
  many = [take(Loader(source, tokenize, 8, 1, part(8, h, hosts)), 5) for h in range(hosts)]
  assert all(len(b["image"]) == 8 // hosts for host in many for b in host)
  assert_same(joined(many), one)


def test_batch_contents(source):
  for batch in take(Loader(source, tokenize, 4, 1), 4):
    assert batch["image"].dtype == np.uint8 and batch["image"].shape == (4, 2, 2, 3)
    assert batch["index"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["text"]["words"]["ids"][:, 0], batch["index"])
    if "label" in batch:
      np.testing.assert_array_equal(batch["label"], 10 * batch["index"])


@pytest.mark.parametrize("consumed", [1, 3, 7])
def test_resumes_exactly_also_on_other_hosts(source, consumed):
  whole = take(Loader(source, tokenize, 4, 1), consumed + 4)
  loader = Loader(source, tokenize, 4, 1)
  for _ in range(consumed):
    next(loader)
  loader.peek()
  state = loader.state()
  loader.close()
  assert state == {"position": 4 * consumed}
  for hosts in (1, 2):
    parts = []
    for h in range(hosts):
      resumed = Loader(source, tokenize, 4, 1, part(4, h, hosts))
      resumed.peek()  # what was read before a restore must not survive it
      resumed.restore(state)
      parts.append(take(resumed, 4))
    assert_same(joined(parts), whole[consumed:])


def test_peek_consumes_nothing(source):
  loader = Loader(source, tokenize, 4, 1)
  peeked = [loader.peek(), loader.peek()]
  assert loader.state() == {"position": 0}
  assert_same(peeked, [next(loader)] * 2)
  assert loader.state() == {"position": 4}
  loader.close()


def test_memory_and_streaming_agree():
  rng = np.random.default_rng(0).random(10)
  for weights in (None, rng / rng.sum()):
    source = Numbers(10, weights)
    kept = in_memory(source)
    assert isinstance(kept, InMemory) and list(kept.captions()) == list(source.captions())
    streamed = in_memory(source, memory_limit=119)
    assert streamed is source
    assert_same(take(Loader(kept, tokenize, 4, 1), 6), take(Loader(streamed, tokenize, 4, 1), 6))


def test_progress_is_reported():
  calls = []
  in_memory(Numbers(3), progress=lambda *a: calls.append(a))
  assert calls == [(1, 3), (2, 3), (3, 3)]


def test_worker_processes_keep_the_order():
  source = Numbers(bad=[3])
  here = take(Loader(source, tokenize, 4, 1), 6)
  there = Loader(source, tokenize, 4, 1, workers=2)
  assert_same(take(there, 6), here)
  there.restore({"position": 8})
  assert_same(take(there, 2), here[2:4])


def test_unreadable_rows_are_left_out_of_memory():
  source = in_memory(Numbers(10, np.full(10, 0.1), bad=[2, 5]))
  assert len(source) == 8
  np.testing.assert_allclose(source.weights, 1 / 8)
  rows = source.fetch(np.arange(8), np.zeros(8, np.uint64))
  labels = [0, 1, 3, 4, 6, 7, 8, 9]
  assert list(rows.image[:, 0, 0, 0]) == labels
  assert [int(c.split()[0]) for c in rows.captions] == labels
  assert list(rows.extra["label"] // 10) == labels
  with pytest.raises(UserError, match="not one of 4 pictures can be read, the first is 0.png: dam"):
    in_memory(Numbers(4, bad=range(4)))


def test_unreadable_rows_are_substituted_alike_on_all_hosts():
  source = Numbers(bad=[2, 5])
  one = take(Loader(source, tokenize, 4, 1), 10)
  taken = np.concatenate([b["index"] for b in one])
  assert not {2, 5} & set(taken) and len(set(taken)) == 8
  for batch in one:  # picture, caption and label are of the row really taken
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["text"]["words"]["ids"][:, 0], batch["index"])
    np.testing.assert_array_equal(batch["label"], 10 * batch["index"])
  two = [take(Loader(source, tokenize, 4, 1, part(4, h, 2)), 10) for h in range(2)]
  assert_same(joined(two), one)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_is_a_users_error(workers):
  loader = Loader(Numbers(4, bad=range(4)), tokenize, 2, 0, workers=workers)
  with pytest.raises(UserError, match="pictures in a row cannot be read"):
    next(loader)
  loader.close()


def test_impossible_rows_are_a_users_error():
  with pytest.raises(UserError, match="rows .* are not rows of a batch of 6"):
    Loader(Numbers(), tokenize, 6, 0, np.array([5, 6]))
  with pytest.raises(UserError, match="batch_size 0"):
    Loader(Numbers(), tokenize, 0, 0)
  with pytest.raises(UserError, match="no rows"):
    Loader(Numbers(0), tokenize, 1, 0)


@pytest.mark.parametrize("hosts", [1, 2])
def test_evaluation_gives_every_row_once(hosts):
  source = Numbers(10, np.eye(10)[0], bad=[4])
  parts = [list(evaluation_batches(source, tokenize, 4, part(4, h, hosts))) for h in range(hosts)]
  batches = joined(parts)
  assert [len(b["image"]) for b in batches] == [4, 4, 4]
  valid = np.concatenate([b["valid"] for b in batches])
  index = np.concatenate([b["index"] for b in batches])
  assert valid.dtype == bool and list(index[valid]) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
  assert list(valid[10:]) == [False, False]
  again = list(evaluation_batches(source, tokenize, 4))
  assert_same(batches, again)


class Counter:
  """Counts up to `end`; its state is the last number given."""

  def __init__(self, end, fail_at=None):
    self.now, self.end, self.fail_at, self.closed = 0, end, fail_at, False

  def __next__(self):
    if self.now == self.fail_at:
      raise UserError("line 3 is broken")
    if self.now == self.end:
      raise StopIteration
    self.now += 1
    return self.now

  def state(self):
    return self.now

  def close(self):
    self.closed = True


def wait_until(condition):
  deadline = time.monotonic() + 10
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.001)
  assert condition()


def test_prefetcher_reads_ahead_and_states_what_was_consumed():
  counter = Counter(5)
  with Prefetcher(counter, lambda n: n * 10, depth=2) as ahead:
    wait_until(lambda: counter.now == 2)
    assert ahead.state() == 0
    assert next(ahead) == 10 and ahead.state() == 1
    wait_until(lambda: counter.now == 3)
    assert ahead.state() == 1
    assert list(ahead) == [20, 30, 40, 50] and ahead.state() == 5
    with pytest.raises(StopIteration):
      next(ahead)
  assert counter.closed


def test_prefetched_loader_resumes_from_its_state():
  whole = take(Loader(Numbers(), tokenize, 4, 1), 5)
  with Prefetcher(Loader(Numbers(), tokenize, 4, 1), lambda b: b) as ahead:
    assert_same([next(ahead), next(ahead)], whole[:2])
    state = ahead.state()
  loader = Loader(Numbers(), tokenize, 4, 1)
  loader.restore(state)
  assert_same(take(loader, 3), whole[2:])


def test_prefetcher_raises_in_the_consumer_after_the_good_batches():
  with Prefetcher(Counter(9, fail_at=2), lambda n: n) as ahead:
    assert [next(ahead), next(ahead)] == [1, 2]
    for _ in range(2):
      with pytest.raises(UserError, match="line 3 is broken"):
        next(ahead)

  def put(n):
    raise ValueError("does not fit")

  with Prefetcher(Counter(9), put) as ahead, pytest.raises(ValueError, match="does not fit"):
    next(ahead)


def test_prefetcher_closes_while_the_thread_waits():
  before = set(threading.enumerate())  # others' threads may end meanwhile
  ahead = Prefetcher(Counter(1000), lambda n: n, depth=3)
  next(ahead)
  ahead.close()
  ahead.close()
  assert set(threading.enumerate()) <= before
  assert list(ahead) == []
