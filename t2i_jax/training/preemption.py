"""Stops a run cleanly when the machine is taken away or the user presses Ctrl-C."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from t2i_jax.errors import UserError

# Variable with the exit status of a command that was stopped before its end; 0 where it is not set.
# What starts a run again needs to know that it is not done.
EXIT_STOPPED = "T2I_EXIT_STOPPED"


def exit_stopped() -> None:
  """Ends the command with the status that `EXIT_STOPPED` asks for, if any."""
  text = os.environ.get(EXIT_STOPPED, "")
  if not text:
    return
  if not text.isdecimal() or int(text) > 255:
    raise UserError(f"{EXIT_STOPPED} is '{text}'; set an exit status, such as 75")
  sys.exit(int(text))


class StopSignal:
  """Within it SIGTERM and the first SIGINT (Ctrl-C) only ask for a stop; a second SIGINT stops now.

  The answer is this host's own: the loop asks all hosts, so that they save and leave together.

    with StopSignal() as stop:
      while not agree(stop.requested()):
        ...

  Off the main thread, where signals cannot be caught, it never asks.
  """

  def __init__(self):
    self._requested = threading.Event()
    self._interrupted = False
    self._handlers: dict[int, Any] = {}

  def __enter__(self) -> "StopSignal":
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._handlers[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exception: Any) -> None:
    while self._handlers:
      number, handler = self._handlers.popitem()
      signal.signal(number, handler)

  def requested(self) -> bool:
    """Whether this host was asked to stop."""
    return self._requested.is_set()

  def _handle(self, number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
      if self._interrupted:
        raise KeyboardInterrupt
      self._interrupted = True
    self._requested.set()
