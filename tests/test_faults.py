"""What becomes of a run on two processes when something happens to one of them."""

import math
import re
import signal
import socket
import time

import pytest
from runs import TOY, command, config_of, metrics, saved_steps, train_on

from t2i_jax.training.watchdog import TRY_AGAIN

# Trains as the command does; while a step is under way, something happens to process 1.
STRUCK = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from t2i_jax import main
from t2i_jax.errors import UserError
from t2i_jax.training.compiled import CompiledStep

what, at, me = sys.argv[1], int(sys.argv[2]), os.environ["T2I_PROCESS_ID"]

class Progress(main.Progress):
  def update(self, done, loss=None):
    super().update(done, loss)
    if done != at or me != "1" or what == "nan":
      return
    print(f"struck at {time.time()}", file=sys.stderr, flush=True)
    if what == "term":
      os.kill(os.getpid(), signal.SIGTERM)
    elif what == "kill":
      os.kill(os.getpid(), signal.SIGKILL)
    elif what == "hang":
      time.sleep(1000)
    elif what == "fail":
      raise UserError("the disk of this host is gone; mend it")

call = CompiledStep.__call__

def spoilt(self, state, batch):
  # A chip that computes nonsense: one copy of the parameters is not finite.
  if what == "nan" and me == "1" and int(state.step) == at:
    print(f"struck at {time.time()}", file=sys.stderr, flush=True)
    def nan(x):
      shards = [jnp.full_like(s.data, jnp.nan) for s in x.addressable_shards]
      return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)
    state = state.replace(params=jax.tree.map(nan, state.params))
  return call(self, state, batch)

main.Progress, CompiledStep.__call__ = Progress, spoilt
main.main(sys.argv[3:])
"""
pytestmark = pytest.mark.usefixtures("compiled_programs")

SETTINGS = dict(train__duration=40, log__every=1, checkpoint__every=2, sample__every=0,
                evaluate__every=0, evaluate__pictures=0, optimizer__schedule="constant")




def run_two(tmp_path, what, at=-1, *flags):
  """Trains on two processes until it happens: statuses, stderr and the seconds they then took."""
  with socket.create_server(("localhost", 0)) as free:
    address = f"localhost:{free.getsockname()[1]}"
  settings = [f"--config.{key.replace('__', '.')}={value}" for key, value in SETTINGS.items()]
  processes = [
    command("main", what, at, f"--config={TOY}:size=tiny", f"--workdir={tmp_path / 'run'}",
            *settings, *flags, code=STRUCK, T2I_COORDINATOR=address, T2I_NUM_PROCESSES="2",
            T2I_PROCESS_ID=str(index), T2I_EXIT_STOPPED="75", T2I_HEARTBEAT="30")
    for index in range(2)
  ]
  ended = {}
  try:
    deadline = time.time() + 600
    while len(ended) < 2 and time.time() < deadline:
      for index, process in enumerate(processes):
        if process.poll() is not None:
          ended.setdefault(index, time.time())
      time.sleep(0.1)
  finally:
    for process in processes:
      process.kill()
  errors = [process.communicate()[1] for process in processes]
  struck = [float(at) for at in re.findall(r"^struck at (.*)$", errors[1], re.M)]
  seconds = max(ended.values()) - struck[0] if struck else math.inf
  print(f"{what}: {[p.returncode for p in processes]}, {seconds:.0f} s")
  return [process.returncode for process in processes], errors, seconds


@pytest.mark.full
def test_a_run_survives_what_happens_to_one_of_its_processes(tmp_path):
  # Asked to stop: both save the same step and say that they are not done.
  statuses, errors, _ = run_two(tmp_path, "term", 3)
  assert statuses == [TRY_AGAIN, TRY_AGAIN], errors
  (first,) = saved_steps(tmp_path / "run")[-1:]
  assert f"stopped as asked; step {first} is saved" in errors[0] and first in (4, 5)

  # Killed: it can tell nobody, and is missed.
  statuses, errors, seconds = run_two(tmp_path, "kill", first + 4)
  assert f"resuming at step {first}" in errors[0]
  assert statuses[0] in (TRY_AGAIN, -signal.SIGABRT) and statuses[1] == -signal.SIGKILL, errors
  assert "another process is gone" in errors[0] or "another task died" in errors[0]
  assert seconds < 90  # T2I_HEARTBEAT is 30

  # Its numbers go wrong: the sums over all devices are wrong on both, and both stop.
  last = saved_steps(tmp_path / "run")[-1]
  statuses, errors, seconds = run_two(tmp_path, "nan", last + 3)
  assert statuses == [2, 2], errors
  assert f"error: step {last + 4} is not finite" in errors[0]
  assert saved_steps(tmp_path / "run")[-1] <= last + 3
  assert seconds < 60

  # It fails alone: it tells the other why.
  last = saved_steps(tmp_path / "run")[-1]
  statuses, errors, seconds = run_two(tmp_path, "fail", last + 2)
  assert statuses == [2, 2], errors
  assert "error: the disk of this host is gone; mend it" in errors[1]
  assert ("error: process 1 failed, and this one ends with it: the disk of this host is gone; "
          "mend it") in errors[0]
  assert "Traceback" not in errors[0] + errors[1]
  assert seconds < 60

  # It hangs: whichever sees it first tells the other.
  last = saved_steps(tmp_path / "run")[-1]
  statuses, errors, seconds = run_two(tmp_path, "hang", last + 2, "--patience=2")
  assert statuses == [TRY_AGAIN, TRY_AGAIN], errors
  assert "nothing has moved for 2 minutes since step" in errors[0] + errors[1]
  assert seconds < 180

  # And so it ends as one to which nothing happened.
  statuses, errors, _ = run_two(tmp_path, "nothing")
  assert statuses == [0, 0], errors
  whole = config_of(TOY, **SETTINGS)
  train_on(whole, tmp_path / "whole")
  for line, other in zip(metrics(tmp_path / "run"), metrics(tmp_path / "whole"), strict=True):
    assert line == pytest.approx(other, rel=1e-3)
