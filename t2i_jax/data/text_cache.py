"""Features of captions that were computed before training, on disk.

  index.json                     what made them, and how they are cut into shards
  captions.npy                   uint64 [n], the captions' digests in ascending order
  00000/ENCODER.FIELD.npy        the features of the first captions in that order
  00001/...

A caption is found by its digest, so rows of any order, epoch and split share a
cache. Shards are memory-mapped; several hosts write different ones, each whole
or not at all.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from t2i_jax.errors import UserError

Features = dict[str, dict[str, np.ndarray]]
FORMAT = 1
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
_INDEX, _DIGESTS = "index.json", "captions.npy"


def digests(captions: Iterable[str]) -> np.ndarray:
  """uint64 [n], 64 bits of each caption's BLAKE2b."""
  return np.array([
    int.from_bytes(hashlib.blake2b(c.encode(), digest_size=8).digest(), "big") for c in captions
  ], np.uint64)


class Writer:
  """Writes a cache, or what is still missing of it.

  Args:
    path: folder of the cache.
    captions: of the data set; repeated ones, and the empty one, are taken care of.
    encoders: `{name: {"fingerprint": text, ...}}` of what makes the features.
    dtype: of the features, a key of `DTYPES`.
    shard_size: captions a shard.
    host, hosts: which of several hosts writes, and how many do.

  Raises:
    UserError: the folder holds something else, or another process of this host writes there.
    OSError: it cannot be written.
  """

  def __init__(self, path: str | os.PathLike, captions: Iterable[str],
               encoders: Mapping[str, Mapping[str, Any]], dtype: str, shard_size: int,
               host: int = 0, hosts: int = 1):
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
    self._claim(order, {
      "format": FORMAT, "encoders": {k: dict(v) for k, v in encoders.items()}, "dtype": dtype,
      "shard_size": shard_size, "captions": len(order),
      "captions_sha256": hashlib.sha256(order.tobytes()).hexdigest(),
    })  # fmt: skip

  def _claim(self, order: np.ndarray, index: dict[str, Any]) -> None:
    path = self._path / _INDEX
    if path.exists():
      self._lock()
      theirs = _read_index(self._path)
      for key in index:
        if theirs.get(key) != index[key]:
          raise UserError(
            f"'{self._path}' holds another cache: its {key} is {_short(theirs.get(key))}, this "
            f"one's is {_short(index[key])}; choose another folder, or delete that one"
          )
      return
    if self._path.exists() and any(p for p in self._path.iterdir() if p.name[0] != "."):
      raise UserError(f"'{self._path}' is there and is no cache; choose another folder")
    self._path.mkdir(parents=True, exist_ok=True)
    self._lock()
    beside = self._path / f".captions.{os.getpid()}.npy"
    np.save(beside, order)
    beside.replace(self._path / _DIGESTS)
    beside = self._path / f".index.{os.getpid()}"
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

  def missing(self) -> list[int]:
    """The shards that this host still has to write."""
    count = -(-len(self._captions) // self._shard_size)
    return [n for n in range(self._host, count, self._hosts) if not _shard(self._path, n).is_dir()]

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
    shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
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

  Raises:
    UserError: there is none, or it is not whole.
  """

  def __init__(self, path: str | os.PathLike):
    self._path = Path(path).expanduser()
    index = _read_index(self._path)
    self.encoders: dict[str, dict[str, Any]] = index["encoders"]
    self._dtype, self._shard_size = DTYPES[index["dtype"]], index["shard_size"]
    self._digests = _load(self._path / _DIGESTS)
    if hashlib.sha256(self._digests.tobytes()).hexdigest() != index["captions_sha256"]:
      raise UserError(f"{self._path / _DIGESTS} is damaged; delete '{self._path}', and run "
                      "python -m t2i_jax.precompute text again")
    self._shards: dict[int, Features] = {}
    count = -(-len(self._digests) // self._shard_size)
    absent = [n for n in range(count) if not _shard(self._path, n).is_dir()]
    if absent:
      raise UserError(f"the cache '{self._path}' is not whole: {len(absent)} of {count} shards are "
                      "missing; give the same python -m t2i_jax.precompute text again, which goes "
                      "on from there")

  def check(self, fingerprints: Mapping[str, str]) -> None:
    """Raises UserError unless the cache was made by encoders with these fingerprints."""
    remedy = "make another with python -m t2i_jax.precompute text"
    for name, fingerprint in fingerprints.items():
      if name not in self.encoders:
        raise UserError(f"text.cache={self._path} has no features of '{name}', only of "
                        f"{', '.join(sorted(self.encoders))}; {remedy}")
      if self.encoders[name]["fingerprint"] != fingerprint:
        raise UserError(f"text.cache={self._path} is stale: its features are of another "
                        f"{name} or tokenizer than this run's; {remedy}")

  def check_captions(self, captions: Iterable[str], what: str) -> None:
    """Raises UserError unless the cache has all of these captions, of `what`."""
    captions = list(dict.fromkeys(captions))
    absent = np.flatnonzero(~self._has(digests(captions)))
    if len(absent):
      raise UserError(
        f"text.cache={self._path} is stale: it lacks {len(absent)} of the {len(captions)} captions "
        f"of {what}, such as '{captions[absent[0]]}'; make another with python -m "
        "t2i_jax.precompute text"
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
    found: Features = {}
    for shard in np.unique(shards):
      here = shards == shard
      for name, fields in self._open(int(shard)).items():
        for field, stored in fields.items():
          out = found.setdefault(name, {})
          if field not in out:
            out[field] = np.empty((len(captions), *stored.shape[1:]), stored.dtype)
          out[field][here] = stored[rows[here]]
    return found

  def null(self) -> Features:
    """Features [1, ...] of the empty caption."""
    return self.lookup([""])

  def _has(self, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(self._digests, wanted), len(self._digests) - 1)
    return self._digests[at] == wanted

  def _open(self, shard: int) -> Features:
    """A shard's arrays, mapped."""
    if shard not in self._shards:
      opened: Features = {}
      for path in sorted(_shard(self._path, shard).glob("*.npy")):
        name, field = path.stem.rsplit(".", 1)
        stored = _load(path, "r")
        if stored.dtype == np.uint16:
          stored = stored.view(self._dtype)
        opened.setdefault(name, {})[field] = stored
      self._shards[shard] = opened
    return self._shards[shard]


def _shard(path: Path, number: int) -> Path:
  return path / f"{number:05d}"


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
      "encoders", "shard_size", "captions", "captions_sha256"
    } <= set(index)
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f"{path / _INDEX} is no cache's index ({error}); delete '{path}', and run "
                    "python -m t2i_jax.precompute text again") from error
  if not complete:
    raise UserError(f"{path / _INDEX} is of another version (format {index['format']}, this one "
                    f"reads {FORMAT}); delete '{path}', and run python -m t2i_jax.precompute text "
                    "again")
  return index


def _short(value: Any) -> str:
  text = json.dumps(value) if not isinstance(value, str) else value
  return text if len(text) <= 60 else f"{text[:60]}..."
