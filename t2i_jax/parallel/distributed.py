"""Several hosts: starting them, and what they tell each other.

Every helper does nothing, or returns its argument, on one process.
"""

import glob
import importlib.util
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from t2i_jax.errors import UserError

# Variables that name the coordinator (host:port), the number of processes and
# this process, in the order in which they are looked for.
_EXPLICIT = (
  ("T2I_COORDINATOR", "T2I_NUM_PROCESSES", "T2I_PROCESS_ID"),
  ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
)

# How long the other processes may take to start, in seconds.
_PATIENCE = 300

# Variable with the seconds after which a process that is silent is taken for dead, which ends the
# others; jax's own default is 100.
HEARTBEAT = "T2I_HEARTBEAT"


def initialize() -> None:
  """Joins the processes of a run; call before anything touches a device.

  The environment decides, first match wins: explicit settings (T2I_COORDINATOR,
  T2I_NUM_PROCESSES, T2I_PROCESS_ID, or JAX_COORDINATOR_ADDRESS,
  JAX_NUM_PROCESSES, JAX_PROCESS_ID), `srun` with several tasks, a Cloud TPU
  host; else this is the only process. On CPUs jax uses Gloo. A second call does
  nothing.

  Raises:
    UserError: settings given by half or not valid, or no answer from the
      coordinator.
  """
  if jax.distributed.is_initialized():
    return
  settings = _settings(os.environ)
  tpu = settings is None and _has_tpu(os.environ)
  if settings is None and not tpu:
    return
  if settings and settings.get("process_id"):
    _wait_for(settings["coordinator_address"], _PATIENCE)
  settings = {**(settings or {}), **_heartbeat(os.environ)}
  try:
    jax.distributed.initialize(**settings)
  except jax.errors.JaxRuntimeError as error:
    first = (str(error).splitlines() or [""])[0]
    raise UserError(
      f"cannot join the other processes: {first}; check that the coordinator's port is free"
    ) from error
  except ValueError:
    # A TPU machine outside Google Cloud's fleet: jax finds no other workers.
    if not tpu:
      raise


def _heartbeat(environ: Mapping[str, str]) -> dict[str, int]:
  text = environ.get(HEARTBEAT)
  if not text:
    return {}
  if not text.isdecimal() or int(text) < 1:
    raise UserError(f"{HEARTBEAT} is '{text}'; set a whole number of seconds")
  return {"heartbeat_timeout_seconds": int(text)}


def _settings(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """Arguments of `jax.distributed.initialize`; None if nothing is set."""
  for names in _EXPLICIT:
    given = [name for name in names if environ.get(name)]
    if given:
      missing = [name for name in names if name not in given]
      if missing:
        raise UserError(f"{given[0]} is set but {' and '.join(missing)} is not; set all or none")
      return _explicit(*names, environ)
  tasks = int(environ.get("SLURM_STEP_NUM_TASKS") or 1)
  if tasks > 1:
    settings: dict[str, Any] = {"cluster_detection_method": "slurm"}
    gpus = int(environ.get("SLURM_GPUS_ON_NODE") or 0)
    if gpus > 1 and environ.get("SLURM_STEP_NUM_NODES") == str(tasks):
      # One task a node; jax would give each task one GPU.
      settings["local_device_ids"] = list(range(gpus))
    return settings
  workers = environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
  if len(workers) > 1 or int(environ.get("MEGASCALE_NUM_SLICES") or 1) > 1:
    return {}
  return None


def _explicit(
  address: str, count: str, index: str, environ: Mapping[str, str]
) -> dict[str, Any] | None:
  """Arguments from explicit variables of these names; None for one process."""
  numbers = {}
  for name in (count, index):
    if not environ[name].isdecimal():
      raise UserError(f"{name} is '{environ[name]}'; set a whole number")
    numbers[name] = int(environ[name])
  if numbers[index] >= numbers[count]:
    raise UserError(f"{index}={numbers[index]} must be below {count}={numbers[count]}")
  host, _, port = environ[address].rpartition(":")
  if not host or not port.isdecimal():
    raise UserError(f"{address} is '{environ[address]}'; set HOST:PORT")
  if numbers[count] == 1:
    return None
  return {
    "coordinator_address": environ[address],
    "num_processes": numbers[count],
    "process_id": numbers[index],
    # All of the machine's devices are this process's, on every cluster.
    "cluster_detection_method": "deactivate",
  }


def _wait_for(address: str, seconds: float) -> None:
  """Waits until something listens at HOST:PORT.

  jax would abort the process, with a stack of C++ frames, where nothing does.
  """
  host, _, port = address.rpartition(":")
  deadline = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise UserError(
          f"no coordinator at {address} after {seconds:.0f} s ({error}); start process 0 there, "
          "or correct the address"
        ) from None
    time.sleep(0.2)


def _has_tpu(environ: Mapping[str, str]) -> bool:
  """Whether jax will run on TPU chips of this machine.

  The machines of a pod made with gcloud say only in their metadata, which jax
  reads, that there are others.
  """
  platforms = environ.get("JAX_PLATFORMS", "")
  if platforms and "tpu" not in platforms.split(","):
    return False
  chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
  return bool(chips) and importlib.util.find_spec("libtpu") is not None


def is_primary() -> bool:
  """Whether this is the process that writes logs and files for all."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process is at the barrier of this name."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def broadcast_bytes(data: bytes | None) -> bytes:
  """The primary's bytes (below 2 GiB), on every process; others pass None."""
  if jax.process_count() == 1:
    if data is None:
      raise ValueError("broadcast_bytes: the primary process passes the bytes")
    return data
  payload = np.frombuffer(data or b"", np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(payload.size)))
  if not is_primary():
    payload = np.zeros(size, np.uint8)
  return multihost_utils.broadcast_one_to_all(payload).tobytes() if size else b""


def agree_any(flag: bool) -> bool:
  """Whether `flag` is true on any process; all get the same answer.

  A collective on the devices: it queues behind the steps already dispatched,
  so ask every few steps rather than at each one.
  """
  if jax.process_count() == 1:
    return bool(flag)
  return bool(multihost_utils.process_allgather(np.asarray(flag, np.uint8)).any())


def agree_on(what: str, value: int, cure: str) -> None:
  """Raises UserError, with `cure`, unless `value` (below 2**31) is the same on all processes.

  A collective on the devices, as `agree_any`.
  """
  if jax.process_count() == 1:
    return
  values = multihost_utils.process_allgather(np.asarray(value, np.int32)).tolist()
  for process, other in enumerate(values):
    if other != values[0]:
      raise UserError(
        f"{what} is {values[0]} on process 0 and {other} on process {process}; {cure}"
      )
