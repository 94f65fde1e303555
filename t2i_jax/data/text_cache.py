"""Features of captions that were computed before training, on disk.

  index.json                     what made them, and how they are cut into shards
  captions.npy                   uint64 [n], the captions' digests in ascending order
  00000/ENCODER.FIELD.npy        the features of the first captions in that order
  00001/...

A caption is found by its digest, so rows of any order, epoch and split share a
cache. Shards are memory-mapped, as many at a time as the process may open files;
several hosts write different ones, each whole or not at all.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2i_jax.data import shards
from t2i_jax.data.shards import Index, Kind, Layout, ShardReader, ShardWriter, load
from t2i_jax.errors import UserError

Features = dict[str, dict[str, np.ndarray]]
# Shape without the captions' axis and type ("bool", "float") of each field, by encoder.
Fields = Mapping[str, Mapping[str, tuple[tuple[int, ...], str]]]
FORMAT = 2
DTYPES = {name: shards.DTYPES[name] for name in ("bfloat16", "float32")}
_DIGESTS = "captions"
_COMMAND = "python -m t2i_jax.precompute text"
_REMEDY = f"make another with {_COMMAND}, or leave text.cache out"


def _fits(index: Index) -> bool:
  needed = {"encoders", "fields", "shard_size", "captions", "captions_sha256"}
  return (
    index["dtype"] in DTYPES and needed <= set(index) and index["shard_size"] > 0
    and set(index["fields"]) == set(index["encoders"])
  )  # fmt: skip


KIND = Kind("text features", _COMMAND, FORMAT, _fits)


def digests(captions: Iterable[str]) -> np.ndarray:
  """uint64 [n], 64 bits of each caption's BLAKE2b."""
  def digest(caption: str) -> int:
    said = caption.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(said, digest_size=8).digest(), "big")

  return np.array([digest(caption) for caption in captions], np.uint64)


class Writer(ShardWriter):
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
    by_digest: dict[int, str] = {}
    for caption in ("", *dict.fromkeys(captions)):
      other = by_digest.setdefault(int(digests([caption])[0]), caption)
      if other != caption:
        raise UserError(f"the captions '{caption}' and '{other}' have the same digest; reword one")
    order = np.array(sorted(by_digest), np.uint64)
    self._captions = [by_digest[int(number)] for number in order]
    index = {
      "format": FORMAT, "encoders": encoders, "fields": fields, "dtype": dtype,
      "shard_size": shard_size, "captions": len(order),
      "captions_sha256": hashlib.sha256(order.tobytes()).hexdigest(),
    }  # fmt: skip
    super().__init__(path, index, _layout(index), KIND, {_DIGESTS: order}, host, hosts)

  def __len__(self) -> int:
    """Captions of the cache."""
    return len(self._captions)

  @property
  def bytes_a_caption(self) -> int:
    """What a caption's features take on the disk."""
    return self.layout.bytes_a_row

  def captions(self, shard: int) -> list[str]:
    """The captions of a shard."""
    rows = self.layout.rows_of(shard)
    return self._captions[rows.start : rows.stop]

  def write(self, shard: int, features: Features) -> None:
    """Writes a shard, whole or not at all.

    Args:
      shard: its number.
      features: of its captions, float or bool [n, ...] by encoder and field.

    Raises:
      UserError: a feature is not finite, so the encoder or its weights are broken.
      OSError: it cannot be written.
    """
    for name, fields in features.items():
      for value in fields.values():
        if value.dtype != bool and not np.isfinite(value).all():
          raise UserError(f"{name} gives features that are not finite, of one of "
                          f"'{self.captions(shard)[0]}' and the captions after it; use "
                          "--config.precision.compute=float32, or other weights")
    super().write(shard, {
      f"{name}.{field}": value for name, fields in features.items()
      for field, value in fields.items()
    })  # fmt: skip


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
    index = KIND.read_index(self._path)
    self.encoders: dict[str, dict[str, Any]] = index["encoders"]
    for name in encoders:
      if name not in self.encoders:
        raise UserError(f"text.cache={self._path} has no features of '{name}', only of "
                        f"{', '.join(sorted(self.encoders))}; {_REMEDY}")
    wanted = {name: index["fields"][name] for name in encoders or self.encoders}
    self._digests = load(self._path / f"{_DIGESTS}.npy", KIND)
    if hashlib.sha256(self._digests.tobytes()).hexdigest() != index["captions_sha256"]:
      raise UserError(f"{self._path / _DIGESTS}.npy is damaged; delete '{self._path}', and run "
                      f"{_COMMAND} again")
    self._names = {
      name: {field: f"{name}.{field}" for field in fields} for name, fields in wanted.items()
    }
    names = [name for fields in self._names.values() for name in fields.values()]
    self._shards = ShardReader(self._path, _layout(index), KIND, names)

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
    found = self._shards.take(np.searchsorted(self._digests, wanted))
    return {
      name: {field: found[array] for field, array in fields.items()}
      for name, fields in self._names.items()
    }

  def null(self) -> Features:
    """Features [1, ...] of the empty caption."""
    return self.lookup([""])

  def _has(self, wanted: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(self._digests, wanted), len(self._digests) - 1)
    return self._digests[at] == wanted


def _layout(index: Index) -> Layout:
  return Layout(index["captions"], index["shard_size"], {
    f"{name}.{field}": (
      tuple(shape), np.dtype(bool) if kind == "bool" else DTYPES[index["dtype"]]
    )
    for name, fields in index["fields"].items() for field, (shape, kind) in fields.items()
  })  # fmt: skip
