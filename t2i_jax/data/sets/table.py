"""The texts and numbers of a prepared split, beside its pictures, mapped from disk.

Captions are asked for far more often than pictures are (a tokenizer reads all of them), and
twelve million Python strings fit no memory. So they lie in one array of bytes, with where each
begins in another; nothing is read before it is asked for.

A table of n pictures with m captions has `captions` and `names` (texts), and the columns

  first   int64 [n + 1]     the captions of picture i are first[i]:first[i + 1]
  size    int32 [n, 2]      height and width
  label   int32 [n, 1]      if the set has classes
  boxes   float32 [m, 4]    if captions are of parts: top, left, bottom, right, as fractions

  seen    float32 [n, 4]    if pictures were padded: what is no padding, as of boxes
  original int32 [n, 2]     if pictures were resized: height and width before

and whichever others its owner gives it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from t2i_jax.errors import UserError

_TEXTS = ("captions", "names")
# How columns of parts come together: their first axis counts captions or pictures, and `first`
# and the beginnings of texts go on from where the part before ends.
_STARTS = ("first", *(f"{name}_at" for name in _TEXTS))


def pack(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
  """Texts as UTF-8 in one array, uint8 [bytes], and where each begins, int64 [n + 1]."""
  encoded = [text.encode(errors="replace") for text in texts]
  at = np.zeros(len(encoded) + 1, np.int64)
  np.cumsum([len(text) for text in encoded], out=at[1:])
  return np.frombuffer(b"".join(encoded), np.uint8), at


def columns(
  names: Sequence[str], captions: Sequence[Sequence[str]], **others: np.ndarray
) -> dict[str, np.ndarray]:
  """The columns of pictures that have these names and captions; `others` are taken as they are."""
  first = np.zeros(len(names) + 1, np.int64)
  np.cumsum([len(texts) for texts in captions], out=first[1:])
  found = {"first": first, **others}
  for name, texts in zip(_TEXTS, ([t for c in captions for t in c], names), strict=True):
    found[name], found[f"{name}_at"] = pack(texts)
  return found


def concatenate(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Tables, one behind the other."""
  return {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}


def _joined(name: str, arrays: list[np.ndarray]) -> np.ndarray:
  if name in _STARTS:
    ends = np.cumsum([0, *(array[-1] for array in arrays[:-1])])
    arrays = [array + end for array, end in zip(arrays, ends, strict=True)]
    arrays = [arrays[0], *(array[1:] for array in arrays[1:])]
  return np.concatenate(arrays)


def texts(columns: Mapping[str, np.ndarray], kind: str) -> list[str]:
  """All `captions` or `names`."""
  content, at = columns[kind].tobytes(), columns[f"{kind}_at"].tolist()
  return [content[a:b].decode() for a, b in zip(at[:-1], at[1:], strict=True)]


def take(table: Mapping[str, np.ndarray], pictures: np.ndarray) -> dict[str, np.ndarray]:
  """The table of some pictures; columns that count captions are of one caption a picture."""
  names, captions, first = texts(table, "names"), texts(table, "captions"), table["first"]
  others = {name: column[pictures] for name, column in table.items()
            if name not in (*_TEXTS, *_STARTS)}
  return columns([names[n] for n in pictures],
                 [captions[first[n] : first[n + 1]] for n in pictures], **others)


def write(prefix: Path, parts: Sequence[Mapping[str, np.ndarray]]) -> None:
  """Writes tables, one behind the other, as the files `PREFIX.COLUMN.npy`."""
  for name in parts[0]:
    np.save(_file(prefix, name), _joined(name, [part[name] for part in parts]))


def _file(prefix: Path, column: str) -> Path:
  return prefix.parent / f"{prefix.name}.{column}.npy"


class Table:
  """A table that `write` wrote, or (`Table.of`) one in memory; see the module for its columns.

  Args:
    prefix: as given to `write`.

  Raises:
    UserError: a column is missing or damaged.
  """

  @classmethod
  def of(cls, columns: Mapping[str, np.ndarray]) -> "Table":
    """The table of such columns as the function `columns` gives."""
    table = cls.__new__(cls)
    table.__setstate__(dict(columns))
    return table

  def __init__(self, prefix: Path):
    self._prefix = prefix
    self._open()
    for name in ("first", *_TEXTS, *(f"{name}_at" for name in _TEXTS)):
      if name not in self._columns:
        raise UserError(f"{_file(prefix, name)} is missing; delete {prefix.parent} and prepare it "
                        "again")
    n, m = len(self), self.count
    lengths = {"first": n + 1, "names_at": n + 1, "captions_at": m + 1, "boxes": m, "size": n}
    for name, column in self._columns.items():
      if len(column) != lengths.get(name, len(column)):
        raise UserError(f"{_file(prefix, name)} has {len(column)} rows, not {lengths[name]}; "
                        f"delete {prefix.parent} and prepare it again")

  def _open(self) -> None:
    self._columns = {}
    for path in sorted(self._prefix.parent.glob(f"{self._prefix.name}.*.npy")):
      try:
        column = np.load(path, mmap_mode="r").view(np.ndarray)
      except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete {path.parent} and prepare it "
                        "again") from None
      self._columns[path.name.split(".")[-2]] = column

  def __getstate__(self) -> Path | dict[str, np.ndarray]:
    return self._prefix or self._columns  # a mapped array would be copied

  def __setstate__(self, state: Path | dict[str, np.ndarray]) -> None:
    self._prefix = None if isinstance(state, dict) else state
    if self._prefix is None:
      self._columns = state
    else:
      self._open()

  def taken(self, pictures: np.ndarray, **more: np.ndarray) -> "Table":
    """The table of some of the pictures, in memory; `more` are further columns of theirs."""
    return Table.of({**take(self._columns, pictures), **more})

  def __len__(self) -> int:
    return len(self._columns["first"]) - 1

  @property
  def count(self) -> int:
    """How many captions there are."""
    return int(self._columns["first"][-1])

  def __contains__(self, column: str) -> bool:
    return column in self._columns

  def __getitem__(self, column: str) -> np.ndarray:
    return self._columns[column]

  def _text(self, kind: str, index: int) -> str:
    start, end = self._columns[f"{kind}_at"][index : index + 2]
    return self._columns[kind][start:end].tobytes().decode()

  def name(self, picture: int) -> str:
    """A picture's name."""
    return self._text("names", picture)

  def caption(self, number: int) -> str:
    """A caption, by its number among all of them."""
    return self._text("captions", number)

  def captions_of(self, picture: int) -> tuple[int, int]:
    """The numbers of a picture's captions, from the first to before the second."""
    first, last = self._columns["first"][picture : picture + 2]
    return int(first), int(last)

  def captions(self) -> Iterator[str]:
    """All captions, in order."""
    return (self.caption(number) for number in range(self.count))

  def digest_of_names(self) -> str:
    """Of the pictures' names and sizes."""
    digest = hashlib.sha256(np.ascontiguousarray(self._columns["names"]))
    for name in ("names_at", "size"):
      if name in self:
        digest.update(np.ascontiguousarray(self._columns[name]))
    return digest.hexdigest()
