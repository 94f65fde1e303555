"""The loop's order, what it reads from the device and when, and what it saves."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src.array import ArrayImpl
from test_step import Fake, linear, params, prepared, regression, rows

from t2i_jax.data.prefetch import Prefetcher
from t2i_jax.errors import UserError
from t2i_jax.training import loop
from t2i_jax.training import state as states
from t2i_jax.training.compiled import CompiledStep
from t2i_jax.training.loop import Log, LoopOptions, train
from t2i_jax.training.step import StepOptions, make_step


class Recorder:
  """A loop's surroundings, which write down what happens; the state is the step's number."""

  def __init__(self, total, log_every=1, save_every=0, stop_at=None, bad=(), hooks=(), window=(),
               start=0):
    self.events, self.saves, self.written, self.marks = [], {}, {}, {}
    self._stop_at, self._bad = stop_at, bad
    self.position, self.start = start * 8, start
    self.options = LoopOptions(total, log_every, save_every, batch_size=8)
    self.hooks = [self._hook(name, every) for name, every in hooks]
    self.log = Log(self.options, self._write, window)

  def run(self, hooks_done=None):
    return train(self._step, self.start, self.start, self, self.options, self.log, self._save,
                 self.hooks, lambda step: step == self._stop_at, hooks_done=hooks_done,
                 mark=self._mark)

  def __next__(self):
    self.events.append("batch")
    self.position += 8
    return self.position

  def state(self):
    return {"position": self.position}

  def _hook(self, name, every):
    def hook(step, state):
      assert step == state
      self.events.append(f"{name} {step}")

    hook.name, hook.every = name, every
    return hook

  def _mark(self, step, done):
    self.events.append(f"mark {step}")
    self.marks[step] = list(done)

  def _step(self, state, batch):
    step = state + 1
    self.events.append(f"step {step}")
    good = step not in self._bad
    return step, {"net/loss": np.float32(step if good else np.nan), "net/other": np.float32(1),
                  "net/finite": np.bool_(good), "finite": np.bool_(good)}

  def _save(self, step, state, meta):
    assert step == state
    self.events.append(f"save {step}")
    self.saves[step] = meta

  def _write(self, step, values):
    self.events.append(f"log {step}")
    self.written[step] = values


def test_order_of_an_iteration():
  recorder = Recorder(total=3, save_every=2, hooks=[("draw", 2), ("judge", 2), ("never", 0)])
  assert recorder.run() == (3, 3)
  assert recorder.events == [
    "batch", "step 1",
    "batch", "step 2", "log 1",  # metrics are read when the next step is under way
    "log 2",  # but a save first reads its own step's
    "mark 2", "save 2", "draw 2", "mark 2", "judge 2", "mark 2",  # and is not kept waiting by hooks
    "batch", "step 3",
    "log 3",  # the last step is always saved and evaluated
    "mark 3", "save 3", "draw 3", "mark 3", "judge 3", "mark 3",
  ]
  assert recorder.marks == {2: ["draw", "judge"], 3: ["draw", "judge"]}
  for step, meta in recorder.saves.items():  # the iterator's position is that of the state
    assert meta == {"data": {"position": step * 8}, "window": [], "hooks_due": True}


def test_only_steps_that_are_saved_are_marked():
  recorder = Recorder(total=3, save_every=2, hooks=[("draw", 1)])
  recorder.run()
  assert recorder.events.count("draw 1") == 1 and set(recorder.marks) == {2, 3}
  recorder = Recorder(total=4, save_every=2, hooks=[("draw", 4)])
  recorder.run()
  assert set(recorder.marks) == {4} and not recorder.saves[2]["hooks_due"]


class Gone(BaseException):
  """The machine is taken away."""


def test_a_run_that_ends_in_a_hook_goes_on_with_that_hook():
  recorder = Recorder(total=6, log_every=6, save_every=2, hooks=[("draw", 2), ("judge", 2)])
  judge = recorder.hooks[1]

  def gone(step, state):
    raise Gone

  gone.name, gone.every = judge.name, judge.every
  recorder.hooks[1] = gone
  with pytest.raises(Gone):
    recorder.run()
  assert recorder.events[-4:] == ["mark 2", "save 2", "draw 2", "mark 2"]
  assert recorder.saves[2]["hooks_due"] and recorder.marks == {2: ["draw"]}
  resumed = Recorder(total=6, log_every=6, save_every=2, start=2,
                     hooks=[("draw", 2), ("judge", 2)])
  resumed.run(hooks_done=["draw"])
  assert resumed.events[:4] == ["judge 2", "mark 2", "batch", "step 3"]
  assert resumed.events.count("draw 4") == 1 and resumed.marks[2] == ["draw", "judge"]
  again = Recorder(total=6, start=2, stop_at=2, hooks=[("draw", 2), ("judge", 2)])
  again.run(hooks_done=["draw"])  # asked to stop at once: still the same hook
  assert again.events == ["mark 2", "save 2"] and again.marks == {2: ["draw"]}


def test_without_a_cadence_only_the_last_step_is_saved():
  recorder = Recorder(total=4)
  recorder.run()
  assert list(recorder.saves) == [4]


def test_a_stop_saves_at_once_and_leaves_the_hooks_for_later():
  stopped = Recorder(total=6, log_every=6, save_every=4, stop_at=2, hooks=[("draw", 2)])
  assert stopped.run() == (2, 2)
  assert stopped.events == ["batch", "step 1", "batch", "step 2", "mark 2", "save 2"]
  assert stopped.saves[2]["hooks_due"] and stopped.marks == {2: []}
  resumed = Recorder(total=6, log_every=6, start=2, window=stopped.saves[2]["window"],
                     hooks=[("draw", 2)])
  resumed.run(hooks_done=())
  assert resumed.events[:4] == ["draw 2", "mark 2", "batch", "step 3"]
  again = Recorder(total=6, start=2, hooks=[("draw", 2)])
  again.run()
  assert again.events[:2] == ["batch", "step 3"]


def test_a_finished_run_that_is_started_again_does_nothing_but_see_to_its_checkpoint():
  recorder = Recorder(total=3, start=3, hooks=[("draw", 1)])
  assert recorder.run() == (3, 3)
  assert recorder.events == ["save 3"]


def means(written):
  return {step: {k: v for k, v in values.items() if k.startswith("net/")}
          for step, values in written.items()}


def test_the_window_of_metrics_survives_a_resume():
  whole = Recorder(total=7, log_every=5)
  whole.run()
  assert means(whole.written) == {5: {"net/loss": 3.0, "net/other": 1.0},
                                  7: {"net/loss": 6.5, "net/other": 1.0}}
  assert whole.written[5]["examples"] == 40
  stopped = Recorder(total=7, log_every=5, stop_at=3)
  stopped.run()
  window = stopped.saves[3]["window"]
  assert [entry["net/loss"] for entry in window] == [1, 2, 3]
  resumed = Recorder(total=7, log_every=5, start=3, window=window)
  resumed.run()
  assert means(stopped.written) | means(resumed.written) == means(whole.written)


def test_a_saved_window_does_not_change_while_the_save_is_under_way():
  recorder = Recorder(total=5, log_every=9, save_every=2)
  recorder.run()
  assert [len(recorder.saves[step]["window"]) for step in (2, 4)] == [2, 4]


def test_a_player_that_rests_does_not_spoil_the_mean():
  written = {}
  log = Log(LoopOptions(3, 3, 0, 8), written.__setitem__)
  for step, value in ((1, np.nan), (2, 2.0), (3, 4.0)):
    log.push(step, {"a/loss": np.float32(value), "b/loss": np.float32(np.nan),
                    "finite": np.bool_(True)})
  log.flush()
  assert written[3]["a/loss"] == 3 and "b/loss" not in written[3]


@pytest.mark.parametrize("bad, saved", [(2, []), (3, [2]), (4, [2])])
def test_a_step_that_is_not_finite_stops_the_run_and_is_not_saved(bad, saved):
  recorder = Recorder(total=6, save_every=2, bad=[bad])
  with pytest.raises(UserError, match=rf"step {bad} is not finite \(net/loss=nan\); the"):
    recorder.run()
  assert list(recorder.saves) == saved
  assert recorder.events.count("batch") <= bad + 1  # at most one step later


def test_the_last_step_is_checked_too():
  recorder = Recorder(total=3, bad=[3])
  with pytest.raises(UserError, match="step 3 is not finite"):
    recorder.run()
  assert not recorder.saves


def test_collections_that_are_not_finite_are_named():
  log = Log(LoopOptions(3, 1, 0, 8), lambda step, values: None)
  log.push(1, {"net/loss": np.float32(1), "net/finite": np.bool_(False), "rest/loss":
               np.float32(np.nan), "rest/finite": np.bool_(True), "finite": np.bool_(False)})
  with pytest.raises(UserError, match=r"step 1 is not finite \(net: collections\)"):
    log.flush()


class Guard:
  """Makes every conversion of a device array to the host fail, but where it is `allowed`."""

  def __init__(self, monkeypatch):
    self._allowed = 0
    self.reads = 0
    host_read = loop.host_read
    monkeypatch.setattr(ArrayImpl, "_value", property(self._guarded(ArrayImpl._value.fget)))
    for name in ("__array__", "block_until_ready"):
      monkeypatch.setattr(ArrayImpl, name, self._guarded(getattr(ArrayImpl, name)))
    for module, names in ((jax, ("device_get", "block_until_ready")), (np, ("asarray", "array"))):
      for name in names:  # numpy takes a CPU array's buffer without asking it
        monkeypatch.setattr(module, name, self._guarded(getattr(module, name)))

    def read(tree):
      self.reads += 1
      with self.allowed():
        return host_read(tree)

    monkeypatch.setattr(loop, "host_read", read)

  @contextlib.contextmanager
  def allowed(self):
    self._allowed += 1
    yield
    self._allowed -= 1

  def _guarded(self, function):
    def guarded(*args, **kwargs):
      if not self._allowed and isinstance(args[0], jax.Array):
        raise AssertionError("a device array was read outside the loop's host_read")
      return function(*args, **kwargs)
    return guarded


@pytest.mark.parametrize("convert", [
  float, int, bool, lambda x: np.asarray(x), lambda x: np.array(x), lambda x: x.item(),
  lambda x: x.tolist(), lambda x: f"{x}", lambda x: x == 1 and True,
  lambda x: jax.device_get(x), lambda x: jax.block_until_ready(x), lambda x: x.block_until_ready(),
])
def test_the_guard_sees_every_conversion(convert, monkeypatch):
  x = jnp.ones(())
  with monkeypatch.context() as patch:
    Guard(patch)
    with pytest.raises(AssertionError, match="outside the loop's host_read"):
      convert(x)


def test_no_step_waits_for_the_host(monkeypatch):
  """Real steps, prefetched batches and progress: one read a step, and nothing else."""
  system, batch = regression()
  optimizers = {"net": optax.adam(0.1)}
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  state = jax.device_put(states.create(system, optimizers, system.made, {}, True), one)
  placed = jax.tree.map(lambda _: one, state)
  step = CompiledStep(make_step(system, optimizers, StepOptions()), placed)
  step.program(state, jax.device_put(batch, one))
  options = LoopOptions(10, 3, 4, batch_size=12, flops=1.0, peak_flops=1.0)
  seen = {"saved": [], "hooked": [], "progress": []}

  class Batches:
    position = 0

    def __next__(self):
      self.position += 12
      return batch

    def state(self):
      return {"position": self.position}

  guard = Guard(monkeypatch)

  def save(step, state, meta):
    with guard.allowed():
      seen["saved"].append((step, int(state.step), meta["data"]["position"]))

  def hook(step, state):
    with guard.allowed():
      seen["hooked"].append((step, int(state.step)))

  hook.name, hook.every = "look", 5
  log = Log(options, lambda step, values: None)
  # The guard of jax keeps off what would go to the device unasked; on a CPU it lets reads pass.
  with (Prefetcher(Batches(), lambda b: jax.device_put(b, one)) as batches,
        jax.transfer_guard_host_to_device("disallow")):
    train(
      step, state, 0, batches, options, log, save, [hook],
      progress=lambda step, loss: seen["progress"].append((step, loss)),
    )
  assert guard.reads == 10
  assert seen["saved"] == [(4, 4, 48), (8, 8, 96), (10, 10, 120)]
  assert seen["hooked"] == [(5, 5), (10, 10)]
  assert [step for step, _ in seen["progress"]] == list(range(10))
  assert step.compilations == 1


def test_metrics_are_read_one_step_late(monkeypatch):
  """By the time a step's metrics are read, the next one has been handed to the device."""
  order = []
  monkeypatch.setattr(loop, "host_read", lambda tree: order.append("read") or jax.device_get(tree))
  step, state = prepared(Fake((linear("a"),), params(a=1)))

  def counted(state, batch):
    order.append("step")
    return step(state, batch)

  class Batches:
    def __next__(self):
      return rows(1)

    def state(self):
      return {}

  options = LoopOptions(4, 1, 0, 1)
  train(counted, state, 0, Batches(), options, Log(options, lambda *_: None), lambda *_: None)
  assert order == ["step", "step", "read", "step", "read", "step", "read", "read"]


def test_a_few_steps_behind_a_save_give_no_rate():
  """Their metrics may be read in a burst, long after they were done."""
  written = {}
  log = Log(LoopOptions(100, 10, 0, 4), written.__setitem__)

  def steps(first, last):
    for step in range(first, last + 1):
      log.push(step, {"a/loss": np.float32(1), "finite": np.bool_(True)})

  steps(1, 7)
  log.restart_clock()
  steps(8, 12)
  log.restart_clock()
  steps(13, 21)
  assert "steps_per_second" not in written[10] and written[10]["examples"] == 40
  assert written[20]["steps_per_second"] > 0
