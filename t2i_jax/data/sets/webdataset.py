"""Tar shards of WebDataset or img2dataset, read in place through an index of offsets.

    00000.tar: 000000000.jpg, 000000000.txt, 000000000.json, 000000001.jpg ...

`python -m t2i_jax.data.prepare webdataset --source=DIR` writes the index below `--output`, and
nothing into DIR. Members of one key are a picture (jpg, jpeg, png, webp) and its caption: `txt`, or
`caption` of `json`. About one key in 100, chosen by its hash, is for testing.

img2dataset's default `--resize_mode=border` pads pictures with white to a square; where the bands
that their original sizes ask for are white, they are not looked at.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t2i_jax.data.held_out import held_out
from t2i_jax.data.images import BadImage
from t2i_jax.data.sets import beam, parallel, table, tar_samples, unfinished
from t2i_jax.data.sets.pictures import Pictures
from t2i_jax.data.sets.prepared import default_root
from t2i_jax.data.sets.tar_index import read_at
from t2i_jax.errors import UserError, unknown

_ONE_IN = 100
NAME = "webdataset"
_INDEX, _SKIPPED = "index.json", "skipped.txt"
_FORMAT = 2


def index_of(path: str, root: str | os.PathLike = "") -> Path:
  """Where the index of a folder of tar shards lies, below the folder of all prepared sets."""
  whole = os.path.abspath(os.path.expanduser(path))
  name = f"{os.path.basename(whole)}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}"
  return (Path(root).expanduser() if root else default_root()) / "webdataset" / name


class WebDataset(Pictures):
  """Pictures in tar shards.

  Args:
    split: "train" or "test".
    resolution: side of the pictures.
    seed: not used.
    path: the folder of shards.
    data_dir: `--output` of `t2i_jax.data.prepare`; empty is its default.
    crop, flips, sizes, synthetic, synthetic_share: as of `Pictures`.

  Raises:
    UserError: there is no index, or the shards have changed since it was made.
  """

  SPLITS = ("train", "test")

  def __init__(self, split: str = "train", resolution: int = 256, seed: int = 0, path: str = "",
               data_dir: str = "", crop: str = "centre", flips: bool = False, sizes: bool = False,
               synthetic: str = "", synthetic_share: float = 0.95):
    del seed
    if split not in self.SPLITS:
      raise unknown("split of data set 'webdataset'", split, self.SPLITS)
    if not path:
      raise UserError("data set 'webdataset' needs --config.data.options.path (of evaluate: "
                      "--data-option=path=...), a folder of .tar shards")
    folder = index_of(path, data_dir)
    again = f"python -m t2i_jax.data.prepare webdataset --source={path}"
    if not (folder / _INDEX).is_file():
      raise UserError(f"the tar shards of '{path}' have no index in {folder.parent}: run {again}")
    try:
      index = json.loads((folder / _INDEX).read_text())
      version, states = index["format"], dict(index["shards"])
    except (OSError, ValueError, KeyError, TypeError) as error:
      raise UserError(f"{folder / _INDEX} cannot be read ({error}); delete {folder} and run "
                      f"{again}") from None
    if version != _FORMAT:
      raise UserError(f"{folder} is of another version; delete it and run {again}")
    self._shards = [Path(path).expanduser() / name for name in states]
    for shard, state in zip(self._shards, states.values(), strict=True):
      if not shard.is_file() or _state(shard) != state:
        raise UserError(f"{shard} has changed since it was indexed; delete {folder} and run "
                        f"{again}")
    super().__init__(table.Table(folder / split), split, resolution, crop=crop, flips=flips,
                     sizes=sizes, synthetic=synthetic, synthetic_share=synthetic_share)

  def content(self, picture: int) -> bytes:
    shard, offset, length = (int(n) for n in self.table["place"][picture])
    try:
      return read_at(self._shards[shard], offset, length)
    except OSError as error:
      raise BadImage(self.table.name(picture), error.strerror or str(error)) from error


def write_index(
  source: Path, root: str | os.PathLike, workers: int, progress: Callable[[int, int], None],
  runner: str = "", pipeline: str = "",
) -> tuple[Path, list[tuple[str, str]]]:
  """Indexes the tar shards of a folder; returns the index's folder and what was skipped.

  A run that was stopped goes on with the shards that are not indexed. Arguments are those of
  `builder.PicturesBuilder`.

  Raises:
    UserError: there are no tar shards, none has a picture with a caption, or another process is at
      it.
  """
  names = sorted(os.path.relpath(path, source) for path in source.rglob("*.tar") if path.is_file())
  if not names:
    raise UserError(f"--source={source} has no .tar shards")
  folder = index_of(os.fspath(source), root)
  with unfinished.making(folder, f"the index of {source}") as beside:
    if folder.exists():  # which another process has just made
      return folder, []
    if not runner:  # whose workers may still be at it
      unfinished.clear(beside, "*.writing")
    return folder, _write_index(source, names, folder, beside, workers, progress, runner, pipeline)


def _write_index(
  source: Path, names: list[str], folder: Path, beside: Path, workers: int,
  progress: Callable[[int, int], None], runner: str, pipeline: str,
) -> list[tuple[str, str]]:
  """Makes the parts that are missing, and puts all of them together; returns what was skipped."""
  states = {name: _state(source / name) for name in names}  # before they are read
  parts = [beside / _part_name(source / name, name) for name in names]
  missing = [n for n, part in enumerate(parts) if not part.is_file()]
  jobs = [(source / names[n], names[n], n, parts[n]) for n in missing]
  begun = len(names) - len(missing)
  progress(begun, len(names))
  tell = lambda n: progress(begun + n + 1, len(names))  # noqa: E731
  if runner:
    beam.run(tar_samples.index, jobs, runner, pipeline, tell)
  else:
    parallel.run(tar_samples.index, jobs, workers, tell)
  made = [tar_samples.read(part) for part in parts]
  skipped = [pair for part in made for pair in part.skipped]
  columns = _together([part.columns for part in made])
  if columns is None:
    name, reason = skipped[-1] if skipped else (names[0], "is empty")
    raise UserError(f"none of {len(names)} tar shards of {source} has a picture with a caption; "
                    f"the last: {name}: {reason}")
  written = folder.with_name(f"writing-{folder.name}")
  shutil.rmtree(written, ignore_errors=True)
  written.mkdir()
  for split, part in _split(columns, source).items():
    table.write(written / split, [part])
  (written / _SKIPPED).write_text("".join(f"{n}\t{why}\n" for n, why in skipped), "utf-8",
                                  "replace")
  (written / _INDEX).write_text(json.dumps({"format": _FORMAT, "shards": states}))
  written.rename(folder)
  return skipped


def _state(path: Path) -> list[int]:
  """What tells that a shard has changed: its size, which is rounded in archives, and the second of
  its last change."""
  state = path.stat()
  return [state.st_size, int(state.st_mtime)]


def _part_name(path: Path, name: str) -> str:
  """A shard's part, which is another one when the shard, its size or its place has changed."""
  state = path.stat()
  digest = hashlib.sha256(f"{name} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()
  return f"{digest[:16]}.npz"


def _together(parts: list[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray] | None:
  parts = [part for part in parts if len(part["first"]) > 1]
  return table.concatenate(parts) if parts else None


def _split(columns: Mapping[str, np.ndarray], source: Path) -> dict[str, dict[str, Any]]:
  names = table.texts(columns, "names")
  test = held_out(names, _ONE_IN) or {min(names)}
  chosen = np.array([name in test for name in names])
  if chosen.all():
    raise UserError(f"{source} has one picture with a caption; one is held out, so there must be "
                    "more")
  return {"train": table.take(columns, np.flatnonzero(~chosen)),
          "test": table.take(columns, np.flatnonzero(chosen))}
