"""Reading `captions.jsonl` and `captions.csv`, with errors that name the line."""

import csv
import json
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from t2i_jax.errors import UserError, nearest, unknown

SPLITS = ("train", "test")
_COLUMNS = ("file", "caption", "captions", "split")


def _check_columns(columns: list[str], where: str) -> None:
  """Raises for a misspelt column; other further columns are the user's own affair."""
  for column in columns:
    if column not in _COLUMNS and not column.startswith("caption"):
      if get_close_matches(column.lower(), _COLUMNS, n=1, cutoff=0.8):
        raise UserError(f"{where}: unknown column '{column}'{nearest(column.lower(), _COLUMNS)}")


def json_rows(
  path: str, lines: Iterable[str], example: str
) -> Iterator[tuple[int, dict[str, Any]]]:
  """The objects of a .jsonl file with the numbers of their lines; empty lines are skipped.

  Args:
    path: of the file, as messages shall name it.
    lines: of the file.
    example: of an object.

  Raises:
    UserError: a line is no JSON object.
  """
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:
      # JSON's own text counts lines within this one.
      at = f"{error.msg}, column {error.colno}" if hasattr(error, "colno") else error
      raise UserError(f"{path}, line {number}: not JSON ({at})") from None
    if not isinstance(row, dict):
      raise UserError(f"{path}, line {number}: not an object {example}")
    yield number, row


def _read_jsonl(path: str, lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
  return json_rows(path, lines, '{"file": ..., "caption": ...}')


def _read_csv(path: str, lines: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
  reader = csv.DictReader(lines, strict=True)
  first = 1  # line of the row that is being read; a quoted caption may go over several
  try:
    columns = reader.fieldnames or []
    if "file" not in columns:
      raise UserError(f"{path}: the first line names no column 'file', only {columns}")
    first = reader.line_num + 1
    for row in reader:
      if None in row or None in row.values():
        raise UserError(
          f"{path}, line {first}: not {len(columns)} fields as in the first line "
          "(a caption with a comma needs quotes)"
        )
      yield first, row
      first = reader.line_num + 1
  except csv.Error as error:
    raise UserError(f"{path}, line {first}: {error}") from None


def is_text(value: Any) -> bool:
  """Whether a value of a JSON file is a text, and one that can be written."""
  # JSON can spell half of a surrogate pair, which no file or tokenizer takes.
  return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def captions_in(row: dict[str, Any], where: str) -> list[str]:
  """The captions of a row, in all columns whose names begin so; UserError where there are none."""
  captions = []
  for key, value in row.items():
    if key.startswith("caption"):
      captions.extend(value if isinstance(value, list) else [value])
  if not all(map(is_text, captions)):
    raise UserError(f"{where}: a caption is not text")
  captions = [" ".join(caption.split()) for caption in captions if caption.strip()]
  if not captions:
    raise UserError(f"{where}: no caption; write it as 'caption' or 'captions'")
  return captions


def read_captions(path: str) -> dict[str, tuple[list[str], str | None]]:
  """A captions file as {picture: (captions, split or None)}, in the file's order.

  Raises:
    UserError: a line or a column is wrong; the message names it.
  """
  rows: dict[str, tuple[list[str], str | None]] = {}
  columns: set[str] = set()
  read = _read_csv if path.endswith(".csv") else _read_jsonl
  try:
    with open(path, encoding="utf-8-sig", newline="") as lines:
      for number, row in read(path, lines):
        where = f"{path}, line {number}"
        if not columns.issuperset(row):
          _check_columns(sorted(set(row) - columns), where)
          columns.update(row)
        file, split = row.get("file"), row.get("split") or None
        if not file or not is_text(file):
          raise UserError(f"{where}: no 'file'")
        if split is not None and split not in SPLITS:
          raise unknown(f"split in {where}:", str(split), SPLITS)
        known = rows.setdefault(file, ([], split))
        if known[1] != split:
          raise UserError(f"{where}: '{file}' is in two splits, '{known[1]}' and '{split}'")
        known[0].extend(captions_in(row, where))
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror}") from None
  if not rows:
    raise UserError(f"{path} has no lines")
  without = [file for file, (_, split) in rows.items() if split is None]
  if 0 < len(without) < len(rows):
    raise UserError(f"{path}: '{without[0]}' has no split, but other pictures have one; give "
                    "every line a split, or none")
  return rows
