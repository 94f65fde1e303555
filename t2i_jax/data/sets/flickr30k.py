"""Flickr30k: pictures with five captions each, from any of the three forms they come in.

    flickr30k-images/1000092795.jpg
    dataset_flickr30k.json       Karpathy's splits (29,000 / 1,014 / 1,000), taken if it is there
    results_20130124.token       1000092795.jpg#0<TAB>Two young guys with shaggy hair look at ...
    results.csv                  1000092795.jpg| 0| Two young guys with shaggy hair look at ...

The table with bars has a row without its second bar ("2199200615.jpg| 4   A dog runs ..."), whose
caption pandas reads as nothing. Without Karpathy's file about one picture in 31, chosen by a hash
of its name, is in each of "val" and "test". Young, Lai, Hodosh and Hockenmaier 2014.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from t2i_jax.data.held_out import held_out
from t2i_jax.data.sets.coco import read_splits
from t2i_jax.data.sets.listing import (
  Listing,
  Picture,
  check_some_exist,
  clean,
  find,
  read_lines,
)
from t2i_jax.data.sets.prepared import Prepared
from t2i_jax.errors import UserError

ABOUT = ("Flickr pictures of people and animals with five captions each.",
         "captions CC BY-SA 3.0; pictures under the terms of Flickr's users")
_FOLDERS = ("flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "images")
_ONE_IN = 31  # as many as Karpathy's


class Flickr30k(Prepared):
  """Flickr30k.

  Args:
    split, resolution, data_dir: as of `Prepared`.
    seed: not used.
    captions, crop, flips, sizes, synthetic, synthetic_share: as of `Pictures`.
  """

  NAME = "flickr30k"
  SPLITS = ("train", "val", "test")

  def __init__(self, split: str = "train", resolution: int = 256, seed: int = 0,
               data_dir: str = "", captions: str = "draw", crop: str = "centre",
               flips: bool = False, sizes: bool = False, synthetic: str = "",
               synthetic_share: float = 0.95):
    del seed
    super().__init__(split, resolution, data_dir, captions=captions, crop=crop, flips=flips,
                     sizes=sizes, synthetic=synthetic, synthetic_share=synthetic_share)


def read(source: Path) -> Listing:
  """The listing of a folder with Flickr30k."""
  folder = _pictures_folder(source)
  if (source / "dataset_flickr30k.json").is_file():
    listing = read_splits(source / "dataset_flickr30k.json", "flickr30k",
                          lambda image: image["filename"], folder)
    listing.notes.append("splits: Karpathy's, of dataset_flickr30k.json")
    return listing
  path = find(source, "dataset_flickr30k.json", "results_20130124.token", "results.csv",
              "flickr30k_images/results.csv", "flickr30k/results_20130124.token",
              what="the captions of Flickr30k")
  listing, captions = Listing({"train": [], "val": [], "test": []}), {}
  for name, caption in (_token if path.suffix == ".token" else _bars)(path, listing):
    captions.setdefault(name, []).append(caption)
  # Two parts, each as many as Karpathy's, which share no picture.
  test = held_out(captions, _ONE_IN)
  val = held_out({f"val {name}" for name in captions if name not in test}, _ONE_IN - 1)
  for name, texts in captions.items():
    split = "test" if name in test else "val" if f"val {name}" in val else "train"
    listing.splits[split].append(Picture(name, str(folder / name), tuple(texts)))
  listing.notes.append(f"splits: by a hash of the names; {path.name} has none, and there is no "
                       "dataset_flickr30k.json")
  for split, pictures in listing.splits.items():
    if not pictures:
      raise UserError(f"{path} names too few pictures, none is left for split '{split}'")
    check_some_exist(pictures, path.name)
  return listing


def _pictures_folder(source: Path) -> Path:
  """The first of the usual folders that has pictures: one archive has itself within itself."""
  for name in _FOLDERS:
    if any((source / name).glob("*.jpg")):
      return source / name
  raise UserError(f"--source={source} has no pictures in {' or '.join(_FOLDERS)}")


def _token(path: Path, listing: Listing) -> Iterator[tuple[str, str]]:
  for number, line in read_lines(path):
    found = re.fullmatch(r"(\S+\.jpg)#\d+\t(.*)", line)
    if not found:
      raise UserError(f"{path}, line {number}: not 'NAME.jpg#NUMBER<TAB>CAPTION'; it is of another "
                      "set, or damaged")
    if caption := clean(found[2]):
      yield found[1], caption
    else:
      listing.skipped.append((f"{found[1]}, line {number}", "empty caption"))


def _bars(path: Path, listing: Listing) -> Iterator[tuple[str, str]]:
  for number, line in read_lines(path):
    fields = [field.strip() for field in line.split("|", 2)]
    if number == 1:
      if fields[0] != "image_name":
        raise UserError(f"{path}: the first line is no 'image_name| comment_number| comment'; it "
                        "is of another set")
      continue
    if len(fields) == 2 and (found := re.fullmatch(r"(\d)\s+(.+)", fields[1])):
      listing.notes.append(f"{path.name}, line {number}: mended, its second bar is missing")
      fields[1:] = found.groups()
    if len(fields) != 3 or not fields[0].endswith(".jpg"):
      raise UserError(f"{path}, line {number}: not 'NAME.jpg| NUMBER| CAPTION'")
    if caption := clean(fields[2]):
      yield fields[0], caption
    else:
      listing.skipped.append((f"{fields[0]}, line {number}", "empty caption"))
