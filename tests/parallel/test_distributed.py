import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from t2i_jax.errors import UserError
from t2i_jax.parallel import distributed

_FULL = {"T2I_COORDINATOR": "host:1234", "T2I_NUM_PROCESSES": "4", "T2I_PROCESS_ID": "3"}


def _started(monkeypatch, environ):
  """What `initialize` passes to jax in an environment; None if it does not call."""
  calls = []
  for name in list(os.environ):
    if name.startswith(("T2I_", "JAX_COORD", "JAX_NUM_P", "JAX_PROC", "SLURM_", "TPU_", "MEGA")):
      monkeypatch.delenv(name)
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(jax.distributed, "initialize", lambda **settings: calls.append(settings))
  monkeypatch.setattr(distributed, "_wait_for", lambda address, seconds: None)
  distributed.initialize()
  return calls[0] if calls else None


def test_alone(monkeypatch):
  assert _started(monkeypatch, {}) is None
  assert _started(monkeypatch, {**_FULL, "T2I_NUM_PROCESSES": "1", "T2I_PROCESS_ID": "0"}) is None
  assert _started(monkeypatch, {"TPU_WORKER_HOSTNAMES": "one"}) is None


def test_explicit_settings(monkeypatch):
  expected = {
    "coordinator_address": "host:1234",
    "num_processes": 4,
    "process_id": 3,
    "cluster_detection_method": "deactivate",
  }
  assert _started(monkeypatch, _FULL) == expected
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  settings = dict(zip(names, ("host:1234", "4", "3"), strict=True))
  assert _started(monkeypatch, settings) == expected
  assert _started(monkeypatch, {**settings, "SLURM_STEP_NUM_TASKS": "8"}) == expected


def test_how_long_a_process_may_be_silent(monkeypatch):
  assert _started(monkeypatch, {**_FULL, "T2I_HEARTBEAT": "20"})["heartbeat_timeout_seconds"] == 20
  with pytest.raises(UserError, match="T2I_HEARTBEAT is '2 min'; set a whole number of seconds"):
    _started(monkeypatch, {**_FULL, "T2I_HEARTBEAT": "2 min"})


def test_clusters(monkeypatch):
  slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
  detect = {"cluster_detection_method": "slurm"}
  assert _started(monkeypatch, slurm) == detect
  one_a_node = {**detect, "local_device_ids": [0, 1, 2, 3]}
  assert _started(monkeypatch, {**slurm, "SLURM_GPUS_ON_NODE": "4"}) == one_a_node
  one_a_gpu = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
  assert _started(monkeypatch, one_a_gpu) == detect
  assert _started(monkeypatch, {"SLURM_STEP_NUM_TASKS": "1"}) is None
  assert _started(monkeypatch, {"TPU_WORKER_HOSTNAMES": "one,two"}) == {}
  assert _started(monkeypatch, {"MEGASCALE_NUM_SLICES": "2"}) == {}


def test_a_tpu_machine_lets_jax_look(monkeypatch):
  monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"])
  monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: object())
  assert _started(monkeypatch, {"JAX_PLATFORMS": ""}) == {}
  assert _started(monkeypatch, {"JAX_PLATFORMS": "cpu"}) is None

  def alone(**settings):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setenv("JAX_PLATFORMS", "tpu,cpu")
  monkeypatch.setattr(jax.distributed, "initialize", alone)
  distributed.initialize()


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"T2I_PROCESS_ID": ""}, ["T2I_COORDINATOR is set", "T2I_PROCESS_ID is not"]),
    ({"T2I_COORDINATOR": ""}, ["T2I_COORDINATOR is not"]),
    ({"T2I_NUM_PROCESSES": "two"}, ["T2I_NUM_PROCESSES is 'two'"]),
    ({"T2I_PROCESS_ID": "4"}, ["T2I_PROCESS_ID=4", "T2I_NUM_PROCESSES=4"]),
    ({"T2I_PROCESS_ID": "-1"}, ["T2I_PROCESS_ID is '-1'"]),
    ({"T2I_COORDINATOR": "host"}, ["'host'", "HOST:PORT"]),
  ],
)
def test_wrong_settings(monkeypatch, change, words):
  with pytest.raises(UserError) as error:
    _started(monkeypatch, {**_FULL, **change})
  assert all(word in str(error.value) for word in words), str(error.value)


def _free_port():
  with socket.socket() as sock:
    sock.bind(("127.0.0.1", 0))
    return sock.getsockname()[1]


def test_no_coordinator(monkeypatch):
  address = f"127.0.0.1:{_free_port()}"
  for name, value in {**_FULL, "T2I_COORDINATOR": address}.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(distributed, "_PATIENCE", 0)
  with pytest.raises(UserError, match=f"no coordinator at {address}.*start process 0"):
    distributed.initialize()


def test_helpers_on_one_process():
  assert distributed.is_primary()
  distributed.barrier("here")
  assert distributed.broadcast_bytes(b"abc") == b"abc"
  assert distributed.agree_any(True) is True
  assert distributed.agree_any(False) is False
  distributed.agree_on("the step", 3, "start again")
  with pytest.raises(ValueError, match="bytes"):
    distributed.broadcast_bytes(None)


_PROGRAM = """
import sys
import jax, numpy as np
from jax.sharding import Mesh
from t2i_jax.parallel import distributed, mesh as mesh_lib, sharding

distributed.initialize()
distributed.initialize()
me = jax.process_index()
assert jax.process_count() == 2 and jax.device_count() == 4
assert distributed.is_primary() == (me == 0)
payload = bytes(range(256)) * 5
assert distributed.broadcast_bytes(payload if me == 0 else None) == payload
assert distributed.broadcast_bytes(b"" if me == 0 else None) == b""
assert distributed.agree_any(me == 1) is True
assert distributed.agree_any(False) is False
distributed.barrier("middle")

batch = np.arange(8 * 3).reshape(8, 3).astype(np.float32)
total = jax.jit(lambda x: (x * np.arange(8)[:, None]).sum())
neighbours = mesh_lib.make_mesh({"data": 2, "fsdp": -1})
assert list(mesh_lib.host_rows(8, neighbours)) == list(range(4 * me, 4 * me + 4))
a, b, c, d = jax.devices()
meshes = [neighbours]
for order in ([a, c, b, d], [c, d, a, b]):
  meshes.append(Mesh(np.asarray(order).reshape(1, 4, 1, 1, 1), mesh_lib.AXES))
meshes.append(Mesh(np.asarray([a, c, b, d]).reshape(1, 2, 1, 1, 2), mesh_lib.AXES))
for mesh in meshes:
  rows = mesh_lib.host_rows(8, mesh)
  x = sharding.put({"image": batch[rows]}, mesh_lib.batch_sharding(mesh))["image"]
  assert x.shape == (8, 3), x.shape
  for shard in x.addressable_shards:
    np.testing.assert_array_equal(shard.data, batch[shard.index])
  assert float(total(x)) == float((batch * np.arange(8)[:, None]).sum())
print("done", me)
"""


def test_two_processes():
  environ = {
    **os.environ,
    "PYTHONPATH": str(Path(distributed.__file__).parents[2]),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "T2I_COORDINATOR": f"127.0.0.1:{_free_port()}",
    "T2I_NUM_PROCESSES": "2",
  }
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", _PROGRAM],
      env={**environ, "T2I_PROCESS_ID": str(i)},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for i in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for i, output in enumerate(outputs):
    assert f"done {i}" in output, output
