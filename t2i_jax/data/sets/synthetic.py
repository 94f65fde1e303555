"""Captions that a model wrote, beside those that come with a set."""

import json
import os
from collections.abc import Iterator

from t2i_jax.data.sets.table import Table
from t2i_jax.errors import UserError


class Synthetic:
  """Further captions of some of a split's pictures.

      {"file": "000000000139.jpg", "caption": "A living room with a fireplace ..."}

  A line for each picture, or several; `captions` may be a list. `file` is the picture's name in
  the set, with its folders or without. Lines of other pictures, such as another split's, are
  passed over.

  Args:
    path: the file, one JSON object a line.
    table: of the split.

  Raises:
    UserError: a line is wrong, or not one is of a picture of the split.
  """

  def __init__(self, path: str, table: Table):
    self._of: dict[int, list[str]] = {}
    numbers = {}
    for number in range(len(table)):
      numbers[table.name(number)] = number
      numbers.setdefault(os.path.basename(table.name(number)), number)
    first = None
    try:
      with open(os.path.expanduser(path), encoding="utf-8") as lines:
        for n, line in enumerate(lines, start=1):
          if not line.strip():
            continue
          file, captions = _read(line, f"{path}, line {n}")
          first = first or file
          number = numbers.get(file, numbers.get(os.path.basename(file)))
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


def _read(line: str, where: str) -> tuple[str, list[str]]:
  try:
    row = json.loads(line)
    captions = [*row.get("captions", ()), *([row["caption"]] if "caption" in row else ())]
    captions = [" ".join(caption.split()) for caption in captions if caption.strip()]
    file = row["file"]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f'{where}: not {{"file": ..., "caption": ...}} ({error})') from None
  if not captions or not isinstance(file, str):
    raise UserError(f"{where}: no caption, or no file")
  return file, captions
