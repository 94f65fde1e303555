"""MS COCO captions: the releases of 2014 and 2017, and Karpathy's splits.

    train2014/COCO_train2014_000000000009.jpg   val2014/COCO_val2014_000000000042.jpg
    train2017/000000000009.jpg                  val2017/000000000139.jpg
    annotations/captions_train2014.json ...     dataset_coco.json (Karpathy)

Lin et al. 2014; Chen et al. 2015 (the captions); Karpathy and Fei-Fei 2015, whose "restval", the
rest of val2014, is trained on.
"""

import collections
from pathlib import Path
from typing import Any

from t2i_jax.data.sets.listing import (
  Listing,
  Picture,
  check_some_exist,
  clean,
  fields_of,
  find,
  read_json,
)
from t2i_jax.data.sets.prepared import Prepared
from t2i_jax.errors import UserError

ABOUT = ("MS COCO pictures with five captions each.",
         "captions CC BY 4.0; pictures under the terms of Flickr's users")


class Coco(Prepared):
  """MS COCO 2014; "val" is val2014, of which 30,000 captions are drawn for the usual FID.

  Args:
    split, resolution, data_dir: as of `Prepared`.
    seed: not used.
    captions, crop, flips, sizes, synthetic, synthetic_share: as of `Pictures`.
  """

  NAME = "coco"
  SPLITS = ("train", "val")

  def __init__(self, split: str = "train", resolution: int = 256, seed: int = 0,
               data_dir: str = "", captions: str = "draw", crop: str = "centre",
               flips: bool = False, sizes: bool = False, synthetic: str = "",
               synthetic_share: float = 0.95):
    del seed
    super().__init__(split, resolution, data_dir, captions=captions, crop=crop, flips=flips,
                     sizes=sizes, synthetic=synthetic, synthetic_share=synthetic_share)


class Coco2017(Coco):
  """MS COCO 2017, as `Coco`."""

  NAME = "coco_2017"


class CocoKarpathy(Coco):
  """MS COCO in Karpathy's splits: 113,287 for training, 5,000 each for the others."""

  NAME = "coco_karpathy"
  SPLITS = ("train", "val", "test")


def read_2014(source: Path) -> Listing:
  """The listing of a folder with MS COCO 2014."""
  return _release(source, "2014", "COCO_{}_{:012d}.jpg")


def read_2017(source: Path) -> Listing:
  """The listing of a folder with MS COCO 2017."""
  return _release(source, "2017", "{1:012d}.jpg")


def _release(source: Path, year: str, pattern: str) -> Listing:
  listing = Listing({})
  for split in ("train", "val"):
    part = f"{split}{year}"
    path = find(source, f"annotations/captions_{part}.json", f"captions_{part}.json",
                what="the captions of MS COCO (annotations_trainval, unpacked)")
    folder = find(source, part, f"images/{part}", what="its pictures")
    pictures = _captioned(read_json(path), path, part, pattern, folder, listing)
    check_some_exist(pictures, path.name)
    listing.splits[split] = pictures
  return listing


def _captioned(content: Any, path: Path, part: str, pattern: str, folder: Path,
               listing: Listing) -> list[Picture]:
  captions, files = collections.defaultdict(list), {}
  with fields_of(path, "a captions file of MS COCO"):
    for image in content["images"]:
      files[image["id"]] = image["file_name"]
    for annotation in content["annotations"]:
      if "caption" not in annotation:
        raise UserError(f"{path} has no captions, but {', '.join(sorted(annotation)[:4])}...; name "
                        "the folder with captions_*.json, not instances_*.json")
      if annotation["image_id"] not in files:
        listing.skipped.append((str(annotation["image_id"]), f"has a caption in {path.name}, but "
                                "is not among its pictures"))
      elif text := clean(annotation["caption"]):
        captions[annotation["image_id"]].append(text)
  pictures = []
  for number, file in files.items():
    with fields_of(path, "a captions file of MS COCO"):
      wanted = pattern.format(part, number)
    # The captions of another year or split look alike; the names of their pictures do not.
    if file != wanted:
      raise UserError(f"{path} is of another set: its picture {number} is '{file}', in {part} it "
                      f"is '{wanted}'")
    if captions[number]:
      name = f"{part}/{file}"
      pictures.append(Picture(name, str(folder / file), tuple(captions[number])))
    else:
      listing.skipped.append((file, f"has no caption in {path.name}"))
  return pictures


_KARPATHY = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def read_karpathy(source: Path) -> Listing:
  """The listing of a folder with MS COCO 2014 and Karpathy's `dataset_coco.json`."""
  path = find(source, "dataset_coco.json", "annotations/dataset_coco.json",
              what="Karpathy's splits (caption_datasets.zip, unpacked)")
  return read_splits(path, "coco", lambda image: f"{image['filepath']}/{image['filename']}", source)


def read_splits(path: Path, dataset: str, name_of, source: Path) -> Listing:
  """The listing of a file of Karpathy's.

  Args:
    path: of the file.
    dataset: that it must be of, as it says itself.
    name_of: a picture's entry to its path below the source.
    source: the folder.
  """
  content, listing = read_json(path), Listing({"train": [], "val": [], "test": []})
  with fields_of(path, "a file of Karpathy's splits"):
    if content.get("dataset", dataset) != dataset:
      raise UserError(f"{path} has the captions of another set, '{content['dataset']}'; name the "
                      f"folder with dataset_{dataset}.json")
    for image in content["images"]:
      captions = tuple(filter(None, (clean(s["raw"]) for s in image["sentences"])))
      name = name_of(image)
      if captions:
        picture = Picture(name, str(source / name), captions)
        listing.splits[_KARPATHY[image["split"]]].append(picture)
      else:
        listing.skipped.append((name, "has no caption"))
  for split, pictures in listing.splits.items():
    if not pictures:
      raise UserError(f"{path} names no pictures of split '{split}'; download it again")
    check_some_exist(pictures, path.name)
  return listing
