"""Caltech-UCSD Birds 200-2011 with ten captions a picture, split by class.

    CUB_200_2011/{images/001.Black_footed_Albatross/....jpg, images.txt, image_class_labels.txt,
                  classes.txt, bounding_boxes.txt}
    text_c10/001.Black_footed_Albatross/....txt      (cvpr2016_cub, Reed et al.)
    trainvalclasses.txt, testclasses.txt             (there too; or train/filenames.pickle and
                                                      test/filenames.pickle of StackGAN's package)

The folder of pictures has files that `images.txt` does not name; they are left out, as in all
published results. Wah et al. 2011; Reed, Akata, Lee and Schiele 2016 (captions, 150/50 classes).
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from t2i_jax.data.sets.classes import class_split, read_class_numbers, sort
from t2i_jax.data.sets.listing import Listing, Picture, find, read_lines
from t2i_jax.data.sets.prepared import Prepared
from t2i_jax.errors import UserError

ABOUT = ("Birds of 200 species with ten captions each.", "for research and education only")
CLASSES = {"class": 200}


class Cub(Prepared):
  """Birds; the 50 species of "test" are not those of "train".

  Args:
    split, resolution, data_dir: as of `Prepared`.
    seed: not used.
    captions, crop, flips, sizes, labels, synthetic, synthetic_share: as of `Pictures`.
    box_scale: side of the square that is cut out around the bird, over its box's longer side; 1.5
      is what StackGAN, AttnGAN and DF-GAN train on; 0 takes whole pictures.
  """

  NAME = "cub"

  def __init__(self, split: str = "train", resolution: int = 256, seed: int = 0,
               data_dir: str = "", captions: str = "draw", crop: str = "centre",
               flips: bool = False, sizes: bool = False, labels: bool = False,
               box_scale: float = 1.5, synthetic: str = "", synthetic_share: float = 0.95):
    del seed
    super().__init__(split, resolution, data_dir, captions=captions, crop=crop, flips=flips,
                     sizes=sizes, labels=labels, box_scale=box_scale, synthetic=synthetic,
                     synthetic_share=synthetic_share)
    self.varies = self._random  # a picture's captions are all of the same box


read_labels = partial(read_class_numbers, classes=CLASSES["class"])


def read(source: Path) -> Listing:
  """The listing of a folder with the birds and their captions."""
  birds = source if (source / "images.txt").is_file() else find(
    source, "CUB_200_2011", what="the birds (CUB_200_2011.tgz, unpacked)"
  )
  texts = find(source, "text_c10", "text", "cvpr2016_cub/text_c10", "birds/text",
               what="the captions (cvpr2016_cub.tar.gz, unpacked)")
  names, labels, boxes = (
    _numbered(find(birds, f"{file}.txt", what="a part of CUB_200_2011"), fields, kind)
    for file, fields, kind in (("images", 1, str), ("image_class_labels", 1, int),
                               ("bounding_boxes", 4, _finite))
  )
  test = class_split(source, texts, [name for (name,) in names.values()])
  listing, pictures = Listing({"train": [], "test": []}), []
  for number, (name,) in names.items():
    if number not in labels or number not in boxes:
      raise UserError(f"{birds} is not whole: picture {number} of images.txt has no label or box")
    box, (label,) = boxes[number], labels[number]
    if not 1 <= label <= CLASSES["class"]:
      raise UserError(f"{birds / 'image_class_labels.txt'}: picture {number} is of class {label}, "
                      f"and there are 1 to {CLASSES['class']}; it is of another set")
    pictures.append((name, Picture(name, str(birds / "images" / name), (), label - 1, (box,))))
  sort(pictures, texts, test, listing, "bird", "images.txt")
  _note_unlisted(birds / "images", {name for (name,) in names.values()}, listing)
  return listing


def _numbered(path: Path, fields: int, kind: Callable[[str], Any]) -> dict[str, tuple]:
  """Lines "number field field..." by their number; `kind` reads a field, or raises ValueError."""
  rows = {}
  for line, text in read_lines(path):
    number, *row = text.split()
    try:
      if len(row) != fields or not number.isdigit():
        raise ValueError
      rows[number] = tuple(map(kind, row))
    except ValueError:
      of = "" if kind is str else " that are numbers"
      raise UserError(f"{path}, line {line}: '{text[:60]}' is not a number and {fields} fields"
                      f"{of}") from None
  return rows


def _finite(text: str) -> float:
  number = float(text)
  if not math.isfinite(number):
    raise ValueError
  return number


def _note_unlisted(folder: Path, listed: set[str], listing: Listing) -> None:
  for path in sorted(folder.glob("*/*.jpg")):
    name = f"{path.parent.name}/{path.name}"
    if name not in listed:
      listing.skipped.append((name, "images.txt does not name it"))
