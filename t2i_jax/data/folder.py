"""A user's own pictures: a directory with `captions.jsonl` or `captions.csv`.

    photos/captions.jsonl   {"file": "cats/1.jpg", "caption": "a cat on a mat"}
                            {"file": "2.png", "captions": ["a dog", "a dog runs"], "split": "test"}
    photos/captions.csv     file,caption,split
                            cats/1.jpg,a cat on a mat,train

Several captions of a picture are a list, several columns whose names begin with
`caption`, or several lines; which of them is taken is the option `captions`. `split` is
`train` or `test`, on all lines or on none; without it about 5 % of the pictures,
chosen by a hash of their names, are the test split. Other columns are ignored.
"""

import itertools
import logging
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from t2i_jax.data.base import digest_of
from t2i_jax.data.buckets import Shape
from t2i_jax.data.caption_files import SPLITS, read_captions
from t2i_jax.data.held_out import held_out
from t2i_jax.data.images import BadImage, reason_of
from t2i_jax.data.measured import THREADS, measure
from t2i_jax.data.sets.pictures import Pictures
from t2i_jax.data.sets.table import Table, columns
from t2i_jax.errors import UserError, unknown

_NAMES = ("captions.jsonl", "captions.csv")
# One picture in 20 is for testing where the user does not say which.
TEST_SHARE = 20
# Broken pictures named one by one on the console; the log file names all.
_NAMED = 10


def _captions_file(path: str, captions: str) -> str:
  """The captions file of directory `path`: `captions`, or the one that is there."""
  if not path:
    raise UserError(
      "data set 'folder' needs --config.data.options.path (of evaluate: --data-option=path=...), a "
      "directory with captions.jsonl or captions.csv"
    )
  try:
    names = os.listdir(path)
  except OSError as error:
    raise UserError(
      f"no directory '{path}': {error.strerror} (--config.data.options.path)"
    ) from None
  if not names:
    raise UserError(f"'{path}' is empty: put pictures and captions.jsonl or captions.csv there")
  if captions:
    file = os.path.join(path, captions)
    if not os.path.isfile(file):
      raise UserError(f"no captions file '{file}' (option 'captions_file')")
    if not file.endswith((".jsonl", ".csv")):
      raise UserError(f"'{file}' is neither .jsonl nor .csv")
    return file
  found = [name for name in _NAMES if os.path.isfile(os.path.join(path, name))]
  if len(found) != 1:
    raise UserError(
      f"'{path}' has both captions.jsonl and captions.csv: choose with option "
      "'captions_file'"
      if found
      else f"'{path}' has no captions.jsonl or captions.csv; write one line for each picture, "
      'such as {"file": "a.jpg", "caption": "..."}'
    )
  return os.path.join(path, found[0])


def _some(names: Collection[str]) -> str:
  return ", ".join(itertools.islice(names, 3)) + (", ..." if len(names) > 3 else "")


class Folder(Pictures):
  """Pictures and captions of one directory; see the module for its layout.

  Missing and broken pictures are skipped, counted and named.

  Args:
    split: "train" or "test".
    resolution: side of the pictures, in pixels.
    seed: not used; the split follows from the file names.
    path: the directory.
    captions_file: the file of captions, from `path`; empty finds it.
    captions, crop, flips, sizes, synthetic, synthetic_share: as of `Pictures`.
    log_dir: where `skipped_<split>.txt` names the pictures that are skipped; the
      user's directory is never written to.

  Raises:
    UserError: an unknown split, a missing or empty directory, a wrong line, a
      misspelt column, no picture left; what `Pictures` raises.
  """

  SPLITS = SPLITS

  def __init__(
    self,
    split: str = "train",
    resolution: int = 64,
    seed: int = 0,
    path: str = "",
    captions_file: str = "",
    captions: str = "draw",
    crop: str = "centre",
    flips: bool = False,
    sizes: bool = False,
    synthetic: str = "",
    synthetic_share: float = 0.95,
    log_dir: str | None = None,
  ):
    del seed
    if split not in SPLITS:
      raise unknown("split of data set 'folder'", split, SPLITS)
    self._path, self._split = path, split
    self._options = {"captions": captions, "crop": crop, "flips": flips, "sizes": sizes,
                     "synthetic": synthetic, "synthetic_share": synthetic_share}
    source = _captions_file(path, captions_file)
    self._log = os.path.join(log_dir, f"skipped_{split}.txt") if log_dir else None
    if self._log and os.path.exists(self._log):
      os.remove(self._log)  # an earlier run's
    self._skipped: set[str] = set()
    files, texts = self._listed(source)
    self._show(Table.of(columns(files, texts)), resolution)
    if sizes or self._random:
      self._measure()

  def _show(self, table: Table, resolution: int) -> None:
    """Makes the table's pictures the rows."""
    super().__init__(table, self._split, resolution, **self._options)

  def _listed(self, source: str) -> tuple[list[str], list[list[str]]]:
    """The files of the split that are there, and their captions."""
    rows = read_captions(source)
    test = {file for file, (_, marked) in rows.items() if marked == "test"}
    if all(marked is None for _, marked in rows.values()):
      test = held_out(rows, TEST_SHARE)
    with ThreadPoolExecutor(THREADS) as pool:
      there = dict(zip(rows, pool.map(os.path.isfile, map(self._full, rows)), strict=True))
    missing = [file for file, found in there.items() if not found]
    if len(missing) == len(rows):
      raise UserError(f"none of the {len(rows)} pictures in {source} exists: {_some(missing)}")
    if missing:
      logging.warning(
        "%d of %d pictures in %s are missing and are skipped: %s",
        len(missing),
        len(rows),
        source,
        _some(missing),
      )
    here = [file for file in rows if (file in test) == (self._split == "test")]
    self._skip({file: "no such file" for file in here if not there[file]})
    files = [file for file in here if there[file]]
    if not files:
      why = f"all {len(here)} are missing" if here else "give lines a 'split', or add pictures"
      raise UserError(f"no pictures in split '{self._split}' of {source}: {why}")
    return files, [rows[file][0] for file in files]

  def _full(self, file: str) -> str:
    return os.path.join(self._path, file)

  def _skip(self, reasons: Mapping[str, str]) -> None:
    """Names skipped pictures in the log file, each once in this process."""
    new = {file: reason for file, reason in reasons.items() if file not in self._skipped}
    self._skipped.update(new)
    if self._log and new:
      os.makedirs(os.path.dirname(self._log), exist_ok=True)
      with open(self._log, "a", encoding="utf-8") as log:
        log.write("".join(f"{file}\t{reason}\n" for file, reason in new.items()))

  def checked(self) -> "Folder":
    """This folder without the files that are no pictures, found by their headers.

    Raises:
      UserError: no picture is left.
    """
    self._measure()
    return self

  def bucket(self, shapes: tuple[Shape, ...]) -> None:
    self._measure()
    super().bucket(shapes)

  def _measure(self) -> None:
    """Finds out the pictures' sizes, and leaves out those that have none."""
    if "size" in self.table:
      return
    files = [self.table.name(n) for n in range(len(self.table))]
    sizes, bad = measure(self._path, files)
    self._skip(bad)
    if len(bad) == len(files):
      raise UserError(f"none of {len(bad)} pictures in '{self._path}' can be read: {_some(bad)}")
    if bad:
      logging.warning(
        "%d of %d pictures in %s cannot be read and are skipped: %s",
        len(bad), len(files), self._path, _some(bad),
      )  # fmt: skip
    kept = np.array([n for n, file in enumerate(files) if file not in bad])
    self._show(self.table.taken(kept, size=sizes[kept]), self.resolution)

  def content(self, picture: int) -> bytes:
    """The bytes of a picture's file; raises `BadImage`."""
    path = self._full(self.table.name(picture))
    try:
      with open(path, "rb") as file:
        return file.read()
    except OSError as error:
      raise BadImage(path, reason_of(error)) from error

  def _decoded(self, index: int, part: tuple[float, ...], place: tuple[float, float]) -> np.ndarray:
    try:
      return super()._decoded(index, part, place)
    except BadImage as error:
      if error.path not in self._skipped and len(self._skipped) < _NAMED:
        logging.warning("skipped %s", error)
      self._skip({error.path: error.reason})
      raise

  def digest(self) -> str:
    """Of the files' names and sizes, and of what a row shows of them."""
    files = [self.table.name(n) for n in range(len(self.table))]

    def size(file: str) -> int:
      try:
        return os.path.getsize(self._full(file))
      except OSError:
        return -1

    with ThreadPoolExecutor(THREADS) as pool:
      return digest_of(*files, *pool.map(size, files), *["each"] * self._pairs,
                       *self._changes_of_pictures())
