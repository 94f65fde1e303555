"""Conceptual Captions, 3 and 12 million addresses with captions, and the user's download of them.

    Train_GCC-training.tsv                      caption<TAB>address, no header
    Validation_GCC-1.1.0-Validation.tsv
    cc12m.tsv                                   address<TAB>caption: the other way round
    training/0_1900681516, validation/...       igorbrigadir's downloader: ROW_CRC32, or CRC32 alone
    00000/000000000.jpg, .txt, .json            img2dataset with --output_format=files

Which column is which is seen from the file. Pictures are found by their address: by its CRC-32, or
by what img2dataset wrote beside them; a row's number is not relied on, since readers of the table
count its quotation marks differently. Tar shards of img2dataset are the data set `webdataset`.

Sharma, Ding, Goodman and Soricut 2018; Changpinyo, Sharma, Ding and Soricut 2021. For CC12M about
one picture in 100, chosen by a hash of its address, is for testing.
"""

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

from t2i_jax.data.held_out import held_out
from t2i_jax.data.sets.listing import Listing, Picture, clean, find, read_lines
from t2i_jax.data.sets.prepared import Prepared
from t2i_jax.errors import UserError

ABOUT = ("Pictures of the web with a caption each.",
         "the list is free for any use; pictures under their owners' terms")
_ONE_IN = 100
_LOOKED_AT = 100  # lines that tell which column is which
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", "")


class ConceptualCaptions(Prepared):
  """CC3M.

  Args:
    split, resolution, data_dir: as of `Prepared`.
    seed: not used.
    crop, flips, sizes, synthetic, synthetic_share: as of `Pictures`.
  """

  NAME = "cc3m"
  SPLITS = ("train", "val")

  def __init__(self, split: str = "train", resolution: int = 256, seed: int = 0,
               data_dir: str = "", crop: str = "centre", flips: bool = False, sizes: bool = False,
               synthetic: str = "", synthetic_share: float = 0.95):
    del seed
    super().__init__(split, resolution, data_dir, crop=crop, flips=flips, sizes=sizes,
                     synthetic=synthetic, synthetic_share=synthetic_share)


class Conceptual12M(ConceptualCaptions):
  """CC12M, as `ConceptualCaptions`."""

  NAME = "cc12m"
  SPLITS = ("train", "test")


def read_3m(source: Path) -> Listing:
  """The listing of a folder with CC3M and its download."""
  listing = Listing({})
  for split, names, folders in (
    ("train", ("Train_GCC-training.tsv", "Train-GCC-training.tsv", "cc3m.tsv"),
     ("training", "train", "cc3m")),
    ("val", ("Validation_GCC-1.1.0-Validation.tsv", "Validation-GCC-1.1.0-Validation.tsv"),
     ("validation", "val")),
  ):  # fmt: skip
    path = find(source, *names, what="captions and addresses of CC3M")
    folder = find(source, *folders, what="the download of its pictures")
    listing.splits[split] = _matched(path, folder, listing)
  return listing


def read_12m(source: Path) -> Listing:
  """The listing of a folder with CC12M and its download."""
  path = find(source, "cc12m.tsv", what="addresses and captions of CC12M")
  folder = find(source, "training", "train", "cc12m", "images",
                what="the download of its pictures")
  listing = Listing({"train": [], "test": []})
  pictures = _matched(path, folder, listing)
  test = held_out([picture.name for picture in pictures], _ONE_IN)
  if not test:
    raise UserError(f"only {len(pictures)} pictures of {path} are in {folder}; {_ONE_IN} are "
                    "needed to hold one out")
  for picture in pictures:
    listing.splits["test" if picture.name in test else "train"].append(picture)
  return listing


def _matched(path: Path, folder: Path, listing: Listing) -> list[Picture]:
  """The rows of a table whose pictures are in a folder."""
  there = _Downloads(folder)
  shared = _shared_names(path, listing) if there.by_crc else set()
  pictures, absent = {}, 0
  for number, caption, address in _rows(path, listing):
    crc = zlib.crc32(address.encode())
    file = there.by_address.get(address) or there.by_crc.get(crc)
    if file is None:
      absent += 1
    elif crc in shared and address not in there.by_address:
      listing.skipped.append((f"{path.name}, line {number}", "another address has its CRC-32, so "
                              "the picture may be of either"))
    elif file in pictures:
      listing.skipped.append((f"{path.name}, line {number}", "names a picture for the second time"))
    else:
      name = os.path.relpath(file, folder.parent)
      pictures[file] = Picture(name, file, (caption,))
  if not pictures:
    raise UserError(f"none of the pictures in {folder} is of an address in {path}; they are named "
                    "by their addresses' CRC-32, or have a .json of img2dataset beside them")
  listing.notes.append(f"{path.name}: {len(pictures)} pictures in {folder}, {absent} were not "
                       "downloaded")
  return list(pictures.values())


def _rows(path: Path, listing: Listing | None) -> Iterator[tuple[int, str, str]]:
  """(line, caption, address) of a table's rows."""
  column = _address_column(path)
  for number, line in read_lines(path):
    fields = line.split("\t")
    if len(fields) != 2 or not _is_address(fields[column]):
      if listing and not (number == 1 and "url" in line.lower().split("\t")):
        listing.skipped.append((f"{path.name}, line {number}", "not a caption and an address"))
    elif caption := clean(fields[1 - column]):
      yield number, caption, fields[column].strip()
    elif listing:
      listing.skipped.append((f"{path.name}, line {number}", "empty caption"))


def _is_address(text: str) -> bool:
  return text.strip().startswith(("http://", "https://"))


def _address_column(path: Path) -> int:
  """Which of a table's two columns has the addresses."""
  found = [0, 0]
  for _, (number, line) in zip(range(_LOOKED_AT), read_lines(path), strict=False):
    fields = line.split("\t")
    if len(fields) != 2 and number > 1:
      continue
    for column, field in enumerate(fields[:2]):
      found[column] += _is_address(field)
  if not any(found):
    raise UserError(f"{path}: no line has an address beside a caption, with a tab between; it is "
                    "of another set")
  return int(found[1] > found[0])


def _shared_names(path: Path, listing: Listing) -> set[int]:
  """The CRC-32 values that two different addresses of a table have."""
  seen, shared = {}, set()
  for _, _, address in _rows(path, None):
    crc = zlib.crc32(address.encode())
    whole = hash(address)
    if seen.setdefault(crc, whole) != whole:
      shared.add(crc)
  return shared


class _Downloads:
  """What lies in a folder of downloaded pictures.

  Attributes:
    by_crc: files by the CRC-32 in their names.
    by_address: files by the address in their `.json`.
  """

  def __init__(self, folder: Path):
    self.by_crc: dict[int, str] = {}
    self.by_address: dict[str, str] = {}
    for root, _, names in os.walk(folder):
      stems = {}
      for name in names:
        stem, ending = os.path.splitext(name)
        stems.setdefault(stem, {})[ending.lower()] = os.path.join(root, name)
      for stem, files in stems.items():
        file = next((files[ending] for ending in _ENDINGS if ending in files), None)
        if file is None:
          continue
        if ".json" in files:
          self._add_described(files[".json"], file)
        elif (crc := stem.rpartition("_")[2]).isdigit():
          self.by_crc[int(crc)] = file

  def _add_described(self, description: str, file: str) -> None:
    try:
      with open(description, encoding="utf-8") as content:
        self.by_address[json.load(content)["url"]] = file
    except (ValueError, KeyError, TypeError):
      pass  # a download that was stopped while it wrote; its picture has no address then
