"""Oxford-102 Flowers with ten captions a picture, split by class.

    jpg/image_00001.jpg
    imagelabels.mat                                   `labels`, from 1, in the pictures' order
    text_c10/class_00001/image_06734.txt              (cvpr2016_flowers, Reed et al.)
    trainvalclasses.txt, testclasses.txt              (there too: 82 and 20 classes; or
                                                       trainclasses.txt and valclasses.txt)

`setid.mat` is another split, by picture, and has more for testing (6,149) than for training
(1,020); text-to-image work splits by class. Nilsback and Zisserman 2008; Reed, Akata, Lee and
Schiele 2016.
"""

from functools import partial
from pathlib import Path

import numpy as np

from t2i_jax.data.sets.classes import class_split, read_class_numbers, sort
from t2i_jax.data.sets.listing import Listing, Picture, find
from t2i_jax.data.sets.prepared import Prepared
from t2i_jax.errors import UserError

ABOUT = ("Flowers of 102 kinds with ten captions each.", "for research and education only")
CLASSES = {"class": 102}


class Flowers(Prepared):
  """Flowers; the kinds of "test" are not those of "train".

  Args:
    split, resolution, data_dir: as of `Prepared`.
    seed: not used.
    captions, crop, flips, sizes, labels, synthetic, synthetic_share: as of `Pictures`.
  """

  NAME = "flowers"

  def __init__(self, split: str = "train", resolution: int = 256, seed: int = 0,
               data_dir: str = "", captions: str = "draw", crop: str = "centre",
               flips: bool = False, sizes: bool = False, labels: bool = False,
               synthetic: str = "", synthetic_share: float = 0.95):
    del seed
    super().__init__(split, resolution, data_dir, captions=captions, crop=crop, flips=flips,
                     sizes=sizes, labels=labels, synthetic=synthetic,
                     synthetic_share=synthetic_share)


read_labels = partial(read_class_numbers, classes=CLASSES["class"])


def read(source: Path) -> Listing:
  """The listing of a folder with the flowers and their captions."""
  folder = find(source, "jpg", "102flowers/jpg", what="the pictures (102flowers.tgz, unpacked)")
  texts = find(source, "text_c10", "cvpr2016_flowers/text_c10", "text",
               what="the captions (cvpr2016_flowers.tar.gz, unpacked)")
  path = find(source, "imagelabels.mat", "102flowers/imagelabels.mat", what="the flowers' labels")
  labels = _labels(path)
  names = [f"class_{label:05d}/image_{n:05d}.jpg" for n, label in enumerate(labels, start=1)]
  test = class_split(source, texts, names)
  listing = Listing({"train": [], "test": []})
  files = [name.split("/")[1] for name in names]
  pictures = [
    (name, Picture(file, str(folder / file), (), int(label) - 1))
    for name, file, label in zip(names, files, labels, strict=True)
  ]
  sort(pictures, texts, test, listing, "flower", path.name)
  listed = set(files)
  listing.skipped += [(path.name, "imagelabels.mat has no label for it")
                      for path in sorted(folder.glob("*.jpg")) if path.name not in listed]
  return listing


def _labels(path: Path) -> np.ndarray:
  """int [pictures], from 1."""
  from scipy.io import loadmat

  try:
    labels = np.ravel(loadmat(path)["labels"]).astype(np.int64)
  except KeyError:
    raise UserError(f"{path} has no 'labels'; it is another file, such as setid.mat") from None
  except Exception as error:  # scipy's own kinds, for a file that is cut off or no .mat
    raise UserError(f"{path} is no whole .mat file ({error}); download it again") from None
  if not len(labels) or labels.min() < 1 or labels.max() > CLASSES["class"]:
    raise UserError(f"{path} has labels that are not 1 to {CLASSES['class']}; it is of another set")
  return labels
