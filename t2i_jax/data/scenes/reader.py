"""What objects a picture shows: analysis by synthesis.

A picture can show objects if its ground is plain and of the right colour, and
it has little noise and few regions; any other shows none.

Every picture is read at 32 pixels, to which it is area-averaged. Each
connected foreground region is compared by least squares with templates of
every shape over a grid of radii, sub-pixel offsets and two sharpnesses. The
best template gives shape, radius, centre and colour; what it leaves
unexplained, beyond the picture's own noise, decides whether the region is a
shape at all.
"""

import dataclasses
from functools import cache

import numpy as np
from scipy import ndimage

from t2i_jax.data.scenes.grammar import COLOURS, SHAPES
from t2i_jax.data.scenes.render import BACKGROUND, RADIUS, coverage
from t2i_jax.errors import UserError

# All thresholds were fixed on rendered pictures (clean, blurred and noisy, with
# true and with changed captions), before any model was scored. Colours are in
# units of 1/255, lengths in pixels of the side at which pictures are read.
SIDE = 32
# A smoothed pixel this far from the ground is foreground: a fifth of the
# faintest colour's contrast, or 5 standard deviations of the picture's noise.
FOREGROUND = 40.0
FOREGROUND_NOISE = 5.0
# A region of fewer pixels is a speck (the smallest object has 20).
LEAST_PIXELS = 5
# The picture's ground may differ from the renderer's by this much a channel.
GROUND_TOLERANCE = 24.0
# Beyond this noise, or this many regions, a picture shows nothing.
MOST_NOISE = 45.0
MOST_REGIONS = 12
# Largest share of a region's energy that its template may leave unexplained
# (true pictures leave 0.03; half a disc 0.23, a T 0.08 to 0.12), and how many
# standard deviations of the energy of the picture's noise are let pass besides.
MOST_UNEXPLAINED = 0.07
UNEXPLAINED_NOISE = 3.0
# Most pixels of the rest, smoothed, that are foreground. True pictures leave 4,
# with noise 9; a faint object that touches a dark one leaves 13 or more.
MOST_LEFTOVER = 9
# Least lead over the best template of another shape, in the same unit.
LEAST_LEAD = 0.004
# Largest distance of a colour from the palette's nearest (whose closest two
# are 81 apart).
COLOUR_TOLERANCE = 50.0
# Radius that separates the sizes, as a share of the side.
SIZE_BOUNDARY = (RADIUS["small"] * RADIUS["large"]) ** 0.5

_HALF = 8  # of the window in which a region is compared, less the middle pixel
_SMOOTH = np.array([0.25, 0.5, 0.25], np.float32)
_RADII = np.geomspace(0.075 * SIDE, 0.178 * SIDE, 18)
_OFFSETS = np.linspace(-0.75, 0.75, 7)
_BLURS = (0.0, 0.6)
_TRIANGLE_CENTROID = 0.183  # below its centre, in radii
_PALETTE = np.array(list(COLOURS.values()), np.float32)


@dataclasses.dataclass(frozen=True)
class Objects:
  """The objects seen in some pictures, as parallel arrays [m].

  Attributes:
    picture: index of the picture, ascending.
    colour, shape: indices into `COLOURS` and `SHAPES`, -1 for neither of them.
    radius: as a share of the side.
    centre: [m, 2], (x, y) as shares of the side.
  """

  picture: np.ndarray
  colour: np.ndarray
  shape: np.ndarray
  radius: np.ndarray
  centre: np.ndarray


@cache
def _templates():
  """Unit-norm templates [k, window], their norms [k], radii [k] and centres
  [k, 2] from the window's middle; k is ordered by shape."""
  # Every template's centroid, which is what positions a window, is at an offset.
  radius, dy, dx = (a.ravel() for a in np.meshgrid(_RADII, _OFFSETS, _OFFSETS, indexing="ij"))
  grid = np.arange(-_HALF, _HALF + 1, dtype=np.float64)
  masks, centres = [], []
  for shape in SHAPES:
    cy = dy - (_TRIANGLE_CENTROID * radius if shape == "triangle" else 0.0)
    x, y = grid - dx[:, None, None], grid[:, None] - cy[:, None, None]
    mask = coverage(shape, x, y, radius[:, None, None])
    for blur in _BLURS:
      masks.append(ndimage.gaussian_filter(mask, (0, blur, blur)))
      centres.append(np.stack([dx, cy], 1))
  masks = np.concatenate(masks).reshape(-1, len(grid) ** 2).astype(np.float32)
  norms = np.linalg.norm(masks, axis=1)
  radii = np.tile(radius, len(SHAPES) * len(_BLURS))
  return masks / norms[:, None], norms, radii, np.concatenate(centres)


def _shrink(images: np.ndarray) -> np.ndarray:
  """Pictures area-averaged to SIDE, float32 [n, SIDE, SIDE, 3]."""
  side = images.shape[1]
  if side == SIDE:
    return images.astype(np.float32)
  edges = np.arange(SIDE + 1) * side / SIDE
  pixels = np.arange(side)
  share = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
  share = (np.maximum(share, 0) * SIDE / side).astype(np.float32)
  rows = np.einsum("iy,nyxc->nixc", share, images.astype(np.float32), optimize=True)
  return np.einsum("jx,nixc->nijc", share, rows, optimize=True)


def _smooth(images: np.ndarray) -> np.ndarray:
  rows = ndimage.correlate1d(images, _SMOOTH, axis=1, mode="nearest")
  return ndimage.correlate1d(rows, _SMOOTH, axis=2, mode="nearest")


def _grow(labels: np.ndarray) -> np.ndarray:
  """Labels spread by one pixel into unlabelled neighbours."""
  return np.where(labels > 0, labels, ndimage.maximum_filter(labels, size=(1, 3, 3)))


def read(images: np.ndarray) -> Objects:
  """The objects that pictures show.

  Args:
    images: uint8 [n, R, R, 3], n >= 1, R >= 32. Memory is about 0.5 MB a picture.

  Raises:
    UserError: if the pictures are of another type or shape.
  """
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
    raise UserError(
      f"verifier: pictures are {images.dtype}{list(images.shape)}; give uint8 [n, R, R, 3]"
    )
  if images.shape[1] != images.shape[2] or images.shape[1] < SIDE:
    raise UserError(
      f"verifier: pictures are {images.shape[1]} by {images.shape[2]}; "
      f"give square ones of at least {SIDE} pixels"
    )
  n = len(images)
  x = _shrink(images)
  ground = np.median(x.reshape(n, SIDE * SIDE, 3), axis=1)
  # Most pixels are ground, so neighbours differ by noise alone.
  step = np.abs(np.diff(x, axis=2))
  noise = np.median(step, axis=(1, 2, 3)) * 1.4826 / np.sqrt(2)
  contrast = ground[:, None, None] - x
  height = np.linalg.norm(_smooth(contrast), axis=3)
  # The smoothing kernel multiplies noise by sum(_SMOOTH ** 2).
  threshold = np.maximum(FOREGROUND, FOREGROUND_NOISE * np.sum(_SMOOTH**2) * noise)
  plane = np.zeros((3, 3, 3), int)
  plane[1] = ndimage.generate_binary_structure(2, 1)
  labels, count = ndimage.label(height > threshold[:, None, None], plane)

  area = np.bincount(labels.ravel(), minlength=count + 1)
  keep = area >= LEAST_PIXELS
  keep[0] = False
  at = np.nonzero(labels)
  own = labels[at]
  picture = np.zeros(count + 1, int)
  picture[own] = at[0]
  regions = np.bincount(picture[keep], minlength=n)
  readable = (
    (np.abs(ground - BACKGROUND).max(axis=1) <= GROUND_TOLERANCE)
    & (noise <= MOST_NOISE)
    & (regions <= MOST_REGIONS)
  )
  keep &= readable[picture]

  mass = np.bincount(own, height[at], count + 1)
  middle = np.stack([np.bincount(own, height[at] * at[axis], count + 1) for axis in (1, 2)], 1)
  kept = np.flatnonzero(keep)
  middle = np.rint(middle[kept] / mass[kept, None]).astype(int)
  picture = picture[kept]

  pad = ((0, 0), (_HALF, _HALF), (_HALF, _HALF))
  territory = np.pad(_grow(_grow(np.where(keep[labels], labels, 0))), pad, constant_values=-1)
  contrast = np.pad(contrast, (*pad, (0, 0)))
  window = np.arange(2 * _HALF + 1)
  rows = (middle[:, 0, None] + window)[:, :, None]
  columns = (middle[:, 1, None] + window)[:, None, :]
  place = (picture[:, None, None], rows, columns)
  # A region and its margin: neighbours, and most of the noise, stay outside.
  mine = territory[place] == kept[:, None, None]
  patches = contrast[place] * mine[..., None]
  channels = 3 * np.sum(mine, (1, 2))
  return Objects(
    picture=picture,
    **_fit(
      patches.reshape(len(kept), window.size**2, 3),
      channels * noise[picture] ** 2,
      np.sqrt(2 * channels) * noise[picture] ** 2,
      threshold[picture],
      ground[picture],
      middle,
    ),
  )


def _fit(patches, noise, noise_spread, threshold, ground, middle) -> dict[str, np.ndarray]:
  """Fields of `Objects`.

  Args:
    patches: regions' windows, contrast to the ground, [m, window, 3].
    noise, noise_spread: mean and standard deviation of the noise's energy in
      each window, [m].
    threshold: of foreground, [m].
    ground: colour, [m, 3].
    middle: row and column of the windows' middle pixels, [m, 2].
  """
  unit, norms, radii, offsets = _templates()
  m = len(patches)
  # One colour explains a shape: its direction is that of the window's sum.
  direction = patches.sum(axis=1)
  direction /= np.maximum(np.linalg.norm(direction, axis=1, keepdims=True), 1e-6)
  gray = np.einsum("mpc,mc->mp", patches, direction)
  fit = gray @ unit.T
  best = fit.argmax(axis=1)
  by_shape = fit.reshape(m, len(SHAPES), len(unit) // len(SHAPES)).max(axis=2)
  explained = np.maximum(by_shape, 0) ** 2
  energy = np.maximum(np.sum(patches**2, axis=(1, 2)) - noise, 1e-6)
  order = np.argsort(explained, axis=1)
  first, second = (np.take_along_axis(explained, order[:, [i]], 1)[:, 0] for i in (-1, -2))
  unexplained = 1 - first / energy
  lead = (first - second) / energy
  shape = order[:, -1].copy()
  allowed = MOST_UNEXPLAINED + UNEXPLAINED_NOISE * noise_spread / energy
  shape[(unexplained > allowed) | (lead < LEAST_LEAD)] = -1

  amplitude = np.einsum("mpc,mp->mc", patches, unit[best])
  side = 2 * _HALF + 1
  rest = patches - unit[best, :, None] * amplitude[:, None]
  rest = np.linalg.norm(_smooth(rest.reshape(m, side, side, 3)), axis=3)
  leftover = np.sum(rest > threshold[:, None, None], axis=(1, 2))
  shape[leftover > MOST_LEFTOVER] = -1

  colour = ground - amplitude / norms[best, None]
  distance = np.linalg.norm(colour[:, None] - _PALETTE, axis=2)
  nearest = distance.argmin(axis=1)
  nearest[distance.min(axis=1) > COLOUR_TOLERANCE] = -1
  return {
    "colour": nearest,
    "shape": shape,
    "radius": radii[best] / SIDE,
    "centre": (middle[:, ::-1] + 0.5 + offsets[best]) / SIDE,
  }
