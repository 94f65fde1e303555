"""Files that are whole or not there."""

import contextlib
import os

from etils import epath

from t2i_jax.errors import UserError


def write_whole(path: str | os.PathLike, content: bytes) -> None:
  """Writes a file, here or in a store, beside its place and renames it; creates its folder.

  Raises:
    UserError: it cannot be written; nothing of it is left.
  """
  path = epath.Path(path).expanduser()
  beside = path.with_name(f".{path.name}.writing")
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.write_bytes(content)
    beside.replace(path)
  except OSError as error:
    with contextlib.suppress(OSError):
      beside.unlink(missing_ok=True)
    raise UserError(f"cannot write {path}: {error.strerror or error}; free space there or choose "
                    "another place") from error
