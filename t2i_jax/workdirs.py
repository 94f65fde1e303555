"""A run's work directory: whose it is, that all hosts see it, and that one command writes to it."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax.errors import UserError
from t2i_jax.parallel.distributed import agree_any, barrier, broadcast_bytes, is_primary
from t2i_jax.text.tokenizer import Tokenizers

# What a run's work directory holds of it, beside checkpoints, metrics and samples.
CONFIG, TOKENIZER = "config.json", "tokenizer.json"

# Keys that a run may change when it is resumed; all others make it another run.
FREE_SECTIONS = ("mesh", "sharding", "checkpoint", "log", "sample", "evaluate")
FREE_KEYS = (
  "train.duration", "data.workers", "data.memory_limit_mb", "data.prefetch", "data.latents",
  "text.cache", "resume", "init_from",
)


def identity(config: ConfigDict) -> dict[str, Any]:
  """The flat keys that make a run what it is."""
  return {
    key: value for key, value in configs.flatten(config).items()
    if key.partition(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS
  }


def check_workdir(workdir: epath.Path, config: ConfigDict) -> None:
  """Makes the work directory, or checks that what it holds is this config's run.

  Raises:
    UserError: when it holds another config's run, or cannot be made.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot make --workdir={workdir}: {error.strerror or error}") from error
  except ImportError as error:  # of the package that speaks with a store such as gs://
    raise UserError(f"--workdir={workdir} cannot be reached: {error}") from error
  path = workdir / CONFIG
  if not path.exists():
    return
  try:
    theirs = identity(configs.from_json(path.read_text()))
  except ValueError as error:
    raise UserError(f"{path} is not a config: {error}; choose another --workdir") from error
  ours = identity(configs.from_json(configs.to_json(config)))
  different = [k for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k)]
  if different:
    key = different[0]
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    raise UserError(
      f"--workdir={workdir} holds another run: its {key} is {theirs.get(key)!r}, this config's is "
      f"{ours.get(key)!r}{more}; choose another --workdir (to go on from that run with this "
      f"config, add --config.resume={workdir})"
    )


def check_shared(workdir: epath.Path, seconds: float = 10.0, flag: str = "--workdir") -> None:
  """Raises UserError unless all hosts see the same work directory.

  Args:
    workdir: of the run. A store such as `gs://` is one for all.
    seconds: that a file may take to be seen by the others.
    flag: that names it.
  """
  if jax.process_count() == 1 or "://" in os.fspath(workdir):
    return
  token = broadcast_bytes(os.urandom(8) if is_primary() else None).hex()
  path = workdir / f".seen-by-all-{token}"
  if is_primary():
    path.touch()
  barrier("written")
  deadline = time.monotonic() + seconds
  while not (seen := path.exists()) and time.monotonic() < deadline:
    time.sleep(0.5)
  blind = agree_any(not seen)
  if is_primary():
    path.unlink()
  if blind:
    raise UserError(f"{flag}={workdir} is not the same folder on all hosts; name one on a file "
                    "system that they share, or gs://BUCKET/FOLDER")


@contextlib.contextmanager
def locked(workdir: epath.Path, flag: str = "--workdir") -> Iterator[None]:
  """Keeps other processes from writing to a work directory; the lock ends with the process.

  Stores such as `gs://` have no locks.

  Raises:
    UserError: when another process does.
  """
  if not is_primary() or "://" in os.fspath(workdir):
    yield
    return
  with open(workdir / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      doing = "training in" if flag == "--workdir" else "writing to"
      raise UserError(f"another process is {doing} {flag}={workdir}; wait for it, stop it, or "
                      f"choose another {flag}") from error
    yield


def claim_workdir(workdir: epath.Path, config: ConfigDict, tokenizers: Tokenizers) -> None:
  """Makes the work directory this run's; done when nothing else can fail before training.

  A command that failed earlier, for a wrong value, can so be given again with
  the right one.

  Raises:
    UserError: when it cannot be written.
  """
  if not is_primary():
    return
  try:
    for name, text in ((TOKENIZER, tokenizers.to_json()), (CONFIG, configs.to_json(config))):
      beside = workdir / f".{name}.writing"
      beside.write_text(text)
      beside.replace(workdir / name)
  except OSError as error:
    raise UserError(f"cannot write to --workdir={workdir}: {error.strerror or error}") from error


def read_run_config(workdir: epath.Path) -> ConfigDict:
  """The config of the run in a work directory.

  Raises:
    UserError: where there is no run.
  """
  path = workdir / CONFIG
  if not path.exists():
    raise UserError(f"no run in '{workdir}': it has no {CONFIG}")
  try:
    return configs.from_json(path.read_text())
  except ValueError as error:
    raise UserError(f"{path} is not a config: {error}") from error
