"""The watchdog against a store of failures and an exit that are not real."""

import threading
from types import SimpleNamespace

import pytest

from t2i_jax.errors import UserError
from t2i_jax.parallel import failures
from t2i_jax.training import watchdog
from t2i_jax.training.watchdog import TRY_AGAIN, Watchdog

# The thread of a process that is told to leave ends by an exception here.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


LOOKS = 3  # of a watchdog, after which what it would do is done


class Looks(threading.Event):
  """The watchdog's own event, whose waiting is counted: it takes no time."""

  counted = threading.Condition()
  number, closed = 0, False

  def wait(self, timeout=None):
    with Looks.counted:
      Looks.number += 1
      Looks.counted.notify_all()
    return super().wait(0.001) or Looks.closed


@pytest.fixture
def world(monkeypatch):
  """What was told, what others told, how the process ended; and a clock that the test moves.

  `ends()` says what came of it after a few looks, however long these take.
  """

  class World:
    now, other = 0.0, None

    @staticmethod
    def ends():
      """Whether the process ends by the time that the watchdog has looked a few times."""
      with Looks.counted:
        enough = Looks.number + LOOKS
        assert Looks.counted.wait_for(lambda: World.ended or enough <= Looks.number, timeout=60)
      return bool(World.ended)

  def leave(status):
    with Looks.counted:
      World.ended.append(status)
      Looks.counted.notify_all()
    raise SystemExit

  World.told, World.ended, World.at_exit = [], [], []
  monkeypatch.setattr(failures, "several", lambda: True)
  monkeypatch.setattr(failures, "tell", lambda status, line: World.told.append((status, line)))
  monkeypatch.setattr(failures, "heard", lambda: World.other)
  monkeypatch.setattr(failures, "leave", leave)
  monkeypatch.setattr(watchdog.atexit, "register", lambda *call: World.at_exit.append(call))
  monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: World.now))
  monkeypatch.setattr(watchdog, "threading", SimpleNamespace(
    Event=Looks, Thread=threading.Thread, get_ident=threading.get_ident
  ))  # fmt: skip
  yield World
  # A watchdog that outlived its test would end the tests' own process.
  Looks.closed = True
  for thread in threading.enumerate():
    if thread.name == "watchdog":
      thread.join()
  Looks.closed = False


def test_a_run_that_moves_is_left_alone(world):
  with Watchdog(patience=1.0) as dog:
    for step in range(4):
      dog.moved(step)
      world.now += 50.0
      assert not world.ends()
    dog.rest()
    world.now += 1000.0
    assert not world.ends()
  assert not world.told and not world.at_exit


def test_work_between_two_steps_is_no_hang(world, capfd):
  with Watchdog(1) as dog:
    dog.alive()  # before the first step nothing is waited for, and still is not
    world.now = 1000.0
    assert not world.ends()
    dog.moved(1)
    for world.now in (1055.0, 1110.0, 1165.0):
      dog.alive()
      assert not world.ends()
    world.now = 1226.0
    assert world.ends()


def test_a_step_that_does_not_end_ends_the_run(world, capfd):
  with Watchdog(patience=1.0) as dog:
    dog.moved(7)
    world.now += 61.0
    assert world.ends()
  assert world.ended == [TRY_AGAIN] and world.told[0][0] == TRY_AGAIN
  line = capfd.readouterr().err
  assert "nothing has moved for 1 minutes since step 7" in line and line.count("\n") == 1
  assert "--patience=MINUTES" in line


def test_another_process_that_failed_ends_this_one(world, capfd):
  with Watchdog():
    world.other = failures.Failure(3, 2, "no data here")
    assert not world.ends()  # it may end by itself
    world.now += 10.0
    assert world.ends()
  assert world.ended == [2]
  expected = "error: process 3 failed, and this one ends with it: no data here\n"
  assert capfd.readouterr().err == expected


def test_a_failure_is_told_once_and_leaves_without_the_others(world):
  with pytest.raises(UserError), Watchdog() as dog:
    try:
      raise UserError("no data\nhere")
    except UserError as error:
      dog.failed(error)
      raise
  assert world.told == [(2, "no data here")]
  assert world.at_exit == [(failures.leave, 2)]
  assert not world.ends()
  world.now += 1000.0
  assert world.ends() and world.ended == [2]  # it hung while it closed its files


LOST = RuntimeError("Gloo AllGather failed: Connection closed by peer [127.0.0.1]:1")


def test_what_a_failure_elsewhere_has_left_behind_is_not_an_error_of_its_own(world, capfd):
  world.other = failures.Failure(1, 2, "no data here")
  with pytest.raises(SystemExit), Watchdog():
    raise LOST
  assert world.ended == [2] and not world.told
  assert capfd.readouterr().err.endswith(
    "error: process 1 failed, and this one ends with it: no data here\n")


def test_another_process_that_died_is_said_to_be_gone(world, capfd):
  with pytest.raises(SystemExit), Watchdog():
    raise LOST
  assert world.ended == [TRY_AGAIN] and world.told[0][0] == TRY_AGAIN
  assert "error: another process is gone (Gloo AllGather failed" in capfd.readouterr().err


@pytest.mark.parametrize(
  ("error", "status"),
  [(ValueError("x"), 1), (KeyboardInterrupt(), 130), (SystemExit(3), 3), (OSError(28, "full"), 2),
   (RuntimeError("RESOURCE_EXHAUSTED: memory"), 2)],
)
def test_the_status_is_that_of_the_command(world, error, status):
  dog = Watchdog()
  dog.failed(error)
  assert world.told[0][0] == status


def test_a_single_process_has_nobody_to_tell(monkeypatch):
  monkeypatch.setattr(watchdog.atexit, "register", pytest.fail)
  assert not failures.several() and failures.heard() is None
  failures.tell(2, "nobody hears")
  with pytest.raises(UserError), Watchdog():
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    raise UserError("x")
