"""Reading what `python -m t2i_jax.data.prepare` wrote."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i_jax.data.images import BadImage
from t2i_jax.data.sets.pictures import Pictures
from t2i_jax.data.sets.table import Table
from t2i_jax.errors import UserError, unknown

VERSION = "1.0.0"
SETTINGS = "prepared.json"  # how it was prepared


def default_root() -> Path:
  """Where sets are prepared unless the user says otherwise: in $T2I_CACHE, else in the user's
  cache directory."""
  home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  return Path(os.environ.get("T2I_CACHE") or os.path.join(home, "t2i_jax")) / "data"


def folder_of(name: str, root: str | os.PathLike = "") -> Path:
  """Where a set lies prepared, as TFDS places it, below the folder of all prepared sets."""
  return (Path(root).expanduser() if root else default_root()) / name / VERSION


def size_in(folder: Path) -> int | None:
  """The `--size` that a set was prepared with, 0 for files as they were; None where it is not
  known."""
  try:
    return json.loads((folder / SETTINGS).read_text())["size"]
  except (OSError, ValueError, KeyError, TypeError):
    return None


class Prepared(Pictures):
  """A split of a set that was prepared; a set's class says its name and splits.

  Args:
    split: one of `SPLITS`.
    resolution: side of the pictures.
    data_dir: `--output` of `t2i_jax.data.prepare`; empty is its default.
    **options: as of `Pictures`.

  Raises:
    UserError: it is not prepared, or damaged; what `Pictures` raises.
  """

  NAME = ""
  SPLITS = ("train", "test")

  def __init__(self, split: str, resolution: int, data_dir: str, **options: Any):
    if split not in self.SPLITS:
      raise unknown(f"split of data set '{self.NAME}'", split, self.SPLITS)
    self._folder, self._split = folder_of(self.NAME, data_dir), split
    self._records = None
    if not (self._folder / "dataset_info.json").is_file():
      raise UserError(
        f"data set '{self.NAME}' is not prepared in '{self._folder.parent.parent}': run python -m "
        f"t2i_jax.data.prepare {self.NAME} --source=DOWNLOAD, or set data.options.data_dir "
        "(of evaluate: --data-option=data_dir=...)"
      )
    super().__init__(Table(self._folder / split), split, resolution, **options)
    self._check_whole()
    if len(self._opened()) != len(self.table):
      raise UserError(f"{self._folder}: split '{split}' has {len(self._opened())} pictures and "
                      f"texts of {len(self.table)}; delete the folder and prepare it again")

  def _check_whole(self) -> None:
    """Raises UserError where a shard is missing or cut: its rows would be replaced by others."""
    with self._reading():
      import tensorflow_datasets as tfds

      info = tfds.builder_from_directory(self._folder).info.splits[self._split]
      found = sum(os.path.getsize(path) for path in info.filepaths)
      if found != info.num_bytes:
        raise ValueError(f"the shards of split '{self._split}' have {found:,} bytes, and had "
                         f"{info.num_bytes:,} when they were written")

  @contextlib.contextmanager
  def _reading(self) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # the formats' own, such as RuntimeError for a short file
      reason = str(error).split("\n")[0]
      raise UserError(f"cannot read {self._folder}: {reason}; delete it and prepare it "
                      "again") from error

  def _opened(self) -> Any:
    """TFDS's data source, opened in each process by itself."""
    if self._records is None:
      with self._reading():
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(self._folder)
        skip = {"image": tfds.decode.SkipDecoding()}
        self._records = builder.as_data_source(split=self._split, decoders=skip)
        len(self._records)
    return self._records

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {"_records": None}

  def content(self, picture: int) -> bytes:
    records = self._opened()
    try:
      return records[picture]["image"]
    except Exception as error:  # a damaged record
      raise BadImage(self.table.name(picture), str(error).split("\n")[0]) from error
