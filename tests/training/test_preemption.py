import os
import signal
import subprocess
import sys
import threading

import pytest

from t2i_jax.errors import UserError
from t2i_jax.training.preemption import StopSignal, exit_stopped


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_a_stop(number):
  before = signal.getsignal(number)
  with StopSignal() as stop:
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested()
  assert signal.getsignal(number) is before


def test_second_interrupt_stops_at_once():
  before = signal.getsignal(signal.SIGINT)
  with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested()
    os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is before


def test_sigterm_and_one_interrupt_let_the_save_finish():
  with StopSignal() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested()


def test_off_the_main_thread_it_never_asks():
  seen = []

  def run():
    with StopSignal() as stop:
      seen.append(stop.requested())

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert seen == [False]


_LOOP = """
import time
from t2i_jax.errors import UserError
from t2i_jax.training.preemption import StopSignal, exit_stopped
with StopSignal() as stop:
  print("ready", flush=True)
  while not stop.requested():
    time.sleep(0.01)
print("saved", flush=True)
"""


def test_a_process_leaves_with_status_0():
  process = subprocess.Popen([sys.executable, "-c", _LOOP], stdout=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "ready\n"
  process.terminate()
  assert process.stdout.readline() == "saved\n"
  assert process.wait() == 0


def test_what_started_a_run_may_ask_how_it_ended(monkeypatch):
  monkeypatch.delenv("T2I_EXIT_STOPPED", raising=False)
  exit_stopped()
  monkeypatch.setenv("T2I_EXIT_STOPPED", "75")
  with pytest.raises(SystemExit) as exit:
    exit_stopped()
  assert exit.value.code == 75
  monkeypatch.setenv("T2I_EXIT_STOPPED", "again")
  with pytest.raises(UserError, match="T2I_EXIT_STOPPED is 'again'; set an exit status"):
    exit_stopped()
