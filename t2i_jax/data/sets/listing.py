"""What a data set's reader finds in the folders that a user's download left.

A reader (`coco.py`, `cub.py`...) takes the folder and returns a `Listing`: which pictures
there are in each split, with what captions, and what it left out and why. Nothing is decoded.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from t2i_jax.errors import UserError

# Pictures that are looked for before a long run begins, to find a wrong folder at once.
_LOOKED_FOR = 200


@dataclasses.dataclass(slots=True)
class Picture:
  """A picture with its captions.

  Attributes:
    name: its own name in the set, which no other picture of it has.
    file: where it lies.
    captions: at least one.
    label: its class, from 0, or None.
    boxes: the part of the picture that each caption is of, as (left, top, width, height) in
      pixels; or None.
  """

  name: str
  file: str
  captions: tuple[str, ...]
  label: int | None = None
  boxes: tuple[tuple[float, float, float, float], ...] | None = None


@dataclasses.dataclass
class Listing:
  """Pictures by split.

  Attributes:
    splits: pictures by the split's name.
    skipped: (name, reason) of what was left out.
    notes: what a user should know of how the folder was read.
  """

  splits: dict[str, Sequence[Picture]]
  skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
  notes: list[str] = dataclasses.field(default_factory=list)


Reader = Callable[[Path], Listing]


def clean(caption: str) -> str:
  """A caption with white space made single spaces, and none around it.

  Halves of surrogate pairs, which JSON can spell and no file or tokenizer takes, are left out.
  """
  return " ".join(caption.encode(errors="ignore").decode().split())


def find(source: Path, *choices: str, what: str) -> Path:
  """The first of several paths below the source that is there.

  Raises:
    UserError: none is.
  """
  for choice in choices:
    if (source / choice).exists():
      return source / choice
  others = f" (or {', '.join(choices[1:])})" if choices[1:] else ""
  raise UserError(f"--source={source} has no {choices[0]}{others}, {what}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
  try:
    yield
  except UnicodeDecodeError as error:
    raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); download it "
                    "again") from None
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def read_json(path: Path) -> Any:
  """A JSON file's content.

  Raises:
    UserError: it cannot be read, or is cut off.
  """
  with _reading(path), open(path, encoding="utf-8-sig") as file:
    try:
      return json.load(file)
    except UnicodeDecodeError:
      raise
    except (ValueError, RecursionError) as error:
      raise UserError(f"{path} is no whole JSON file ({error}); download it again") from None


def read_lines(path: Path, errors: str = "strict") -> Iterator[tuple[int, str]]:
  """(number from 1, line without its end) of a text file's lines that are not blank.

  `errors` is what is done with bytes that are no UTF-8, as of `open`.

  Raises:
    UserError: it cannot be read, or is no text.
  """
  with _reading(path), open(path, encoding="utf-8-sig", errors=errors, newline="\n") as file:
    for number, line in enumerate(file, start=1):
      line = line.rstrip("\r\n")
      if line.strip():
        yield number, line


@contextlib.contextmanager
def fields_of(path: Path, what: str) -> Iterator[None]:
  """Makes a missing key or a wrong type while a file's content is taken apart a UserError."""
  try:
    yield
  except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
    kind = "key " if isinstance(error, KeyError) else ""
    raise UserError(f"{path} is not {what} ({kind}{error}); name another folder, or download it "
                    "again") from None


def check_some_exist(pictures: Sequence[Picture], where: str) -> None:
  """Raises UserError where none of some pictures, spread over all of them, is there."""
  step = max(len(pictures) // _LOOKED_FOR, 1)
  looked = pictures[::step]
  if looked and not any(os.path.isfile(picture.file) for picture in looked):
    raise UserError(f"none of {len(looked)} pictures that {where} names is there, such as "
                    f"{looked[0].file}; unpack the pictures there")
