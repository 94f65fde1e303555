"""One config on one device, on eight as several meshes, and on two processes: the same losses.

Sums in another order differ by rounding, and every step amplifies what the step before it left.
The toy's losses are means of up to 12,288 terms; measured on a CPU, the first step's losses differ
by 8 float32 roundings (1e-6 of their size) and the sixth step's by 17 (2e-6). The tolerance is
five times that. A wrong share of the batch, a key that depends on the device, or a gradient summed
where it should be averaged changes the first digits.
"""

import socket

import jax
import numpy as np
import pytest
from runs import ROOT, TOY, command, config_of, finish, metrics, saved_meta, saved_steps, train_on

from t2i_jax.training.state import State

pytestmark = pytest.mark.usefixtures("compiled_programs")

TOLERANCE = 1e-5
# Networks of many layers and Adam, which divides small gradients by small numbers.
DEEP_TOLERANCE = 1e-3
MESHES = {
  "data": dict(mesh__data=8),
  "fsdp": dict(mesh__data=1, mesh__fsdp=8),
  "data-fsdp-tensor": dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
}
ONE = dict(mesh__data=1)
SETTINGS = dict(sample__every=0, evaluate__every=0, evaluate__pictures=0, log__every=1,
                optimizer__schedule="constant")


def assert_same_losses(lines, expected, tolerance=TOLERANCE):
  assert [line["step"] for line in lines] == [line["step"] for line in expected]
  for line, other in zip(lines, expected, strict=True):
    assert line.keys() == other.keys()
    for key, value in line.items():
      assert value == pytest.approx(other[key], rel=tolerance), (line["step"], key)


def axes_of(state: State) -> set[str]:
  """The mesh axes over which some array of a state is split."""
  return {axis for leaf in jax.tree.leaves(state) for axis in leaf.sharding.spec if axis}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, compiled_programs):
  """The metrics of six steps on one device."""
  workdir = tmp_path_factory.mktemp("one")
  train_on(config_of(TOY, train__duration=6, **SETTINGS), workdir)
  return metrics(workdir)


def test_every_mesh_has_the_losses_of_one_device(expected, tmp_path):
  for name, mesh in MESHES.items():
    config = config_of(TOY, train__duration=4, **SETTINGS, **mesh)
    state = train_on(config, tmp_path / name, devices=8)
    assert_same_losses(metrics(tmp_path / name), expected[:4])
    assert axes_of(state) == {"fsdp", "tensor"} & set(name.split("-"))
    assert len(state.step.sharding.device_set) == 8


def test_a_run_moves_from_mesh_to_mesh(expected, tmp_path):
  moves = ((1, ONE), (8, MESHES["data-fsdp-tensor"]), (8, MESHES["fsdp"]), (1, ONE))
  for steps, (devices, mesh) in enumerate(moves, start=1):
    config = config_of(TOY, train__duration=steps, **SETTINGS, **mesh)
    train_on(config, tmp_path / "run", devices)
    assert saved_steps(tmp_path / "run")[-1] == steps
  assert_same_losses(metrics(tmp_path / "run"), expected[:4])
  assert saved_meta(tmp_path / "run", 4)["data"] == {"position": 4 * 16}


# Trains as the command does; the second process is asked to stop while step 3 is under way.
PREEMPTED = """
import os, signal, sys
from t2i_jax import main

class Progress(main.Progress):
  def update(self, done, loss=None):
    super().update(done, loss)
    if done == 2 and os.environ["T2I_PROCESS_ID"] == "1":
      os.kill(os.getpid(), signal.SIGTERM)

main.Progress = Progress
main.main(sys.argv[1:])
"""


def test_two_processes_train_save_and_stop_together(expected, tmp_path):
  with socket.create_server(("localhost", 0)) as free:
    address = f"localhost:{free.getsockname()[1]}"
  flags = [f"--config.{key.replace('__', '.')}={value}" for key, value in SETTINGS.items()]
  processes = [
    command("main", f"--config={TOY}:size=tiny", f"--workdir={tmp_path / 'two'}",
            "--config.train.duration=1000", "--config.mesh.data=4", "--config.mesh.fsdp=2",
            "--config.checkpoint.every=0", *flags,
            code=PREEMPTED, devices=4, T2I_COORDINATOR=address,
            T2I_NUM_PROCESSES="2", T2I_PROCESS_ID=str(index))
    for index in range(2)
  ]
  errors = [finish(process) for process in processes]
  (last,) = saved_steps(tmp_path / "two")
  assert last in (3, 4)  # the first process hears of it at the step after
  assert f"stopped as asked; step {last} is saved" in errors[0]
  assert "step" not in errors[1]  # one process speaks for all
  assert_same_losses(metrics(tmp_path / "two"), expected[:last])

  state = train_on(config_of(TOY, train__duration=6, **SETTINGS), tmp_path / "two")
  assert state.step == 6
  assert_same_losses(metrics(tmp_path / "two"), expected)


@pytest.mark.full
@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_every_system_on_every_mesh(path, tmp_path):
  settings = {**SETTINGS, "train__duration": 3, "sharding__rules":
              "[('kernel$', 'tensor(-1)+fsdp'), ('.*', 'fsdp')]"}
  train_on(config_of(path, **settings), tmp_path / "one")
  expected = metrics(tmp_path / "one")
  assert np.isfinite([value for line in expected for value in line.values()]).all()
  for name, mesh in MESHES.items():
    state = train_on(config_of(path, **settings, **mesh), tmp_path / name, devices=8)
    assert_same_losses(metrics(tmp_path / name), expected, DEEP_TOLERANCE)
    assert ("tensor" in axes_of(state)) == ("tensor" in name)
