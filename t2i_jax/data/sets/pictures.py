"""Pictures with several captions each, as rows to train on: what all large sets share.

Everything that is drawn (which caption, which crop, mirrored or not) is a function of the row's
draw alone, and of different parts of it.
"""

import abc
from collections.abc import Iterator
from typing import Any

import numpy as np

from t2i_jax.data.base import FileSource, digest_of
from t2i_jax.data.buckets import Shape, assigned
from t2i_jax.data.images import CENTRE, WHOLE, BadImage, decode
from t2i_jax.data.mirror import may_be_mirrored
from t2i_jax.data.order import draws_at
from t2i_jax.data.sets.synthetic import Synthetic
from t2i_jax.data.sets.table import Table
from t2i_jax.errors import UserError, unknown

CAPTIONS = ("draw", "each", "joined", "class")
CROPS = ("centre", "random")
# Streams of a row's draw; which of several captions it is follows from the draw itself.
_DOWN, _ACROSS, _MIRROR, _SYNTHETIC, _WHICH = range(5)


def uniform(stream: int, draw: int) -> float:
  """A number in [0, 1) of a stream of a row's draw."""
  drawn = draws_at(stream, np.array([draw % 2**64], np.uint64))[0]
  return float(drawn >> np.uint64(11)) / 2**53


class Pictures(FileSource):
  """Rows over a table of pictures; a set says where the pictures' bytes are.

  Args:
    table: of the split.
    split: "train" is the one whose crops are drawn and which is mirrored.
    resolution: side of the squares that are cut out, R, where there are no buckets.
    captions: "draw", one of a picture's captions each time; "each", every caption is a row;
      "joined", all of a picture's in one text; "class", the class's number, for systems that
      read labels.
    crop: "centre", or "random": anywhere along the longer side, in training.
    flips: whether half of the training pictures are mirrored, where the caption allows it
      (`mirror.may_be_mirrored`).
    sizes: whether rows have `size` and `crop`, as Podell et al. 2023 (SDXL) condition on.
    labels: whether rows have a `label`, int32 [1].
    box_scale: side of the square that is looked at around the part of a picture that a caption is
      of, over that part's longer side; 0 looks at the whole picture.
    synthetic: a file of further captions, see `synthetic.Synthetic`.
    synthetic_share: how often one of them is taken, where a picture has some; 0.95 is what Betker
      et al. 2023 (DALL-E 3) found best.

  Raises:
    UserError: an unknown choice, labels of a set that has none.
  """

  quick = True
  has_buckets = True

  def __init__(self, table: Table, split: str, resolution: int, *, captions: str = "draw",
               crop: str = "centre", flips: bool = False, sizes: bool = False,
               labels: bool = False, box_scale: float = 0.0, synthetic: str = "",
               synthetic_share: float = 0.95):
    for what, value, choices in (("captions", captions, CAPTIONS), ("crop", crop, CROPS)):
      if value not in choices:
        raise unknown(f"value of option '{what}'", value, choices)
    if (labels or captions == "class") and "label" not in table:
      raise UserError("this data set has no classes; set data.options.labels=False and "
                      "data.options.captions=draw")
    if not 0 <= synthetic_share <= 1:
      raise UserError(f"option synthetic_share={synthetic_share} is no probability; use 0 to 1")
    if box_scale < 0:
      raise UserError(f"option box_scale={box_scale} is negative; use 0 for whole pictures")
    self.resolution, self.table = resolution, table
    training = split == "train"
    self._captions, self._labels, self._sizes = captions, labels, sizes
    self._random, self.mirrors = crop == "random" and training, flips and training
    self._box_scale = box_scale if "boxes" in table else 0.0
    self._synthetic = Synthetic(synthetic, table) if synthetic else None
    self._share = synthetic_share
    self._pairs = captions == "each"
    several = not self._pairs and bool(self._box_scale)
    self.varies = self._random or several and captions == "draw"

  def bucket(self, shapes: tuple[Shape, ...]) -> None:
    if self._box_scale:
      raise UserError("squares around boxes have no ratios of height to width to put into buckets; "
                      "set data.options.box_scale=0, or leave data.options.buckets out")
    heights, widths = self.table["size"].astype(np.float64).T
    if "seen" in self.table:
      top, left, bottom, right = self.table["seen"].T
      heights, widths = heights * (bottom - top), widths * (right - left)
    self.buckets = assigned(shapes, heights, widths)
    if self._pairs:
      self.buckets = self.buckets.taken(np.repeat(np.arange(len(self.table)),
                                                  np.diff(self.table["first"])))

  def shape_of(self, index: int) -> Shape:
    """Height and width of a row's picture as it is given."""
    if self.buckets is None:
      return self.resolution, self.resolution
    return self.buckets.shapes[self.buckets.of[index]]

  @abc.abstractmethod
  def content(self, picture: int) -> bytes:
    """The bytes of a picture's file; raises `BadImage`."""

  def __len__(self) -> int:
    return self.table.count if self._pairs else len(self.table)

  def picture_of(self, index: int) -> int:
    """The picture of a row."""
    if not self._pairs:
      return index
    return int(np.searchsorted(self.table["first"], index, side="right")) - 1

  def _number(self, index: int, draw: int) -> int:
    """Which of the table's captions a row has."""
    if self._pairs:
      return index
    first, last = self.table.captions_of(index)
    return first + draw % (last - first)

  def captions_of(self, index: int) -> tuple[str, ...]:
    """Row's captions, the synthetic ones last."""
    made = self._made(index)
    return made if made and self._share == 1 else self._original(index) + made

  def _original(self, index: int) -> tuple[str, ...]:
    if self._captions == "class":
      return (class_name(int(self.table["label"][self.picture_of(index), 0])),)
    if self._pairs:
      return (self.table.caption(index),)
    texts = [self.table.caption(number) for number in range(*self.table.captions_of(index))]
    return (joined(texts),) if self._captions == "joined" else tuple(texts)

  def _made(self, index: int) -> tuple[str, ...]:
    if not self._synthetic or self._captions == "class":
      return ()
    return self._synthetic.of(self.picture_of(index))

  def caption(self, index: int, draw: int) -> str:
    made = self._made(index)
    if made and uniform(_SYNTHETIC, draw) < self._share:
      return made[int(uniform(_WHICH, draw) * len(made))]
    if self._captions == "draw":
      return self.table.caption(self._number(index, draw))
    return self._original(index)[0]

  def captions(self) -> Iterator[str]:
    if self._captions in ("draw", "each"):
      yield from self.table.captions()
    else:
      for index in range(len(self)):
        yield from self._original(index)
    if self._synthetic:
      yield from self._synthetic.captions()

  def mirrored(self, index: int, draw: int) -> bool:
    return (self.mirrors and uniform(_MIRROR, draw) < 0.5
            and may_be_mirrored(self.caption(index, draw)))

  def image(self, index: int) -> np.ndarray:
    """Row's picture in the middle, uint8 [H, W, 3]; raises `BadImage`."""
    return self._decoded(index, self._part(index, 0), CENTRE)

  def drawn(self, index: int, draw: int) -> np.ndarray:
    part = self._part(index, draw)
    place = self._cut_off(index, draw, part)[0] if self._random else CENTRE
    return self._decoded(index, part, place)

  def _decoded(self, index: int, part: tuple[float, ...], place: tuple[float, float]) -> np.ndarray:
    picture = self.picture_of(index)
    try:
      return decode(self.content(picture), self.shape_of(index), part, place)
    except BadImage as error:
      raise BadImage(self.table.name(picture), error.reason) from error

  def _part(self, index: int, draw: int) -> tuple[float, ...]:
    """The part of a row's picture that is looked at, as fractions."""
    if not self._box_scale:
      if "seen" not in self.table:
        return WHOLE
      return tuple(self.table["seen"][self.picture_of(index)].tolist())
    box = self.table["boxes"][self._number(index, draw)]
    return around(box, self.table["size"][self.picture_of(index)], self._box_scale)

  def _cut_off(self, index: int, draw: int, part: tuple[float, ...]
               ) -> tuple[tuple[float, float], np.ndarray]:
    """Where in its part a row's box lies, down and across: 0 at the beginning, 1 at the end; and
    what is cut off before and behind it, in pixels of the resized part, int32 [2 (before, behind),
    2 (down, across)]."""
    sides, shape = self._size_of(index, part), self.shape_of(index)
    scale = max(wanted / side for wanted, side in zip(shape, sides, strict=True))
    free = [side * scale - wanted for wanted, side in zip(shape, sides, strict=True)]
    if self._random:
      free = [round(f) for f in free]
      before = [int(uniform(stream, draw) * (f + 1)) for stream, f in zip((_DOWN, _ACROSS), free,
                                                                        strict=True)]
      place = tuple(b / f if f else 0.5 for b, f in zip(before, free, strict=True))
    else:
      before, place = [round(f / 2) for f in free], CENTRE
    behind = [round(f) - b for b, f in zip(before, free, strict=True)]
    return place, np.array([before, behind], np.int32)

  def _size_of(self, index: int, part: tuple[float, ...]) -> tuple[float, float]:
    height, width = self.table["size"][self.picture_of(index)].tolist()
    return height * (part[2] - part[0]), width * (part[3] - part[1])

  def extra_of(self, index: int) -> dict[str, np.ndarray]:
    return self.extra(index, 0)

  def extra(self, index: int, draw: int) -> dict[str, np.ndarray]:
    extra = {}
    if self._labels:
      extra["label"] = self.table["label"][self.picture_of(index)]
    if self._sizes:
      part = self._part(index, draw)
      size = self._size_of(index, part)
      if "original" in self.table and not self._box_scale:
        size = self.table["original"][self.picture_of(index)]
      extra["size"] = np.rint(size).astype(np.int32)
      (down, across), (_, behind) = self._cut_off(index, draw, part)[1]
      # In a mirror, what lay behind comes first.
      across = behind if self.mirrored(index, draw) else across
      extra["crop"] = np.array([down, across], np.int32)
    return extra

  def digest(self) -> str:
    """Of the pictures' names and sizes, and of what a row shows of them."""
    return digest_of(self.table.digest_of_names(), self._pairs, self._box_scale,
                     *self._changes_of_pictures())

  def _changes_of_pictures(self) -> list[Any]:
    """What says how draws and buckets change the pictures; nothing where they do not."""
    said: list[Any] = ["random"] * self._random
    if self.mirrors:  # where the caption allows it
      said += ["mirrors", self._captions]
      if self._synthetic:
        said += ["synthetic", self._share, *self._synthetic.captions()]
    if self.buckets is not None:
      said += ["buckets", self.buckets.shapes, self.buckets.of.tobytes()]
    return said


def class_name(label: int) -> str:
  """A class as a caption, counted from 1 as the sets' own files do."""
  return f"class {label + 1}"


def joined(captions: list[str]) -> str:
  """Several captions as the sentences of one; those that say the same are said once."""
  said = dict.fromkeys(caption.strip().rstrip(".").strip() for caption in captions)
  return ". ".join(text for text in said if text) + "."


def around(box: np.ndarray, size: np.ndarray, times: float) -> tuple[float, ...]:
  """The square around a box whose side is `times` its longer one, cut off at the picture's edges.

  Args:
    box: top, left, bottom, right, as fractions.
    size: the picture's height and width.
    times: 1.5 is what StackGAN and its successors cut out of CUB's pictures.

  Returns:
    As `box`.
  """
  pixels = np.asarray(size, np.float64)
  first, last = np.asarray(box[:2], np.float64) * pixels, np.asarray(box[2:], np.float64) * pixels
  reach = times * float((last - first).max()) / 2
  middle = (first + last) / 2
  top, left = np.maximum(middle - reach, 0) / pixels
  bottom, right = np.minimum(middle + reach, pixels) / pixels
  return float(top), float(left), float(bottom), float(right)
