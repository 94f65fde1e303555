"""Aspect-ratio buckets: pictures of several shapes, of which each batch has one.

Podell et al. 2023 (SDXL), section 2.3 and appendix I; NovelAI 2022 (the same of Stable Diffusion
1). A picture belongs to the bucket whose ratio of height to width is nearest to its own; it is
resized until it just covers the bucket's size, and what juts out is cropped.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from t2i_jax.errors import UserError

Shape = tuple[int, int]
# Sides of buckets that are made from an area are at most this much from its root, either way: SDXL
# has 512 to 2048 at 1024 x 1024.
_LONGEST = 2
# The step is compiled for each shape that has pictures: no more shapes than that from one number.
_MOST = 64


@dataclasses.dataclass(frozen=True)
class Buckets:
  """Which rows of a source have pictures of which shape.

  Attributes:
    shapes: (height, width) of each bucket, in pixels.
    of: the bucket of each row, int [rows].
  """

  shapes: tuple[Shape, ...]
  of: np.ndarray

  def rows(self, bucket: int) -> np.ndarray:
    """The rows of a bucket, int64, ascending."""
    return np.flatnonzero(self.of == bucket)

  def taken(self, rows: np.ndarray) -> "Buckets":
    """The buckets of some of the rows alone."""
    return Buckets(self.shapes, self.of[rows])

  @property
  def used(self) -> tuple[int, ...]:
    """The buckets that have rows."""
    return tuple(np.unique(self.of).tolist())


def shapes_of(texts: Sequence[str], resolution: int) -> tuple[Shape, ...]:
  """The shapes that a data set's option `buckets` asks for.

  Args:
    texts: shapes as "HEIGHTxWIDTH", or one number, the step: all sides are multiples of it, and
      each shape is as large as can be without having more pixels than `resolution` squared.
    resolution: side of the square pictures.

  Raises:
    UserError: something else, a shape twice, or a step with which there is no square, nothing but
      the square, or too many shapes.
  """
  texts = tuple(map(str, texts))
  if len(texts) == 1 and re.fullmatch(r"[0-9]+", texts[0]):
    return made_of(resolution, int(texts[0]))
  shapes = []
  for text in texts:
    sides = re.fullmatch(r"([0-9]+)x([0-9]+)", text)
    if sides is None or 0 in (shape := tuple(map(int, sides.groups()))):
      raise UserError(f"option buckets: '{text}' is not HEIGHTxWIDTH; write shapes such as "
                      "192x320,256x256,320x192, or one number, of which all sides are multiples")
    same = [other for other in shapes if other[0] * shape[1] == shape[0] * other[1]]
    if same:
      raise UserError(f"option buckets: {same[0][0]}x{same[0][1]} and {text} have one ratio of "
                      "height to width, by which pictures are told apart; leave one of them out")
    shapes.append(shape)
  return tuple(shapes)


def made_of(resolution: int, step: int) -> tuple[Shape, ...]:
  """Shapes of about `resolution` squared pixels, from tall to wide; see `shapes_of`.

  Raises:
    UserError: the step does not divide the resolution, or gives one shape or more than 64.
  """
  if not step or resolution % step:
    raise UserError(f"option buckets={step}: sides are multiples of it, and model.resolution="
                    f"{resolution} is none; use a divisor of it")
  shapes = _multiples(resolution, step)
  if 1 < len(shapes) <= _MOST:
    return shapes
  divisors = [n for n in range(1, resolution) if resolution % n == 0]
  fitting = [n for n in divisors if 1 < len(_multiples(resolution, n)) <= _MOST]
  instead = "name the shapes, such as 192x320,256x256,320x192"
  if len(shapes) == 1:
    what, nearest = "the square alone", max(fitting, default=None)
  else:
    what, nearest = f"{len(shapes)} shapes, each of which is compiled", min(fitting, default=None)
    what += f" (at most {_MOST})"
  if nearest:
    kind = "smaller" if nearest < step else "larger"
    instead = f"use a {kind} step, such as {nearest}, or {instead}"
  raise UserError(f"option buckets={step} gives {what} at model.resolution={resolution}; {instead}")


def _multiples(resolution: int, step: int) -> tuple[Shape, ...]:
  area, longest = resolution**2, _LONGEST * resolution
  shapes = set()
  for side in range(step * -(-resolution // (_LONGEST * step)), longest + 1, step):
    other = min(area // side // step * step, longest)
    if other:  # None is as narrow as that where the step is the resolution.
      shapes |= {(side, other), (other, side)}
  return tuple(sorted(shapes, key=lambda shape: (-shape[0] / shape[1], shape)))


def assigned(shapes: Sequence[Shape], heights: np.ndarray, widths: np.ndarray) -> Buckets:
  """The buckets of pictures of these heights and widths [rows]: those of the nearest ratio."""
  ratios = np.log([height / width for height, width in shapes])
  order = np.argsort(ratios, kind="stable")
  between = (ratios[order][1:] + ratios[order][:-1]) / 2
  own = np.log(np.asarray(heights, np.float64) / np.asarray(widths, np.float64))
  of = order[np.searchsorted(between, own)]
  return Buckets(tuple(shapes), of.astype(np.min_scalar_type(len(shapes))))
