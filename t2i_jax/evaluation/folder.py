"""What an evaluation keeps on the disk, so that it can be interrupted and go on.

  evaluation.json             what is drawn: exports, options, seed, prompts
  drawn/000_name/SET/         pictures_00000.npz... and scores' states, a shard each
  references/                 statistics of real pictures
  scores.json report.html plots/ pictures/

Every file is written beside and then renamed, so that it is whole or not there.
"""

import contextlib
import io
import json
import os
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from t2i_jax import config as configs
from t2i_jax import workdirs
from t2i_jax.errors import UserError
from t2i_jax.files import write_whole
from t2i_jax.parallel.distributed import barrier, broadcast_bytes, is_primary

ABOUT, FORMAT = "evaluation.json", 1
DRAWN = "drawn"


def slug(text: str) -> str:
  """A text as a part of a file's name."""
  return re.sub(r"[^\w.=+-]+", "_", text).strip("_")[:80]


@contextlib.contextmanager
def opened(path: str, identity: Mapping[str, Any]) -> Iterator[epath.Path]:
  """The folder of an evaluation, locked, which begins there or goes on.

  Args:
    path: the folder.
    identity: JSON that says what is drawn; the folder of another one is refused.

  Raises:
    UserError: the folder is of something else, or cannot be made.
  """
  if "://" in path:
    raise UserError(f"--output={path} is in a store, which has no locks; name a folder here")
  folder = epath.Path(path).expanduser()
  _check(folder, identity, path)
  folder.mkdir(parents=True, exist_ok=True)
  workdirs.check_shared(folder, flag="--output")
  with workdirs.locked(folder, "--output"):
    _check(folder, identity, path)
    barrier("checked")  # before the primary writes what the others look for
    if is_primary():
      content = json.dumps({"format": FORMAT, **identity}, indent=2, sort_keys=True) + "\n"
      write_whole(folder / ABOUT, content.encode())
    yield folder


def _check(folder: epath.Path, identity: Mapping[str, Any], path: str) -> None:
  """Raises UserError unless the folder is empty, or of this identity."""
  if folder.exists() and not folder.is_dir():
    raise UserError(f"--output={path} is a file; name a folder")
  if not (folder / ABOUT).exists():
    # A lock, and files that were being written, are of a command that was stopped at once.
    there = folder.iterdir() if folder.exists() else ()
    there = [inside.name for inside in there if not inside.name.startswith(".")]
    if there:
      raise UserError(f"--output={path} is there, holds {there[0]}, and is no evaluation's; choose "
                      "another folder")
    return
  try:
    theirs = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    if theirs.pop("format") != FORMAT:
      raise ValueError("of another version")
  except (ValueError, KeyError, AttributeError) as error:
    raise UserError(f"{folder / ABOUT} is not an evaluation's ({error}); choose another --output"
                    ) from error
  theirs, ours = _flat(theirs), _flat(json.loads(json.dumps(identity)))
  different = [key for key in [*ours, *theirs] if theirs.get(key) != ours.get(key)]
  if different and (folder / DRAWN).exists():  # else nothing would be lost
    key = different[0]
    more = len(set(different)) - 1
    raise UserError(
      f"--output={path} holds another evaluation: its {key} is {_shown(theirs, key)}, this one's "
      f"is {_shown(ours, key)}{f' and {more} more differ' if more else ''}; choose another --output"
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
  """`{"a.b": leaf}` of JSON's objects."""
  return configs.flatten(value, prefix)


def _shown(flat: Mapping[str, Any], key: str) -> str:
  text = repr(flat[key]) if key in flat else "not there"
  return text if len(text) < 80 else f"{text[:76]}..."


class Shards:
  """Arrays of one point and one set of prompts, in shards of as many pictures as are drawn at once.

  Attributes:
    folder: theirs.
    size: pictures a shard.
    total: pictures of all.
  """

  def __init__(self, folder: epath.Path, size: int, total: int):
    self.folder, self.size, self.total = folder, size, total

  def __len__(self) -> int:
    return -(-self.total // self.size)

  def rows(self, shard: int) -> range:
    """The pictures that a shard holds."""
    return range(shard * self.size, min((shard + 1) * self.size, self.total))

  def path(self, kind: str, shard: int) -> epath.Path:
    return self.folder / f"{kind}_{shard:05d}.npz"

  def missing(self, kind: str) -> list[int]:
    """The shards of a kind that are not there or not whole, the same on every process."""
    found = [i for i in range(len(self)) if not self._whole(kind, i)] if is_primary() else []
    return json.loads(broadcast_bytes(json.dumps(found).encode()))

  def write(self, kind: str, shard: int, arrays: Mapping[str, Any]) -> None:
    """Writes a shard; on the primary process only."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_whole(self.path(kind, shard), content.getvalue())

  def read(self, kind: str, shard: int) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(self.path(kind, shard).read_bytes()), allow_pickle=False) as arrays:
      return {name: arrays[name] for name in arrays.files}

  def pictures(self) -> Iterator[np.ndarray]:
    """uint8 [n, H, W, 3] of each shard, in order."""
    for shard in range(len(self)):
      yield self.read("pictures", shard)["images"]

  def some(self, indices: np.ndarray) -> np.ndarray:
    """The pictures of some indices, uint8 [n, H, W, 3]."""
    found = {}
    for shard in sorted({int(i) // self.size for i in indices}):
      images = self.read("pictures", shard)["images"]
      found |= {int(i): images[int(i) % self.size] for i in indices if i // self.size == shard}
    return np.stack([found[int(i)] for i in indices])

  def _whole(self, kind: str, shard: int) -> bool:
    """Whether a shard is there and can be read: a machine that lost power may leave it cut."""
    path = self.path(kind, shard)
    if not path.exists():
      return False
    try:
      with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as file:
        return file.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError):
      return False


def temporary() -> str:
  """A folder for an evaluation that keeps nothing."""
  import tempfile

  return os.path.join(tempfile.mkdtemp(prefix="t2i_jax_evaluate_"), "evaluation")
