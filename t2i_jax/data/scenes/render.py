"""Pictures of scenes: flat shapes with smooth edges on a plain ground."""

import math

import numpy as np

from t2i_jax.data.scenes.grammar import COLOURS, MOST_THINGS, PLACES, SHAPES, SIZES, Scene

BACKGROUND = (240, 240, 240)
# Lengths are fractions of the picture's side. A radius is about half of an
# object's extent (see `coverage`, whose shapes reach up to REACH radii).
RADIUS = {"small": 0.095, "large": 0.142}
RADIUS_JITTER = 0.05  # of the radius
REACH = 1.12
CENTRES = (0.2, 0.5, 0.8)  # of the three columns and rows
PLACE_JITTER = 0.03
COUNTS_CENTRES = (1 / 6, 0.5, 5 / 6)
COUNTS_JITTER = 0.02  # so that neighbours stay 2 pixels apart at 32
# Level "two": the centres' distance along the relation's axis, the largest
# ratio of the distance across it, and the border kept free.
RELATION_DISTANCE = (0.41, 0.6)
RELATION_SKEW = 0.45
RELATION_BORDER = 0.18

_ROOT_2 = math.sqrt(2)
_PALETTE = np.array(list(COLOURS.values()), np.float32)
_COLOUR_ID = {name: i for i, name in enumerate(COLOURS)}
_SHAPE_ID = {name: i for i, name in enumerate(SHAPES)}
_SIZE_ID = {name: i for i, name in enumerate(SIZES)}
_PLACE_ID = {name: i for i, name in enumerate(PLACES)}
_RADII = np.array([RADIUS[size] for size in SIZES], np.float32)


def mix(numbers: np.ndarray, stream: np.ndarray | int) -> np.ndarray:
  """Independent uint64 numbers out of uint64 `numbers` and a stream's index
  (splitmix64's finaliser)."""
  z = numbers + np.asarray(stream, np.uint64)[...] * np.uint64(0x9E3779B97F4A7C15)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))


def coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
  """Share of each pixel that a shape covers, in [0, 1].

  Args:
    shape: one of `SHAPES`.
    x, y: pixel centres relative to the object's, in pixels, y downwards.
    radius: in pixels; the three broadcast against one another.
  """
  ax, ay = np.abs(x), np.abs(y)
  if shape == "circle":
    distance = np.hypot(x, y) - radius
  elif shape == "square":
    distance = np.maximum(ax, ay) - 0.88 * radius
  elif shape == "triangle":
    # Apex at (0, -1.05), base corners at (+-1.1, 0.8), in radii.
    slope = math.hypot(1.85, 1.1)
    side = (1.85 * ax - 1.1 * (y + 1.05 * radius)) / slope
    distance = np.maximum(side, y - 0.8 * radius)
  elif shape == "diamond":
    distance = (ax + ay - REACH * radius) / _ROOT_2
  elif shape == "cross":
    upright = np.maximum(ax - 0.42 * radius, ay - 1.05 * radius)
    level = np.maximum(ax - 1.05 * radius, ay - 0.42 * radius)
    distance = np.minimum(upright, level)
  else:
    distance = np.abs(np.hypot(x, y) - 0.8 * radius) - 0.26 * radius
  return np.clip(0.5 - distance, 0.0, 1.0)


def _said(scenes: list[Scene]) -> np.ndarray:
  """What is said of every object, int64 [n, MOST_THINGS, 4]: colour, shape,
  size and place, -1 where unsaid; colour is -1 where there is no object."""
  said = np.full((len(scenes), MOST_THINGS, 4), -1)
  for row, scene in zip(said, scenes, strict=True):
    slot = 0
    for thing in scene.things:
      row[slot : slot + thing.count] = (
        _COLOUR_ID[thing.colour],
        _SHAPE_ID[thing.shape],
        _SIZE_ID.get(thing.size, -1),
        _PLACE_ID.get(thing.place, -1),
      )
      slot += thing.count
  return said


def _pair_centres(relations: list[str], uniform: np.ndarray) -> np.ndarray:
  """Centres of the two objects of each relation, [n, 2, 2] as (x, y)."""
  near, far = RELATION_DISTANCE
  along = near + (far - near) * uniform[:, 0]
  across = along * RELATION_SKEW * (2 * uniform[:, 1] - 1)
  offset = np.stack([along, across], 1)  # from the first object to the second
  low = RELATION_BORDER + np.abs(offset) / 2
  middle = low + (1 - 2 * low) * uniform[:, 2:4]
  centres = middle[:, None] + np.array([-0.5, 0.5])[:, None] * offset[:, None]
  relations = np.array(relations)
  reverse = np.isin(relations, ("right of", "below"))
  centres[reverse] = centres[reverse, ::-1]
  upright = np.isin(relations, ("above", "below"))
  centres[upright] = centres[upright, :, ::-1]
  return centres


def _layout(scenes: list[Scene], said: np.ndarray, draws: np.ndarray):
  """Centres [n, MOST_THINGS, 2] as (x, y) and radii [n, MOST_THINGS], as
  fractions of the side."""
  n = len(scenes)
  draws = np.asarray(draws, np.uint64)
  # Streams: 4 numbers an object, then 9 that order the places, then 4 a pair.
  words = mix(draws[:, None], np.arange(1, 4 * MOST_THINGS + 14))
  uniform = (words >> np.uint64(11)).astype(np.float64) / 2**53
  own = uniform[:, : 4 * MOST_THINGS].reshape(n, MOST_THINGS, 4)
  levels = np.array([scene.level for scene in scenes])

  # Objects of level "counts" are small, to leave room around six of them.
  unsaid = np.where((levels == "counts")[:, None], 0, (own[..., 2] < 0.5).astype(int))
  radii = _RADII[np.where(said[..., 2] < 0, unsaid, said[..., 2])]
  radii = radii * (1 + RADIUS_JITTER * (2 * own[..., 3] - 1))

  order = np.argsort(uniform[:, 4 * MOST_THINGS : 4 * MOST_THINGS + 9], axis=1)[:, :MOST_THINGS]
  place = np.where(said[..., 3] < 0, order, said[..., 3])
  counts = (levels == "counts")[:, None, None]
  cell = np.stack([place % 3, place // 3], -1)
  centres = np.where(counts, np.array(COUNTS_CENTRES)[cell], np.array(CENTRES)[cell])
  centres = centres + np.where(counts, COUNTS_JITTER, PLACE_JITTER) * (2 * own[..., :2] - 1)
  two = levels == "two"
  if two.any():
    relations = [scene.relation for scene in scenes if scene.level == "two"]
    centres[two, :2] = _pair_centres(relations, uniform[two, -4:])
  return centres, radii


def render(scenes: list[Scene], resolution: int, draws: np.ndarray) -> np.ndarray:
  """Pictures of scenes, uint8 [n, resolution, resolution, 3].

  `draws` (uint64 [n]) chooses all that a scene leaves open: an exact place and
  size within what is said, and the sizes and places that go unsaid.
  """
  said = _said(scenes)
  centres, radii = _layout(scenes, said, draws)
  picture, slot = np.nonzero(said[..., 0] >= 0)
  kind = said[picture, slot, 1]
  radius = (radii[picture, slot] * resolution).astype(np.float32)[:, None, None]
  centre = centres[picture, slot] * resolution

  # Each object is drawn in a window, which lies within the picture.
  reach = math.ceil(RADIUS["large"] * (1 + RADIUS_JITTER) * REACH * resolution) + 1
  side = min(2 * reach + 1, resolution)
  start = np.clip(np.floor(centre).astype(int) - reach, 0, resolution - side)
  pixels = start[:, None] + np.arange(side)[:, None]  # [m, side, 2]
  offsets = (pixels + 0.5 - centre[:, None]).astype(np.float32)
  cover = np.empty((len(picture), side, side), np.float32)
  for i, shape in enumerate(SHAPES):
    these = np.flatnonzero(kind == i)
    x, y = offsets[these, None, :, 0], offsets[these, :, None, 1]
    cover[these] = coverage(shape, x, y, radius[these])

  images = np.empty((len(scenes), resolution, resolution, 3), np.uint8)
  images[:] = BACKGROUND
  # One object a picture at a time: windows of the same picture may overlap.
  for i in range(MOST_THINGS):
    these = np.flatnonzero(slot == i)
    if not len(these):
      break
    at = (picture[these, None, None], pixels[these, :, None, 1], pixels[these, None, :, 0])
    under = images[at].astype(np.float32)
    colour = _PALETTE[said[picture[these], i, 0]][:, None, None]
    images[at] = np.rint(under + cover[these, ..., None] * (colour - under)).astype(np.uint8)
  return images
