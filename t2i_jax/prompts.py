"""Prompts from files: one a line, or rows with a column of prompts and others about them."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_jax.data.caption_files import is_text, json_rows
from t2i_jax.errors import UserError

COLUMNS = ("prompt", "caption", "text")  # one of these holds the prompt, in any case


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt of a file.

  Attributes:
    text: what is drawn.
    about: the row's other columns, such as PartiPrompts' `Category` and `Challenge`; all of the
      row, the prompt included, of a .jsonl file, such as GenEval's `tag` and `include`.
  """

  text: str
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_prompts(path: str | os.PathLike) -> list[Prompt]:
  """Reads `.tsv` (a header, no quoting, as PartiPrompts'), `.jsonl` (as GenEval's), else lines.

  Lines that are empty are skipped.

  Raises:
    UserError: for a file that cannot be read, holds no prompt, or a line that is no row.
  """
  try:
    content = Path(path).expanduser().read_text(encoding="utf-8-sig")
  except OSError as error:
    raise UserError(f"--prompts={path} cannot be read: {error.strerror}; give a text file with a "
                    "prompt on each line, or a .tsv or .jsonl file") from error
  except UnicodeDecodeError as error:
    raise UserError(f"--prompts={path} is not UTF-8 text ({error.reason} at byte {error.start}); "
                    "save it as UTF-8") from error
  # Not `splitlines`, which also cuts at characters that a prompt may have.
  lines = [line.strip("\r") for line in content.split("\n")]
  readers = {".tsv": _read_tsv, ".jsonl": _read_jsonl}
  prompts = readers.get(Path(path).suffix.lower(), _read_lines)(path, lines)
  if not prompts:
    raise UserError(f"--prompts={path} holds no prompts")
  return prompts


def _read_lines(path, lines: list[str]) -> list[Prompt]:
  return [Prompt(line.strip()) for line in lines if line.strip()]


def _read_tsv(path, lines: list[str]) -> list[Prompt]:
  # Without quoting a row is its cells, between tabs.
  rows = (line.split("\t") for line in lines)
  header = next(rows, [])
  column = _column(path, 1, header)
  if len(set(header)) < len(header):
    raise UserError(f"--prompts={path}, line 1: two columns have one name; rename one of "
                    f"{', '.join(header)}")
  prompts = []
  for number, row in enumerate(rows, start=2):
    if not any(cell.strip() for cell in row):
      continue
    if len(row) != len(header) or not row[header.index(column)].strip():
      raise UserError(f"--prompts={path}, line {number}: {len(row)} cells for the {len(header)} "
                      f"columns {', '.join(header)}, or no {column}; put tabs between the cells")
    about = dict(zip(header, row, strict=True))
    prompts.append(Prompt(about.pop(column).strip(), about))
  return prompts


def _read_jsonl(path, lines: list[str]) -> list[Prompt]:
  prompts = []
  for number, row in json_rows(f"--prompts={path}", lines, '{"prompt": "a photo of a bench"}'):
    text = row[_column(path, number, row)]
    if not is_text(text) or not text.strip():
      raise UserError(f"--prompts={path}, line {number}: its prompt is no text")
    prompts.append(Prompt(text.strip(), row))
  return prompts


def _column(path, number: int, names) -> str:
  """The one of a row's names that is in `COLUMNS`."""
  for wanted in COLUMNS:
    for name in names:
      if name.strip().lower() == wanted:
        return name
  raise UserError(f"--prompts={path}, line {number}: no column {', '.join(COLUMNS[:-1])} or "
                  f"{COLUMNS[-1]}; it has {', '.join(map(str, names)) or 'none'}")
