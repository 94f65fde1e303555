"""Sets split by class, whose captions are Reed et al.'s."""

import dataclasses
import pickle
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2i_jax.data.sets.listing import Listing, Picture, check_some_exist, clean, read_lines
from t2i_jax.errors import UserError


def read_class_numbers(captions: Sequence[str], classes: int) -> np.ndarray:
  """int32 [n, 1], from 0, of texts such as "class 17", "017.Cardinal" or "17", from 1.

  Raises:
    UserError: a text names no class.
  """
  labels = []
  for caption in captions:
    found = re.fullmatch(r"(?:class[ _])?0*(\d+)(?:\..*)?", caption.strip())
    if not found or not 1 <= int(found[1]) <= classes:
      raise UserError(f"a label cannot be read: the prompt '{caption}' names no class; write "
                      f"'class 1' to 'class {classes}'")
    labels.append(int(found[1]) - 1)
  return np.array(labels, np.int32).reshape(-1, 1)


def sort(
  pictures: Iterable[tuple[str, Picture]], texts: Path, test: Callable[[str], bool],
  listing: Listing, what: str, index: str,
) -> None:
  """Puts pictures that have captions into the listing's "train" and "test".

  Args:
    pictures: each with its name "CLASS/FILE", by which its captions' file is found; its captions,
      and its one box for each of them, are set here.
    texts: folder of the captions.
    test: of `class_split`.
    listing: to be filled; what has no captions is noted as skipped.
    what: one of the pictures, for errors.
    index: the file that lists them, for errors.

  Raises:
    UserError: a split has no picture, or no picture's file is there.
  """
  for name, picture in pictures:
    captions = captions_in(texts / f"{name[:-4]}.txt", picture.name, listing)
    if captions:
      boxes = picture.boxes and picture.boxes * len(captions)
      listing.splits["test" if test(name) else "train"].append(
        dataclasses.replace(picture, captions=captions, boxes=boxes)
      )
  for split, found in listing.splits.items():
    if not found:
      raise UserError(f"no {what} of split '{split}' has captions in {texts}; they are of another "
                      f"set, or {index} is")
    check_some_exist(found, index)


def captions_in(text: Path, name: str, listing: Listing) -> tuple[str, ...]:
  """The captions of a picture's file, one a line; none, and noted as skipped, where it has none."""
  if not text.is_file():
    listing.skipped.append((name, f"has no file in {text.parent.parent.name}"))
    return ()
  # The published files have replacement characters where a character was lost.
  captions = (clean(line.replace("\ufffd", " ")) for _, line in read_lines(text, "replace"))
  captions = tuple(filter(None, captions))
  if not captions:
    listing.skipped.append((name, f"its file in {text.parent.parent.name} is empty"))
  return captions


def class_split(source: Path, texts: Path, names: Sequence[str]) -> Callable[[str], bool]:
  """Whether a picture "CLASS/FILE" is for testing, by the split's files.

  Raises:
    UserError: there are none, or they are of other classes.
  """
  for folder in dict.fromkeys((source, texts.parent)):
    for parts in (("trainvalclasses.txt",), ("trainclasses.txt", "valclasses.txt")):
      files = [folder / part for part in (*parts, "testclasses.txt")]
      if all(map(Path.is_file, files)):
        *train, test = (_classes(file) for file in files)
        return _checked(set().union(*train), test, names, files)
    files = [folder / split / "filenames.pickle" for split in ("train", "test")]
    if all(map(Path.is_file, files)):
      train, test = ({name.split("/")[0] for name in _names(file)} for file in files)
      return _checked(train, test, names, files)
  raise UserError(f"--source={source} has no trainvalclasses.txt and testclasses.txt (of the "
                  "captions' archive), which say what is for testing; put them beside the captions")


def _classes(file: Path) -> set[str]:
  return {line.strip() for _, line in read_lines(file)}


def _checked(train: set[str], test: set[str], names: Sequence[str],
             files: Sequence[Path]) -> Callable[[str], bool]:
  both = train & test
  if both:
    raise UserError(f"{files[-1]}: class '{min(both)}' is for training too, in {files[0].name}")
  for name in names:
    if name.split("/")[0] not in train | test:
      raise UserError(f"{files[0]} and {files[-1].name} are of another set: neither has the class "
                      f"of '{name}'")
  return lambda name: name.split("/")[0] in test


class _Plain(pickle.Unpickler):
  """Reads lists of texts, and runs nothing that a file may name."""

  def find_class(self, module: str, name: str) -> Any:
    raise pickle.UnpicklingError(f"it names {module}.{name}")


def _names(file: Path) -> list[str]:
  try:
    with open(file, "rb") as content:
      names = _Plain(content, encoding="latin-1").load()
  except Exception as error:  # what a damaged pickle raises is not bounded
    raise UserError(f"{file} is no list of names ({str(error) or type(error).__name__}); download "
                    "it again") from None
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    raise UserError(f"{file} is no list of names; download it again")
  return names
