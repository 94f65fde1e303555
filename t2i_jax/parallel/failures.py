"""A process that fails tells the others of its run, so that none waits for it.

They hear of it from the coordinator's store of keys and values, which needs no device: where a
process is gone, a collective would hang. One that is killed tells nobody; jax ends the others when
it has been silent for as long as `distributed.initialize` says.
"""

import contextlib
import dataclasses
import os
import sys
import time
from typing import NoReturn

from jax._src import distributed as _distributed  # jax has no public name for the store

_FAILED, _LEFT = "t2i_jax/failed/", "t2i_jax/left/"

# How long process 0, which holds the store, stays for the others to read it and leave, in seconds.
GRACE = 10.0


@dataclasses.dataclass(frozen=True)
class Failure:
  """What a process said before it ended.

  Attributes:
    process: its index.
    status: that it exits with.
    line: of its error.
  """

  process: int
  status: int
  line: str


def several() -> bool:
  """Whether this process has others to tell; asks no device."""
  state = _distributed.global_state
  return state.client is not None and (state.num_processes or 1) > 1


def tell(status: int, line: str) -> None:
  """Tells the other processes that this one ends with `status`, and why."""
  if not several():
    return
  state = _distributed.global_state
  try:
    state.client.key_value_set(f"{_FAILED}{state.process_id}", f"{status} {line}", True)
  except Exception as error:  # the coordinator may be what has failed
    print(f"the other processes could not be told: {error}", file=sys.stderr)


def heard() -> Failure | None:
  """The first failure that another process has told of."""
  if not several():
    return None
  for process, text in sorted(_read(_FAILED).items()):
    status, _, line = text.partition(" ")
    if process != _distributed.global_state.process_id:
      return Failure(process, int(status), line)
  return None


def leave(status: int) -> NoReturn:
  """Ends this process without the wait for all others that jax does at exit.

  jax aborts the others once process 0 is gone, so that one waits a while for them.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  if several():
    state = _distributed.global_state
    with contextlib.suppress(Exception):  # nobody is left to read it
      state.client.key_value_set(f"{_LEFT}{state.process_id}", "", True)
    deadline = time.monotonic() + GRACE
    while (state.process_id == 0 and len(_read(_LEFT)) < state.num_processes
           and time.monotonic() < deadline):
      time.sleep(0.2)
  os._exit(status)


def _read(folder: str) -> dict[int, str]:
  """What processes have written there; nothing where the coordinator is gone, or slow."""
  client = _distributed.global_state.client
  try:
    return {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(folder)}
  except Exception:  # jax itself then ends the process in time
    return {}
