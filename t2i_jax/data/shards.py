"""Arrays of many rows on disk, cut into shards: what the caches have in common.

  index.json       what the rows are, and how they are cut
  00000/NAME.npy   an array of the first rows
  00001/...

Several hosts write different shards, each whole or not at all, and one that was stopped goes on
with those that are not there. Shards are memory-mapped, as many at a time as the process may open
files.
"""

import collections
import dataclasses
import fcntl
import json
import math
import os
import resource
import shutil
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from t2i_jax.errors import UserError

INDEX = "index.json"
DTYPES = {
  "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16),
  "float32": np.dtype(np.float32),
}
Index = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of cache, for those who read about it.

  Attributes:
    holds: what it is a cache of.
    command: that makes one.
    format: number of the version that is written and read.
    fits: whether an index of this format has all that it must.
  """

  holds: str
  command: str
  format: int
  fits: Callable[[Index], bool]

  def read_index(self, path: Path) -> Index:
    """A cache's index; UserError where there is none, or one of another version."""
    if not (path / INDEX).is_file():
      raise UserError(f"no cache of {self.holds} in '{path}': it has no {INDEX}; make one with "
                      f"{self.command}")
    again = f"delete '{path}', and run {self.command} again"
    try:
      index = json.loads((path / INDEX).read_text())
      complete = index["format"] == self.format and self.fits(index)
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f"{path / INDEX} is no cache's index ({error}); {again}") from error
    if not complete:
      raise UserError(f"{path / INDEX} is of another version or kind (format {index['format']}; "
                      f"caches of {self.holds} have {self.format}); {again}")
    return index


@dataclasses.dataclass(frozen=True)
class Layout:
  """How rows lie in shards.

  Attributes:
    rows: of all shards together.
    shard_size: rows a shard, but for the last.
    arrays: shape of a row and type of each array, by name.
  """

  rows: int
  shard_size: int
  arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]

  @property
  def shards(self) -> int:
    """How many there are."""
    return -(-self.rows // self.shard_size)

  @property
  def bytes_a_row(self) -> int:
    """What a row takes on the disk."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.arrays.values())

  def rows_of(self, shard: int) -> range:
    """The rows of a shard."""
    return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows))

  def missing(self, path: Path) -> list[int]:
    """The shards that are not there whole, judged by the headers and sizes of their files."""
    return [
      shard for shard in range(self.shards)
      if not all(
        _is_whole(array_path(path, shard, name), (len(self.rows_of(shard)), *shape), dtype)
        for name, (shape, dtype) in self.arrays.items()
      )
    ]  # fmt: skip


class ShardWriter:
  """Writes shards, or those that are still missing.

  Args:
    path: folder of the cache.
    index: of the cache, which another attempt at it must have had too.
    layout: of its rows.
    kind: of the cache.
    beside: further arrays, by file name without the ending.
    host, hosts: which of several hosts writes, and how many do.

  Raises:
    UserError: the folder holds something else, or another process of this host writes there.
    OSError: it cannot be written.
  """

  def __init__(self, path: str | os.PathLike, index: Mapping[str, Any], layout: Layout, kind: Kind,
               beside: Mapping[str, np.ndarray] | None = None, host: int = 0, hosts: int = 1):
    self._path, self.layout, self._kind = Path(path).expanduser(), layout, kind
    self._host, self._hosts = host, hosts
    self._claim(json.loads(json.dumps(index)), beside or {})

  def _claim(self, index: Index, beside: Mapping[str, np.ndarray]) -> None:
    path = self._path / INDEX
    if path.exists():
      self._lock()
      theirs = self._kind.read_index(self._path)
      if theirs != index:
        raise UserError(f"'{self._path}' holds another cache: {difference(theirs, index)}; choose "
                        "another folder, or delete that one")
      return
    there = [p.name for p in self._path.iterdir()] if self._path.is_dir() else []
    # Dotted names and arrays without an index are what an earlier attempt left.
    left = {f"{name}.npy" for name in beside}
    if self._path.is_file() or any(n not in left and not n.startswith(".") for n in there):
      raise UserError(f"'{self._path}' is there and is no cache; choose another folder")
    self._path.mkdir(parents=True, exist_ok=True)
    self._lock()
    for name, value in beside.items():
      written = self._path / f".{name}.{self._host}.npy"
      np.save(written, value)
      written.replace(self._path / f"{name}.npy")
    self.write_json(INDEX, index)

  def _lock(self) -> None:
    """Keeps other processes of this host out; the lock ends with the process."""
    self._locked = open(self._path / f".lock.{self._host}", "w")
    try:
      fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(f"another process is writing the cache '{self._path}'; wait for it, or stop "
                      "it") from error

  def close(self) -> None:
    """Lets other processes in."""
    self._locked.close()

  def missing(self, of_all: bool = False) -> list[int]:
    """The shards that this host, or any, still has to write: those that are not there whole."""
    missing = self.layout.missing(self._path)
    return [n for n in missing if of_all or n % self._hosts == self._host]

  def write_json(self, name: str, content: Mapping[str, Any]) -> None:
    """Writes a file of the cache, whole or not at all; OSError where it cannot be written."""
    written = self._path / f".{name}.{self._host}"
    written.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    written.replace(self._path / name)

  def write(self, shard: int, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a shard, whole or not at all; OSError where it cannot be written."""
    beside = self._path / f".{shard:05d}"
    there = _shard_path(self._path, shard)
    for left in (beside, there):  # by a process that was killed, or damaged
      shutil.rmtree(left, ignore_errors=True)
    try:
      beside.mkdir()
      for name, (_, dtype) in self.layout.arrays.items():
        np.save(beside / f"{name}.npy", arrays[name].astype(dtype, copy=False).view(_stored(dtype)))
      beside.rename(there)
    except BaseException:
      shutil.rmtree(beside, ignore_errors=True)
      raise


class ShardReader:
  """Reads rows of a cache's arrays, from several threads if need be.

  Args:
    path: the cache's folder.
    layout: of its rows.
    kind: of the cache.
    names: of the arrays that are read; all by default.

  Raises:
    UserError: shards are missing or damaged.
  """

  # Those that are alive share the files that may be open.
  _all: "weakref.WeakSet[ShardReader]" = weakref.WeakSet()

  def __init__(self, path: Path, layout: Layout, kind: Kind, names: Sequence[str] = ()):
    self._path, self._layout, self._kind = path, layout, kind
    self._names = tuple(names or layout.arrays)
    absent = layout.missing(path)
    if absent:
      raise UserError(f"the cache '{path}' is not whole: {len(absent)} of {layout.shards} shards "
                      f"are missing or damaged; give the same {kind.command} again, which goes on "
                      "from there")
    self._begin()

  def _begin(self) -> None:
    self._open: collections.OrderedDict[int, dict[str, np.ndarray]] = collections.OrderedDict()
    self._lock = threading.Lock()
    self._all.add(self)

  def __getstate__(self) -> dict[str, Any]:
    """Another process opens files of its own."""
    return {k: v for k, v in vars(self).items() if k not in ("_open", "_lock")}

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    self._begin()

  def take(self, rows: np.ndarray, *within: np.ndarray) -> dict[str, np.ndarray]:
    """Arrays [n, ...] by name.

    Args:
      rows: int64 [n].
      within: indices [n] along the first axes of each row, if only a part of it is wanted.
    """
    found = {}
    for name in self._names:
      shape, dtype = self._layout.arrays[name]
      found[name] = np.empty((len(rows), *shape[len(within) :]), dtype)
    shards, rows = np.divmod(rows, self._layout.shard_size)
    for shard in np.unique(shards):
      here, opened = np.flatnonzero(shards == shard), self.shard(int(shard))
      at = tuple(indices[here] for indices in (rows, *within))
      for name, out in found.items():
        out[here] = opened[name][at]
    return found

  def shard(self, number: int) -> dict[str, np.ndarray]:
    """A shard's arrays, mapped; those that were not asked for longest are closed."""
    with self._lock:
      opened = self._open.pop(number, None)
      if opened is None:
        most = max(files_allowed() // (len(self._names) * len(self._all)), 1)
        while len(self._open) >= most:
          self._open.popitem(last=False)
        opened = {
          name: load(array_path(self._path, number, name), self._kind, "r").view(
            np.ndarray
          ).view(self._layout.arrays[name][1])
          for name in self._names
        }
      self._open[number] = opened
      return opened


def _shard_path(path: Path, number: int) -> Path:
  return path / f"{number:05d}"


def array_path(path: Path, shard: int, name: str) -> Path:
  """The file of an array's shard."""
  return _shard_path(path, shard) / f"{name}.npy"


def _stored(dtype: np.dtype) -> np.dtype:
  """The type in the file: numpy's files know no bfloat16, the index does."""
  return np.dtype(np.uint16) if dtype == ml_dtypes.bfloat16 else dtype


def _is_whole(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> bool:
  try:
    with path.open("rb") as file:
      np.lib.format.read_magic(file)
      found, fortran, kind = np.lib.format.read_array_header_1_0(file)
      end = file.tell() + math.prod(found) * kind.itemsize
    return (found, fortran, kind, path.stat().st_size) == (shape, False, _stored(dtype), end)
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return False


def files_allowed() -> int:
  """How many files to keep open: half of what the process may, which is raised to the most."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  most = soft if hard == resource.RLIM_INFINITY else hard
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
  except (OSError, ValueError):
    most = soft
  return min(most, 1 << 16) // 2


def load(path: Path, kind: Kind, mode: str | None = None) -> np.ndarray:
  """An array of a cache; UserError where it cannot be read."""
  try:
    return np.load(path, mmap_mode=mode, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise UserError(f"{path} cannot be read ({error}); delete the folder '{path.parent}', and run "
                    f"{kind.command} again") from error


def difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> str:
  """The first difference of two nested dicts, in words."""
  key = next(k for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k))
  one, other = theirs.get(key), ours.get(key)
  if isinstance(one, dict) and isinstance(other, dict):
    return difference(one, other, f"{prefix}{key}.")
  short = lambda value: text if len(text := str(value)) <= 60 else f"{text[:60]}..."  # noqa: E731
  return f"its {prefix}{key} is {short(one)}, this one's is {short(other)}"
