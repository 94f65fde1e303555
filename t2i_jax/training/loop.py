"""The one training loop. It knows no system, no data set and no file format.

An iteration is, in this order: save, evaluate and sample, take the next batch,
step, write metrics. The order is an invariant: what is saved at step n is the
state after n steps, with the position of the data iterator after n batches. It
is saved before its hooks, so that a run that ends in a long one loses nothing:
the next one runs the hooks of that step which are not done.

No step waits for the host. Metrics are read one step late, when the next step
is already under way. Only a save waits, for its own step: it must know that
what it stores is finite.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import jax

from t2i_jax.errors import UserError
from t2i_jax.training.state import State


class Hook(Protocol):
  """Something done every so often with the state: evaluation, sampling.

  Attributes:
    name: which one it is; each hook of a run has its own.
    every: steps between two calls; 0 for never.
  """

  name: str
  every: int

  def __call__(self, step: int, state: State) -> None: ...


class Batches(Protocol):
  """What the loop needs of the loader."""

  def __next__(self) -> Any: ...
  def state(self) -> Mapping[str, int]: ...


@dataclasses.dataclass(frozen=True)
class LoopOptions:
  """Attributes:
    total: steps of the run.
    log_every, save_every: cadences in steps; `save_every` 0 saves at the end only.
    batch_size: examples a step, over all hosts.
    flops: of one step over all devices; 0 when not known.
    peak_flops: of all devices together; 0 when not known.
  """

  total: int
  log_every: int
  save_every: int
  batch_size: int
  flops: float = 0.0
  peak_flops: float = 0.0


def host_read(tree: Any) -> Any:
  """The loop's one way from the device to the host; it waits for `tree`."""
  return jax.device_get(tree)


class Log:
  """Per-step metrics, averaged over windows of `log_every` steps.

  A checkpoint carries the open window, so that a resumed run writes what an
  uninterrupted one would have.
  """

  def __init__(self, options: LoopOptions, write: Callable[[int, dict], None],
               window: Sequence[Mapping[str, float]] = ()):
    self._options, self._write = options, write
    self._window = [dict(entry) for entry in window]
    self._pending: tuple[int, Any] | None = None
    self._since: tuple[int, float] | None = None
    self.loss: float | None = None

  def push(self, step: int, metrics: Any) -> None:
    """Takes the metrics of a step under way; reads those of the step before."""
    self.flush()
    self._pending = (step, metrics)

  def flush(self) -> None:
    """Reads the metrics not read yet.

    Raises:
      UserError: if their step was not finite.
    """
    if self._pending is None:
      return
    (step, metrics), self._pending = self._pending, None
    values = host_read(metrics)
    _check_finite(step, values)
    now = time.monotonic()
    shown = {k: float(v) for k, v in values.items() if v.dtype != bool}
    self.loss = next((v for k, v in shown.items() if k.endswith("/loss")), None)
    self._window.append(shown)
    if self._since is None:  # the first step's time holds what came before it
      self._since = (step, now)
    if step % self._options.log_every == 0 or step == self._options.total:
      self._write(step, {**_means(self._window), **self._speed(step, now)})
      self._window = []
      self._since = (step, now)

  def window(self) -> list[dict[str, float]]:
    """What an unfinished window holds, for a checkpoint written while steps go on; JSON values."""
    return [dict(entry) for entry in self._window]

  def restart_clock(self) -> None:
    """Leaves what happens between two steps (a save, an evaluation) out of the speed."""
    self._since = None

  def _speed(self, step: int, now: float) -> dict[str, float]:
    start, then = self._since
    values: dict[str, float] = {"examples": step * self._options.batch_size}
    # A few steps behind a save or an evaluation say little: some were done before they were read.
    if step == start or 2 * (step - start) < len(self._window):
      return values
    rate = (step - start) / (now - then)
    values |= {"steps_per_second": rate, "examples_per_second": rate * self._options.batch_size}
    if self._options.flops:
      values["flops_per_second"] = rate * self._options.flops
    if self._options.flops and self._options.peak_flops:
      values["mfu"] = rate * self._options.flops / self._options.peak_flops
    return values


def train(
  step_function: Callable[[State, Any], tuple[State, Any]],
  state: State,
  step: int,
  batches: Batches,
  options: LoopOptions,
  log: Log,
  save: Callable[[int, State, dict[str, Any]], None],
  hooks: Sequence[Hook] = (),
  stop: Callable[[int], bool] = lambda step: False,
  progress: Callable[[int, float | None], None] = lambda step, loss: None,
  hooks_done: Collection[str] | None = None,
  mark: Callable[[int, list[str]], None] = lambda step, done: None,
) -> tuple[State, int]:
  """Trains from `step` to `options.total`, or until `stop`.

  Args:
    step_function: the compiled step; it donates its state.
    state, step: where to begin; `step` is the state's own, on the host.
    batches: gives device batches; its position is saved with the state.
    options: of the loop.
    log: where metrics go.
    save: `(step, state, meta)`, in the background; `meta` is JSON, and says whether hooks of the
      step are yet to run.
    hooks: called at their cadence and at the end, unless the run is stopping: there is no time
      then.
    stop: asked at every step; all hosts must get the same answer.
    progress: told the steps done and the last loss read.
    hooks_done: which hooks of `step` ran before; None for all of them.
    mark: told the names of the hooks of a saved step that are done: before it is saved, and after
      each of them.

  Returns:
    The last state and its step. That step has been saved.

  Raises:
    UserError: when a step is not finite; the last good checkpoint stands.
  """
  first = step
  while True:
    stopping = stop(step)
    ending = step >= options.total
    due = [hook for hook in hooks if hook.every and (step % hook.every == 0 or ending)]
    done: list[str] = []
    if step == first:
      due = [] if hooks_done is None else [hook for hook in due if hook.name not in hooks_done]
      done = list(hooks_done or ())
    cadence = options.save_every and step % options.save_every == 0
    saving = (cadence and step > first) or ending or stopping
    if saving:
      log.flush()
      if due:
        mark(step, done)
      position = dict(batches.state())
      save(step, state, {"data": position, "window": log.window(), "hooks_due": bool(due)})
      log.restart_clock()
    for hook in due if not stopping else ():
      log.flush()
      hook(step, state)
      log.restart_clock()
      done.append(hook.name)
      if saving or step == first:  # there is a checkpoint of it
        mark(step, done)
    if ending or stopping:
      return state, step
    batch = next(batches)
    state, metrics = step_function(state, batch)
    step += 1
    log.push(step, metrics)
    progress(step - 1, log.loss)


def _check_finite(step: int, values: Mapping[str, Any]) -> None:
  if values["finite"]:
    return
  guilty = [k for k, v in values.items() if k.endswith("/finite") and not v]
  names = [g.removesuffix("/finite") for g in guilty]
  seen = [
    f"{k}={float(v)}" for k, v in values.items()
    if k.partition("/")[0] in names and v.dtype != bool and not math.isfinite(v)
  ]
  raise UserError(
    f"step {step} is not finite ({', '.join(seen) or ', '.join(names) + ': collections'}); the "
    "checkpoints before it stand; lower the learning rate, clip gradients, or look at the data "
    "of that step, and go on from them with --config.resume=THIS_WORKDIR and another --workdir"
  )


def _means(window: Sequence[Mapping[str, float]]) -> dict[str, float]:
  """Means by metric over the steps in which it was measured (a player may rest)."""
  means = {}
  for key in window[0]:
    values = [entry[key] for entry in window if math.isfinite(entry[key])]
    if values:
      means[key] = math.fsum(values) / len(values)
  return means
