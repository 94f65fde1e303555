"""Visual Genome: about 50 phrases a picture, each of a region of it.

    VG_100K/2.jpg   VG_100K_2/1.jpg
    region_descriptions.json   [{"id": 1, "regions": [{"region_id": 1382, "image_id": 1,
                                "phrase": "the clock is green", "x": 421, "y": 57,
                                "width": 82, "height": 139}, ...]}, ...]

There are no captions of whole pictures. About one picture in 20, chosen by a hash of its number,
is for testing. Krishna et al. 2017.
"""

import os
from pathlib import Path

from t2i_jax.data.held_out import held_out
from t2i_jax.data.sets.listing import Listing, Picture, clean, fields_of, find, read_json
from t2i_jax.data.sets.prepared import Prepared
from t2i_jax.errors import UserError

ABOUT = ("Pictures with phrases of their regions.", "CC BY 4.0")
_FOLDERS = ("VG_100K", "VG_100K_2", "images/VG_100K", "images/VG_100K_2", "images", "images2")
_ONE_IN = 20
_SIDES = ("x", "y", "width", "height")


class VisualGenome(Prepared):
  """Regions with their phrases, or pictures with all of them.

  Args:
    split, resolution, data_dir: as of `Prepared`.
    seed: not used.
    captions: "each", every region is a row; "draw", a region of each picture is drawn; "joined",
      whole pictures, whose phrases are one long caption, those of the largest regions first.
    crop, flips, sizes, synthetic, synthetic_share: as of `Pictures`.
    box_scale: side of the square that is cut out around a region, over the region's longer side.
  """

  NAME = "visual_genome"

  def __init__(self, split: str = "train", resolution: int = 256, seed: int = 0,
               data_dir: str = "", captions: str = "each", crop: str = "centre",
               flips: bool = False, sizes: bool = False, box_scale: float = 1.0,
               synthetic: str = "", synthetic_share: float = 0.95):
    del seed
    super().__init__(split, resolution, data_dir, captions=captions, crop=crop, flips=flips,
                     sizes=sizes, box_scale=0.0 if captions == "joined" else box_scale,
                     synthetic=synthetic, synthetic_share=synthetic_share)


def read(source: Path) -> Listing:
  """The listing of a folder with Visual Genome."""
  path = find(source, "region_descriptions.json", what="the regions' phrases (version 1.2 or 1.4)")
  there = _files(source)
  content, listing = read_json(path), Listing({"train": [], "test": []})
  with fields_of(path, "a file of region descriptions"):
    numbers = [int(entry.get("id", entry.get("image_id"))) for entry in content]
    test = held_out({str(number) for number in numbers}, _ONE_IN)
    for number, entry in zip(numbers, content, strict=True):
      regions = [region for region in entry["regions"] if clean(region["phrase"])]
      regions.sort(key=lambda region: -region["width"] * region["height"])
      if number not in there:
        listing.skipped.append((f"{number}.jpg", "is in none of the folders of pictures"))
      elif not regions:
        listing.skipped.append((f"{number}.jpg", "has no phrases"))
      else:
        listing.splits["test" if str(number) in test else "train"].append(Picture(
          name=os.path.relpath(there[number], source), file=there[number],
          captions=tuple(clean(region["phrase"]) for region in regions),
          boxes=tuple(tuple(r[side] + 0 for side in _SIDES) for r in regions),
        ))
  for split, pictures in listing.splits.items():
    if not pictures:
      raise UserError(f"none of the {len(numbers)} pictures of {path} in split '{split}' is in "
                      f"{' or '.join(_FOLDERS[:2])} of --source={source}; unpack both archives "
                      "there")
  return listing


def _files(source: Path) -> dict[int, str]:
  """The pictures' files by number."""
  found = {}
  for folder in _FOLDERS:
    if (source / folder).is_dir():
      for name in os.listdir(source / folder):
        stem, ending = os.path.splitext(name)
        if ending == ".jpg" and stem.isdigit():
          found.setdefault(int(stem), os.path.join(source, folder, name))
  if not found:
    raise UserError(f"--source={source} has no pictures in {' or '.join(_FOLDERS[:2])}; unpack "
                    "both archives there")
  return found
