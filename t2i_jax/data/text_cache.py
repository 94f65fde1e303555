"""Features of captions that were computed before training, on disk.

  index.json                     what made them, and how they are cut into shards
  captions.npy                   uint64 [n], the captions' digests in ascending order
  00000/ENCODER.FIELD.npy        the features of the first captions in that order
  00001/...

A caption is found by its digest, so rows of any order, epoch and split share a
cache. Shards are memory-mapped, as many at a time as the process may open files;
several hosts write different ones, each whole or not at all.
"""

import collections
import fcntl
import hashlib
import json
import math
import os
import resource
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from t2i_jax.errors import UserError

Features = dict[str, dict[str, np.ndarray]]
# Shape without the captions' axis and type ("bool", "float") of each field, by encoder.
Fields = Mapping[str, Mapping[str, tuple[tuple[int, ...], str]]]
FORMAT = 2
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_INDEX, _DIGESTS = "index.json", "captions.npy"
_REMEDY = "make another with python -m t2i_jax.precompute text, or leave text.cache out"


def digests(captions: Iterable[str]) -> np.ndarray:
  """uint64 [n], 64 bits of each caption's BLAKE2b."""
  def digest(caption: str) -> int:
    said = caption.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")

  return np.array([digest(caption) for caption in captions], np.uint64)


class Writer:
  """Writes a cache, or what is still missing of it.

  Args:
    path: folder of the cache.
    captions: of the data set; repeated ones, and the empty one, are taken care of.
    encoders: `{name: {"fingerprint": text, ...}}` of what makes the features.
    fields: what they make of a caption.
    dtype: of the features, a key of `DTYPES`.
    shard_size: captions a shard.
    host, hosts: which of several hosts writes, and how many do.

  Raises:
    UserError: the folder holds something else, or another process of this host writes there.
    OSError: it cannot be written.
  """

  def __init__(self, path: str | os.PathLike, captions: Iterable[str],
               encoders: Mapping[str, Mapping[str, Any]], fields: Fields, dtype: str,
               shard_size: int, host: int = 0, hosts: int = 1):
    self._host, self._hosts = host, hosts
    self._path = Path(path).expanduser()
    by_digest: dict[int, str] = {}
    for caption in ("", *dict.fromkeys(captions)):
      other = by_digest.setdefault(int(digests([caption])[0]), caption)
      if other != caption:
        raise UserError(f"the captions '{caption}' and '{other}' have the same digest; reword one")
    order = np.array(sorted(by_digest), np.uint64)
    self._captions = [by_digest[int(number)] for number in order]
    self._dtype, self._shard_size = DTYPES[dtype], shard_size
    index = {
      "format": FORMAT, "encoders": encoders, "fields": fields, "dtype": dtype,
      "shard_size": shard_size, "captions": len(order),
      "captions_sha256": hashlib.sha256(order.tobytes()).hexdigest(),
    }  # fmt: skip
    self._index = json.loads(json.dumps(index))
    self._claim(order, self._index)

  def _claim(self, order: np.ndarray, index: dict[str, Any]) -> None:
    path = self._path / _INDEX
    if path.exists():
      self._lock()
      theirs = _read_index(self._path)
      if theirs != index:
        raise UserError(f"'{self._path}' holds another cache: {_difference(theirs, index)}; choose "
                        "another folder, or delete that one")
      return
    there = [p.name for p in self._path.iterdir()] if self._path.is_dir() else []
    # Dotted names and a list without an index are what an earlier attempt left.
    if self._path.is_file() or any(n != _DIGESTS and not n.startswith(".") for n in there):
      raise UserError(f"'{self._path}' is there and is no cache; choose another folder")
    self._path.mkdir(parents=True, exist_ok=True)
    self._lock()
    beside = self._path / f".captions.{self._host}.npy"
    np.save(beside, order)
    beside.replace(self._path / _DIGESTS)
    beside = self._path / f".index.{self._host}"
    beside.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    beside.replace(path)

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

  def __len__(self) -> int:
    """Captions of the cache."""
    return len(self._captions)

  def missing(self, of_all: bool = False) -> list[int]:
    """The shards that this host, or any, still has to write: those that are not there whole."""
    missing = _missing(self._path, self._index)
    return [n for n in missing if of_all or n % self._hosts == self._host]

  @property
  def bytes_a_caption(self) -> int:
    """What a caption's features take on the disk."""
    return sum(
      math.prod(shape) * (1 if kind == "bool" else self._dtype.itemsize)
      for fields in self._index["fields"].values() for shape, kind in fields.values()
    )  # fmt: skip

  def captions(self, shard: int) -> list[str]:
    """The captions of a shard."""
    return self._captions[shard * self._shard_size : (shard + 1) * self._shard_size]

  def write(self, shard: int, features: Features) -> None:
    """Writes a shard, whole or not at all.

    Args:
      shard: its number.
      features: of its captions, float or bool [n, ...] by encoder and field.

    Raises:
      UserError: a feature is not finite, so the encoder or its weights are broken.
      OSError: it cannot be written.
    """
    beside = self._path / f".{shard:05d}"
    for left in (beside, _shard(self._path, shard)):  # by a process that was killed, or damaged
      shutil.rmtree(left, ignore_errors=True)
    try:
      beside.mkdir()
      for name, fields in features.items():
        for field, value in fields.items():
          if value.dtype != bool:
            if not np.isfinite(value).all():
              raise UserError(f"{name} gives features that are not finite, of one of "
                              f"'{self.captions(shard)[0]}' and the captions after it; use "
                              "--config.precision.compute=float32, or other weights")
            value = value.astype(self._dtype)
          # numpy's files know no bfloat16; the index does.
          stored = value.view(np.uint16) if value.dtype == ml_dtypes.bfloat16 else value
          np.save(beside / f"{name}.{field}.npy", stored)
      beside.rename(_shard(self._path, shard))
    except BaseException:
      shutil.rmtree(beside, ignore_errors=True)
      raise


class TextCache:
  """Reads a cache.

  Args:
    path: its folder.
    encoders: those whose features are wanted; all by default.

  Raises:
    UserError: there is none, it is not whole, or it lacks one of the encoders.
  """

  def __init__(self, path: str | os.PathLike, encoders: Sequence[str] = ()):
    self._path = Path(path).expanduser()
    index = _read_index(self._path)
    self.encoders: dict[str, dict[str, Any]] = index["encoders"]
    for name in encoders:
      if name not in self.encoders:
        raise UserError(f"text.cache={self._path} has no features of '{name}', only of "
                        f"{', '.join(sorted(self.encoders))}; {_REMEDY}")
    self._fields = {name: index["fields"][name] for name in encoders or self.encoders}
    self._dtype, self._shard_size = DTYPES[index["dtype"]], index["shard_size"]
    self._digests = _load(self._path / _DIGESTS)
    if hashlib.sha256(self._digests.tobytes()).hexdigest() != index["captions_sha256"]:
      raise UserError(f"{self._path / _DIGESTS} is damaged; delete '{self._path}', and run "
                      "python -m t2i_jax.precompute text again")
    self._shards: collections.OrderedDict[int, Features] = collections.OrderedDict()
    self._most_open = max(_files_allowed() // sum(map(len, self._fields.values())), 1)
    absent = _missing(self._path, index)
    if absent:
      count = -(-len(self._digests) // self._shard_size)
      raise UserError(f"the cache '{self._path}' is not whole: {len(absent)} of {count} shards are "
                      "missing or damaged; give the same python -m t2i_jax.precompute text again, "
                      "which goes on from there")

  def check(self, fingerprints: Mapping[str, str]) -> None:
    """Raises UserError unless the cache was made by encoders with these fingerprints."""
    for name, fingerprint in fingerprints.items():
      if self.encoders[name]["fingerprint"] != fingerprint:
        raise UserError(f"text.cache={self._path} is stale: its features are of another "
                        f"{name} or tokenizer than this run's; {_REMEDY}")

  def check_captions(self, captions: Iterable[str], what: str) -> None:
    """Raises UserError unless the cache has all of these captions, of `what`."""
    captions = list(dict.fromkeys(captions))
    absent = np.flatnonzero(~self._has(digests(captions)))
    if len(absent):
      raise UserError(
        f"text.cache={self._path} is stale: it lacks {len(absent)} of the {len(captions)} captions "
        f"of {what}, such as '{captions[absent[0]]}'; {_REMEDY}"
      )

  def lookup(self, captions: Sequence[str]) -> Features:
    """Features [n, ...] of n captions, by encoder and field.

    Raises:
      UserError: for a caption that the cache lacks.
    """
    wanted = digests(captions)
    if not self._has(wanted).all():
      self.check_captions(captions, "this batch")
    rows = np.searchsorted(self._digests, wanted)
    shards, rows = np.divmod(rows, self._shard_size)
    found: Features = {
      name: {
        field: np.empty((len(captions), *shape), bool if kind == "bool" else self._dtype)
        for field, (shape, kind) in fields.items()
      }
      for name, fields in self._fields.items()
    }
    for shard in np.unique(shards):
      here, opened = shards == shard, self._open(int(shard))
      for name, fields in found.items():
        for field, out in fields.items():
          out[here] = opened[name][field][rows[here]]
    return found

  def null(self) -> Features:
    """Features [1, ...] of the empty caption."""
    return self.lookup([""])

  def _has(self, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(self._digests, wanted), len(self._digests) - 1)
    return self._digests[at] == wanted

  def _open(self, shard: int) -> Features:
    """A shard's arrays, mapped; those that were not asked for longest are closed."""
    if shard not in self._shards:
      while len(self._shards) >= self._most_open:
        self._shards.popitem(last=False)
      self._shards[shard] = {
        name: {
          field: _load(_file(self._path, shard, name, field), "r").view(
            bool if kind == "bool" else self._dtype
          )
          for field, (_, kind) in fields.items()
        }
        for name, fields in self._fields.items()
      }
    self._shards.move_to_end(shard)
    return self._shards[shard]


def _shard(path: Path, number: int) -> Path:
  return path / f"{number:05d}"


def _file(path: Path, shard: int, name: str, field: str) -> Path:
  return _shard(path, shard) / f"{name}.{field}.npy"


def _missing(path: Path, index: Mapping[str, Any]) -> list[int]:
  """The shards that are not there whole, judged by the headers and sizes of their files."""
  size, rows = index["shard_size"], index["captions"]
  return [
    shard for shard in range(-(-rows // size))
    if not all(
      _is_whole(_file(path, shard, name, field), (min(size, rows - shard * size), *shape),
                np.dtype(bool) if kind == "bool" else DTYPES[index["dtype"]])
      for name, fields in index["fields"].items() for field, (shape, kind) in fields.items()
    )
  ]  # fmt: skip


def _is_whole(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> bool:
  try:
    with path.open("rb") as file:
      np.lib.format.read_magic(file)
      found, fortran, kind = np.lib.format.read_array_header_1_0(file)
      end = file.tell() + math.prod(found) * kind.itemsize
    stored = np.dtype(np.uint16) if dtype == ml_dtypes.bfloat16 else dtype
    return (found, fortran, kind, path.stat().st_size) == (shape, False, stored, end)
  except (FileNotFoundError, NotADirectoryError, ValueError):
    return False


def _files_allowed() -> int:
  """How many files to keep open: half of what the process may, which is raised to the most."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  most = soft if hard == resource.RLIM_INFINITY else hard
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
  except (OSError, ValueError):
    most = soft
  return min(most, 1 << 16) // 2


def _load(path: Path, mode: str | None = None) -> np.ndarray:
  try:
    return np.load(path, mmap_mode=mode, allow_pickle=False)
  except (OSError, ValueError, EOFError) as error:
    raise UserError(f"{path} cannot be read ({error}); delete the folder '{path.parent}', and run "
                    "python -m t2i_jax.precompute text again") from error


def _read_index(path: Path) -> dict[str, Any]:
  if not (path / _INDEX).is_file():
    raise UserError(f"no cache of text features in '{path}': it has no {_INDEX}; make one with "
                    "python -m t2i_jax.precompute text")
  try:
    index = json.loads((path / _INDEX).read_text())
    complete = index["format"] == FORMAT and index["dtype"] in DTYPES and {
      "encoders", "fields", "shard_size", "captions", "captions_sha256"
    } <= set(index) and index["shard_size"] > 0 and set(index["fields"]) == set(index["encoders"])
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path / _INDEX} is no cache's index ({error}); delete '{path}', and run "
                    "python -m t2i_jax.precompute text again") from error
  if not complete:
    raise UserError(f"{path / _INDEX} is of another version (format {index['format']}, this one "
                    f"reads {FORMAT}); delete '{path}', and run python -m t2i_jax.precompute text "
                    "again")
  return index


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], prefix: str = "") -> str:
  """The first difference of two nested dicts, in words."""
  key = next(k for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k))
  one, other = theirs.get(key), ours.get(key)
  if isinstance(one, dict) and isinstance(other, dict):
    return _difference(one, other, f"{prefix}{key}.")
  short = lambda value: text if len(text := str(value)) <= 60 else f"{text[:60]}..."  # noqa: E731
  return f"its {prefix}{key} is {short(one)}, this one's is {short(other)}"
