"""Ends a run that hangs: no step is done any more, or another process has failed."""

import atexit
import dataclasses
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from t2i_jax.errors import UserError
from t2i_jax.parallel import failures

# Exit status of a run that may go on when it is started again (EX_TEMPFAIL of sysexits.h).
TRY_AGAIN = 75

# Minutes without a step before a run on several processes ends, unless its user says otherwise.
PATIENCE = 30.0

_POLL = 1.0  # seconds between two looks
_OWN_WAY = 5.0  # for a process to end by itself, as it does where all fail alike
_UNWINDING = 300.0  # for a failed process to end the save under way

_PACKAGE = Path(__file__).parents[1]

# What jax says where a process that it spoke with is gone.
_LOST = re.compile(r"Gloo|NCCL|[Cc]onnection (closed|reset)|[Ss]ocket closed")


@dataclasses.dataclass(frozen=True)
class _End:
  """How a process ends: `line` is its error, or says that of another; at the latest at `until`."""

  until: float
  status: int
  line: str
  others: bool


class Watchdog:
  """A thread beside a run, which costs its steps nothing.

    with Watchdog(minutes) as watchdog:
      for step in steps:
        watchdog.moved(step)
      watchdog.rest()

  What ends the process early is said in one line on stderr. An exception that leaves the block is
  told to the other processes, which then end too.
  """

  def __init__(self, patience: float | None = None):
    """`patience`: minutes between two `moved`, 0 for ever; None for what suits the processes."""
    self._several = failures.several()
    if patience is None:
      patience = PATIENCE if self._several else 0.0
    self._patience = 60 * patience
    self._moved: tuple[int, float] | None = None
    self._failed: _End | None = None
    self._over = threading.Event()
    self._main = threading.get_ident()

  def __enter__(self) -> "Watchdog":
    if self._several or self._patience:
      threading.Thread(target=self._run, name="watchdog", daemon=True).start()
    return self

  def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
    if error is None or not self._several:
      self._over.set()
      return
    self.failed(error)
    if self._failed.others:
      self._over.set()
      _end(self._failed.status, f"error: {self._failed.line}")

  def moved(self, step: int) -> None:
    """The run, which has done `step` steps, has moved."""
    self._moved = step, time.monotonic()

  def alive(self) -> None:
    """The run is at work between two steps; nothing while it rests."""
    if self._moved is not None:
      self._moved = self._moved[0], time.monotonic()

  def rest(self) -> None:
    """What follows may take any time."""
    self._moved = None

  def failed(self, error: BaseException) -> None:
    """Tells the other processes of `error`; called before anything that waits for them.

    Where it is only what a process that failed or died has left behind here, that is what is said.
    """
    self.rest()
    if not self._several or self._failed is not None:
      return
    until, text = time.monotonic() + _UNWINDING, " ".join(str(error).split())
    own = isinstance(error, UserError | KeyboardInterrupt | SystemExit)
    failure = failures.heard()
    if failure is not None and not own:
      self._failed = _End(until, failure.status, _with(failure), others=True)
    elif not own and _LOST.search(text):
      line = (f"another process is gone ({text[:160]}); look at its log; the last checkpoint "
              "stands, and the same command goes on from it")
      self._failed = _End(until, TRY_AGAIN, line, others=True)
    else:
      self._failed = _End(until, _status(error), text or type(error).__name__, others=False)
    if failure is None:
      failures.tell(self._failed.status, self._failed.line)
    atexit.register(failures.leave, self._failed.status)  # before jax's, which waits for all

  def _run(self) -> None:
    heard_at = None
    while not self._over.wait(_POLL):
      now = time.monotonic()
      if self._failed is not None:
        if now > self._failed.until:
          _end(self._failed.status, f"error: {self._failed.line}")
        continue
      failure = failures.heard()
      if failure and heard_at is None:
        heard_at = now
      if failure and now - heard_at > _OWN_WAY:
        _end(failure.status, f"error: {_with(failure)}")
      if self._patience and self._moved and now - self._moved[1] > self._patience:
        line = self._hanging(self._moved[0])
        failures.tell(TRY_AGAIN, line)
        _end(TRY_AGAIN, f"error: {line}")

  def _hanging(self, step: int) -> str:
    frame = sys._current_frames().get(self._main)
    own = [f for f in traceback.extract_stack(frame) if Path(f.filename).is_relative_to(_PACKAGE)]
    place = ""
    if own:
      name = Path(own[-1].filename).relative_to(_PACKAGE.parent)
      place = f" (it waits in {name}:{own[-1].lineno}, {own[-1].name})"
    return (f"nothing has moved for {self._patience / 60:g} minutes since step {step}{place}: a "
            "process or a device hangs, or a step takes longer; the last checkpoint stands, and "
            "the same command goes on from it; --patience=MINUTES waits longer, 0 for ever")


def _status(error: BaseException) -> int:
  """The exit status that an exception leads to."""
  if isinstance(error, SystemExit):
    return error.code if isinstance(error.code, int) else 1
  if isinstance(error, KeyboardInterrupt):
    return 130
  return 2 if isinstance(error, UserError | OSError) or "RESOURCE_EXHAUSTED" in str(error) else 1


def _with(failure: failures.Failure) -> str:
  return f"process {failure.process} failed, and this one ends with it: {failure.line}"


def _end(status: int, line: str) -> None:
  print(line, file=sys.stderr)
  failures.leave(status)
