"""The folder beside a data set's own in which it is made, by one process at a time."""

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

from t2i_jax.errors import UserError

_LOCK = ".lock"


def beside(folder: Path) -> Path:
  """Where that which shall lie in a folder is made."""
  return folder.with_name(f"unfinished-{folder.name}")


@contextlib.contextmanager
def making(folder: Path, what: str) -> Iterator[Path]:
  """`beside(folder)`, locked. What lies there stays until `folder` is there, and then goes.

  Args:
    folder: of what is made.
    what: is made, for errors.

  Raises:
    UserError: another process is making it.
  """
  here = beside(folder)
  here.mkdir(parents=True, exist_ok=True)
  with open(here / _LOCK, "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"another process is preparing {what} in {folder.parent}") from None
    yield here
    if folder.exists():
      shutil.rmtree(here, ignore_errors=True)


def clear(here: Path, pattern: str = "*") -> None:
  """Deletes files that an earlier attempt left."""
  for path in here.glob(pattern):
    if path.name != _LOCK:
      path.unlink()
