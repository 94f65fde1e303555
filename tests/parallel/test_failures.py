"""Two processes that sum over their devices again and again, until something happens to one."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from t2i_jax.parallel import failures

PROGRAM = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from jax.experimental import multihost_utils
from t2i_jax import command
from t2i_jax.errors import UserError
from t2i_jax.parallel import distributed
from t2i_jax.training.watchdog import Watchdog

def happens(what):
  print(f"struck at {time.time()}", flush=True)
  if what == "fail":
    raise UserError("the disk is full; free some")
  if what == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
  if what == "hang":
    time.sleep(1000)
  if what == "differ":
    distributed.agree_on("the step to begin at", 3 + jax.process_index(), "share the folder")

def work(flags):
  distributed.initialize()
  with Watchdog(flags.minutes) as watchdog:
    for step in range(1000):
      watchdog.moved(step)
      if step == 3 and (jax.process_index() == 1 or flags.what == "differ"):
        happens(flags.what)
      assert distributed.agree_any(jax.process_index() == 1)

parser = command.parser("work", "works")
parser.add_argument("what")
parser.add_argument("minutes", type=float)
command.run(parser, sys.argv[1:], work)
"""


def happened(what, minutes=0):
  """Statuses and stderr of both processes, and the seconds that they took to end."""
  with socket.create_server(("localhost", 0)) as free:
    address = f"localhost:{free.getsockname()[1]}"
  environ = {**os.environ, "PYTHONPATH": str(Path(failures.__file__).parents[2]),
             "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "T2I_COORDINATOR": address,
             "T2I_NUM_PROCESSES": "2", "T2I_HEARTBEAT": "30"}
  processes = [
    subprocess.Popen([sys.executable, "-c", PROGRAM, what, str(minutes)], text=True,
                     env={**environ, "T2I_PROCESS_ID": str(index)},
                     stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for index in range(2)
  ]
  ended = [0.0, 0.0]
  try:
    deadline = time.time() + 600
    while not all(ended) and time.time() < deadline:
      for index, process in enumerate(processes):
        if not ended[index] and process.poll() is not None:
          ended[index] = time.time()
      time.sleep(0.1)
  finally:
    for process in processes:
      process.kill()
  outputs = [process.communicate() for process in processes]
  (struck,) = re.findall("^struck at (.*)$", outputs[1][0], re.MULTILINE)
  seconds = max(ended) - float(struck)
  print(f"{what}: {[p.returncode for p in processes]}, {seconds:.0f} s")
  return [p.returncode for p in processes], [errors for _, errors in outputs], seconds


def test_one_that_fails_alone_tells_the_other():
  statuses, errors, seconds = happened("fail")
  assert statuses == [2, 2], errors
  assert errors[1] == "error: the disk is full; free some\n"
  assert errors[0].endswith(
    "error: process 1 failed, and this one ends with it: the disk is full; free some\n")
  assert seconds < 60


@pytest.mark.full
def test_one_that_is_killed_is_missed():
  statuses, errors, seconds = happened("kill")
  # The sum fails, or hangs until the dead one is missed.
  if statuses[0] == 75:
    assert "error: another process is gone (" in errors[0]
  else:
    assert statuses[0] == -signal.SIGABRT and "another task died" in errors[0]
  assert statuses[1] == -signal.SIGKILL
  assert seconds < 120  # 30 s of silence, and what a busy machine adds


@pytest.mark.full
def test_one_that_hangs_ends_both():
  statuses, errors, seconds = happened("hang", minutes=0.5)
  assert statuses == [75, 75], errors
  assert any("nothing has moved for 0.5 minutes since step 3" in error for error in errors)
  assert seconds < 120


@pytest.mark.full
def test_those_that_differ_are_told_so():
  statuses, errors, _ = happened("differ")
  assert statuses == [2, 2], errors
  for error in errors:
    assert ("error: the step to begin at is 3 on process 0 and 4 on process 1; share the folder"
            in error)
