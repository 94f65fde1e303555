"""What a first stage made of a data set's pictures before training, on disk.

  SPLIT/index.json            what made it, of which pictures, and how it is cut into shards
  SPLIT/summary.json          the rows without a picture, and the statistics of the latents
  SPLIT/00000/moments.npy     [n, variants, h, w, 2c], mean and log-variance of the first rows
  SPLIT/00000/readable.npy    bool [n], whether the row's picture could be read
  SPLIT/00000/sums.npy        float64 [n, 2, c], sums over positions of E[z] and E[z^2] of a draw z
  SPLIT/00001/...

The moments are of the posterior, so that training draws other latents from it in every epoch. A
row is found by its index in the data set; captions stay with the data set. The variants of a row
are its picture, and the same mirrored if that was asked for.
"""

import dataclasses
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t2i_jax.data.base import FileSource, Rows, Source
from t2i_jax.data.shards import DTYPES, INDEX, Index, Kind, Layout, ShardReader, ShardWriter
from t2i_jax.errors import UserError

FORMAT = 1
COMMAND = "python -m t2i_jax.precompute latents"
_REMEDY = f"make another with {COMMAND}, or leave data.latents out"
_SUMMARY = "summary.json"
_MOMENTS, _READABLE, _SUMS = "moments", "readable", "sums"


def _fits(index: Index) -> bool:
  needed = {"first_stage", "data", "dtype", "shape", "variants", "shard_size"}
  return (
    needed <= set(index) and index["dtype"] in DTYPES and index["shard_size"] > 0
    and index["variants"] in (1, 2) and len(index["shape"]) == 3 and "fingerprint" in
    index["first_stage"] and {"split", "rows", "digest", "seed", "resolution"} <= set(index["data"])
  )  # fmt: skip


KIND = Kind("latents", COMMAND, FORMAT, _fits)


def about(source: Source, name: str, options: Mapping[str, Any], split: str, seed: int,
          rows: int) -> dict[str, Any]:
  """What says of which pictures a cache is.

  Args:
    source: the split, opened.
    name, options, split, seed: with which it was opened.
    rows: how many of its first ones are stored.
  """
  return {
    "name": name, "options": dict(options), "split": split, "resolution": source.resolution,
    "seed": seed, "rows": rows, "digest": source.digest(),
  }  # fmt: skip


def check_folder(path: str | os.PathLike, splits: Collection[str]) -> None:
  """Raises UserError where a folder holds something beside caches of these splits."""
  path = Path(path).expanduser()
  there = [p.name for p in path.iterdir()] if path.is_dir() else []
  if path.is_file() or any(name not in splits and not name.startswith(".") for name in there):
    raise UserError(f"'{path}' is there and is no cache of latents; choose another folder")


class Writer(ShardWriter):
  """Writes one split of a cache, or what is still missing of it.

  Args:
    path: folder of the cache.
    data: as `about` says it.
    first_stage: `{"fingerprint": text, ...}` of what makes the moments.
    shape: of a picture's moments, (h, w, 2c).
    dtype: of the moments, a key of `DTYPES`.
    variants: 2 with mirrored pictures, else 1.
    shard_size: rows a shard.
    host, hosts: which of several hosts writes, and how many do.

  Raises:
    UserError: the folder holds something else, or another process of this host writes there.
    OSError: it cannot be written.
  """

  def __init__(self, path: str | os.PathLike, data: Mapping[str, Any],
               first_stage: Mapping[str, Any], shape: tuple[int, int, int], dtype: str,
               variants: int, shard_size: int, host: int = 0, hosts: int = 1):
    index = {
      "format": FORMAT, "first_stage": first_stage, "data": data, "shape": shape, "dtype": dtype,
      "variants": variants, "shard_size": shard_size,
    }  # fmt: skip
    self._dtype = DTYPES[dtype]
    split = Path(path).expanduser() / data["split"]
    super().__init__(split, index, _layout(index), KIND, None, host, hosts)

  def write(self, shard: int, moments: np.ndarray, readable: np.ndarray) -> None:
    """Writes a shard, whole or not at all.

    Args:
      shard: its number.
      moments: of its rows, float [n, variants, h, w, 2c].
      readable: bool [n]; the moments of other rows do not count.

    Raises:
      UserError: a moment is not finite as it would be stored.
      OSError: it cannot be written.
    """
    with np.errstate(over="ignore"):
      stored = moments.astype(self._dtype)
    stored[~readable] = 0
    finite = np.isfinite(stored).all(axis=(1, 2, 3, 4))
    if not finite.all():
      row = self.layout.rows_of(shard)[int(np.argmin(finite))]
      raise UserError(f"the first stage gives moments of row {row} that are not finite as "
                      f"{self._dtype.name}; use --dtype=float32 and "
                      "--config.precision.compute=float32, or another first stage")
    sums = _sums(stored) * readable[:, None, None]
    super().write(shard, {_MOMENTS: stored, _READABLE: readable, _SUMS: sums})

  def finish(self) -> None:
    """Writes the summary of a cache that is whole; for one host to do.

    Raises:
      UserError: not one picture can be read.
    """
    reader = ShardReader(self._path, self.layout, KIND, (_READABLE, _SUMS))
    readable, total = [], 0.0
    for number in range(self.layout.shards):
      shard = reader.shard(number)
      readable.append(np.array(shard[_READABLE]))
      total = total + shard[_SUMS].sum(axis=0)
    readable, (sums, squares) = np.concatenate(readable), total
    if not readable.any():
      raise UserError(f"not one of the {len(readable)} pictures can be read")
    variants, height, width, channels = self.layout.arrays[_MOMENTS][0]
    count = int(readable.sum()) * variants * height * width
    self.write_json(_SUMMARY, {
      "unreadable": np.flatnonzero(~readable).tolist(),
      "statistics": {
        **_statistics(count * channels // 2, sums.sum(), squares.sum()),
        "channels": _statistics(count, sums, squares),
      },
    })

  def is_finished(self) -> bool:
    """Whether there is a summary."""
    return (self._path / _SUMMARY).is_file()


def _sums(moments: np.ndarray) -> np.ndarray:
  """float64 [n, 2, c], sums over variants and positions of E[z] and E[z^2] of a draw z.

  The second is mean^2 + variance, so nothing has to be drawn.
  """
  rows, *_, doubled = moments.shape
  flat = moments.astype(np.float32).reshape(rows, -1, doubled)
  mean, variance = flat[..., : doubled // 2].astype(np.float64), np.exp(flat[..., doubled // 2 :])
  squares = np.einsum("npc,npc->nc", mean, mean) + variance.sum(axis=1, dtype=np.float64)
  return np.stack([mean.sum(axis=1), squares], axis=1)


def _statistics(count: int, sums: np.ndarray, squares: np.ndarray) -> dict[str, Any]:
  mean = sums / count
  std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
  return {"mean": mean.tolist(), "std": std.tolist()}


class LatentCache:
  """Reads one split of a cache.

  Attributes:
    data: of which pictures it is, as `about` says it.
    shape, dtype: of a row's moments, (h, w, 2c).
    rows: int64 [n], those that have a picture, ascending.
    variants: of each row.
    statistics: of draws from the posteriors: `mean` and `std`, and by channel in `channels`.

  Args:
    path: folder of the cache.
    split: one that it holds.

  Raises:
    UserError: there is none, or it is not whole.
  """

  def __init__(self, path: str | os.PathLike, split: str):
    self._folder = Path(path).expanduser()
    self._path = self._folder / split
    if not (self._path / INDEX).is_file():
      held = sorted(p.parent.name for p in self._folder.glob(f"*/{INDEX}"))
      if not held:
        raise UserError(f"no cache of latents in '{self._folder}'; make one with {COMMAND}")
      raise UserError(f"data.latents={self._folder} has no split '{split}', only "
                      f"{', '.join(held)}; add it with {COMMAND} --split={split}")
    index = KIND.read_index(self._path)
    layout = _layout(index)
    self.data, self._first_stage = index["data"], index["first_stage"]
    self.shape, self.dtype = tuple(index["shape"]), DTYPES[index["dtype"]]
    self.variants = index["variants"]
    self._shards = ShardReader(self._path, layout, KIND, (_MOMENTS,))
    summary = self._read_summary()
    self.statistics = summary["statistics"]
    self.rows = np.delete(np.arange(layout.rows), summary["unreadable"])

  def _read_summary(self) -> dict[str, Any]:
    path = self._path / _SUMMARY
    if not path.is_file():
      raise UserError(f"the cache '{self._path}' is not whole: it has no {_SUMMARY}; give the same "
                      f"{COMMAND} again, which goes on from there")
    try:
      summary = json.loads(path.read_text())
      if {"mean", "std", "channels"} <= set(summary["statistics"]) and "unreadable" in summary:
        return summary
    except (ValueError, KeyError, TypeError):
      pass
    raise UserError(f"{path} is damaged; delete it, and give the same {COMMAND} again")

  def check(self, fingerprint: str) -> None:
    """Raises UserError unless the cache was made by a first stage with this fingerprint."""
    if self._first_stage["fingerprint"] != fingerprint:
      raise UserError(f"data.latents={self._folder} is stale: its split '{self.data['split']}' is "
                      f"of another first stage than this run's; {_REMEDY}")

  def check_data(self, source: Source, name: str, options: Mapping[str, Any]) -> None:
    """Raises UserError unless the cache is of these pictures.

    Args:
      source: the split, opened with the cache's seed.
      name, options: of the data set.
    """
    ours = json.loads(json.dumps(about(
      source, name, options, self.data["split"], self.data["seed"],
      self.data["rows"] if source.infinite else len(source),
    )))  # fmt: skip
    for key in ("name", "resolution", "rows", "digest"):
      if ours[key] != self.data[key]:
        raise UserError(f"data.latents={self._folder} is stale: {self._why(key, ours)}; {_REMEDY}")

  def _why(self, key: str, ours: Mapping[str, Any]) -> str:
    split = self.data["split"]
    if key in ("name", "resolution"):
      what = "data set" if key == "name" else "resolution"
      return f"its split '{split}' is of {what} {self.data[key]}, this run's is of {ours[key]}"
    text = f"the pictures of split '{split}' are others now"
    if key == "rows":
      text += f", {ours['rows']} in place of {self.data['rows']}"
    for name, value in self.data["options"].items():
      if name in ours["options"] and ours["options"][name] != value:
        return f"{text} (its data.options.{name} is {value}, this run's {ours['options'][name]})"
    return text

  def lookup(self, rows: np.ndarray, variants: np.ndarray | None = None) -> np.ndarray:
    """Moments [n, h, w, 2c], as they are stored.

    Args:
      rows: int64 [n], indices in the data set.
      variants: int64 [n], which variant of each; the pictures as they are by default.
    """
    rows = np.asarray(rows, np.int64)
    variants = np.zeros_like(rows) if variants is None else variants
    return self._shards.take(rows, variants)[_MOMENTS]


class LatentSource(Source):
  """A split of a data set with moments in place of pictures, which are never read.

  Rows without a picture are left out. An infinite data set becomes one of the rows that are
  stored. Which variant of a row is taken follows from its draw.

  Attributes:
    was_infinite: whether the data set is.

  Args:
    source: the split.
    cache: of it.
  """

  def __init__(self, source: Source, cache: LatentCache):
    self._source, self._cache = source, cache
    self.resolution, self.was_infinite = source.resolution, source.infinite
    if source.weights is not None:
      weights = source.weights[cache.rows]
      self.weights = weights / weights.sum()

  def __len__(self) -> int:
    return len(self._cache.rows)

  def fetch(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    rows = self.describe(indices, draws)
    # The highest bit: the lowest ones choose among captions.
    variants = (draws >> np.uint64(63)).astype(np.int64) % self._cache.variants
    latent = self._cache.lookup(self._cache.rows[indices], variants)
    return dataclasses.replace(rows, extra={**rows.extra, "latent": latent})

  def describe(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    return self._source.describe(self._cache.rows[indices], draws)

  def digest(self) -> str:
    return self._source.digest()

  def captions(self) -> Iterator[str]:
    if not isinstance(self._source, FileSource):
      return self._source.captions()
    return itertools.chain.from_iterable(
      self._source.captions_of(int(row)) for row in self._cache.rows
    )

  def every_caption(self) -> Iterator[str]:
    return self.captions() if isinstance(self._source, FileSource) else self._source.every_caption()


def _layout(index: Index) -> Layout:
  """How a split lies in shards."""
  *_, doubled = index["shape"]
  return Layout(index["data"]["rows"], index["shard_size"], {
    _MOMENTS: ((index["variants"], *index["shape"]), DTYPES[index["dtype"]]),
    _READABLE: ((), np.dtype(bool)),
    _SUMS: ((2, doubled // 2), np.dtype(np.float64)),
  })  # fmt: skip
