"""Captions that a model wrote, beside those that come with a set."""

import os
from collections.abc import Iterator
from typing import Any

from t2i_jax.data.caption_files import captions_in, is_text, json_rows
from t2i_jax.data.sets.table import Table
from t2i_jax.errors import UserError

_EXAMPLE = '{"file": ..., "caption": ...}'


class Synthetic:
  """Further captions of some of a split's pictures.

      {"file": "000000000139.jpg", "caption": "A living room with a fireplace ..."}

  A line for each picture, or several; `captions` may be a list. `file` is the picture's name in
  the set, with all of its folders, the last of them, or none, or with further ones before them.
  Lines of other pictures, such as another split's, are passed over.

  Args:
    path: the file, one JSON object a line.
    table: of the split.

  Raises:
    UserError: a line is wrong, or may be of several pictures, or not one is of a picture of the
      split.
  """

  def __init__(self, path: str, table: Table):
    self._of: dict[int, list[str]] = {}
    named: dict[str, list[int]] = {}
    for number in range(len(table)):
      named.setdefault(os.path.basename(table.name(number)), []).append(number)
    first = None
    try:
      with open(os.path.expanduser(path), encoding="utf-8-sig") as lines:
        for n, row in json_rows(path, lines, _EXAMPLE):
          where = f"{path}, line {n}"
          file, captions = _read(row, where)
          first = first or file
          number = _meant(file, named.get(os.path.basename(file), ()), table, where)
          if number is not None:
            self._of.setdefault(number, []).extend(captions)
    except UnicodeDecodeError as error:
      raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
      raise UserError(f"cannot read {path}: {error.strerror} (option 'synthetic')") from None
    if not self._of:
      raise UserError(f"{path} has captions of another set: not one of its pictures, such as "
                      f"'{first}', is in this split, which has '{table.name(0)}'")

  def of(self, picture: int) -> tuple[str, ...]:
    """A picture's synthetic captions; there may be none."""
    return tuple(self._of.get(picture, ()))

  def captions(self) -> Iterator[str]:
    """All of them."""
    for captions in self._of.values():
      yield from captions


def _meant(file: str, numbers: tuple[int, ...] | list[int], table: Table, where: str) -> int | None:
  """Which of the pictures of the same last name a file is, if any: folders that both say agree."""
  found = [n for n in numbers
           if f"/{file}".endswith(f"/{table.name(n)}") or f"/{table.name(n)}".endswith(f"/{file}")]
  same = [n for n in found if table.name(n) == file] or found
  if len(same) > 1:
    raise UserError(f"{where}: '{file}' may be {table.name(same[0])} or {table.name(same[1])}; "
                    "write it with its folders")
  return same[0] if same else None


def _read(row: dict[str, Any], where: str) -> tuple[str, list[str]]:
  file = row.get("file")
  if not file or not is_text(file):
    raise UserError(f"{where}: not {_EXAMPLE} (no 'file')")
  return file, captions_in({k: row[k] for k in ("caption", "captions") if k in row}, where)
