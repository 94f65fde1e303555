"""Heights and widths of picture files, read once and remembered.

A file's header says them. To open all files of a large folder takes long, so what was found is kept
beside the prepared data sets, and asked for again only of files that have changed since.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import numpy as np

from t2i_jax.data.images import BadImage, size_of
from t2i_jax.data.sets.prepared import default_root

# File systems over a network answer slowly, but many questions at once.
THREADS = 16
# (bytes, time of the last change in nanoseconds, height, width) of a file.
Entry = tuple[int, int, int, int]


def measure(
  folder: str, files: Sequence[str], progress: Callable[[int, int], None] = lambda done, of: None
) -> tuple[np.ndarray, dict[str, str]]:
  """Sizes of pictures as they are looked at, int32 [n, 2]; and why, of those that have none.

  Args:
    folder: of the files.
    files: their paths below it.
    progress: called with (files done, files).
  """
  index = _index_of(folder)
  known = _read(index)

  def look(file: str) -> Entry | str:
    path = os.path.join(folder, file)
    try:
      about = os.stat(path)
    except OSError as error:
      return (error.strerror or str(error)).lower()
    entry = known.get(file)
    if entry and entry[:2] == (about.st_size, about.st_mtime_ns):
      return entry
    try:
      return about.st_size, about.st_mtime_ns, *size_of(path)
    except BadImage as error:
      return error.reason

  found: dict[str, Entry] = {}
  reasons: dict[str, str] = {}
  with ThreadPoolExecutor(THREADS) as pool:
    for done, (file, entry) in enumerate(zip(files, pool.map(look, files), strict=True), start=1):
      if isinstance(entry, str):
        reasons[file] = entry
      else:
        found[file] = entry
      progress(done, len(files))
  if any(known.get(file) != entry for file, entry in found.items()):
    _write(index, known | found)
  sizes = [found[file][2:] if file in found else (0, 0) for file in files]
  return np.array(sizes, np.int32).reshape(-1, 2), reasons


def _index_of(folder: str) -> Path:
  whole = os.path.abspath(os.path.expanduser(folder))
  digest = hashlib.sha256(whole.encode(errors="surrogatepass")).hexdigest()
  return default_root() / "folder" / f"{os.path.basename(whole)}-{digest[:12]}.json"


def _read(index: Path) -> dict[str, Entry]:
  """What is remembered, but for entries that are damaged; nothing where the file is."""
  try:
    entries = json.loads(index.read_text()).items()
  except (OSError, ValueError, AttributeError):
    return {}
  return {file: tuple(entry) for file, entry in entries if _fits(entry)}


def _fits(entry: Any) -> bool:
  return (isinstance(entry, list) and len(entry) == len(get_args(Entry))
          and all(type(number) is int for number in entry) and min(entry[2:]) > 0)


def _write(index: Path, entries: dict[str, Entry]) -> None:
  """Remembers; where that cannot be written, all is read again the next time."""
  try:
    index.parent.mkdir(parents=True, exist_ok=True)
    # A folder of its own: containers that share this one may have the same process ids, and a file
    # in it gets the usual permissions, which a temporary file does not.
    with tempfile.TemporaryDirectory(prefix=f".{index.name}.", dir=index.parent) as workplace:
      beside = Path(workplace) / index.name
      beside.write_text(json.dumps(entries))
      beside.replace(index)
  except OSError as error:
    logging.info("sizes of pictures are not remembered: %s", error)
