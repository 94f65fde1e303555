"""Whether pictures show what their captions say.

The sub-scores follow GenEval (Ghosh, Hajishirzi and Schmidt, 2023), with the
objects read by `reader` in place of a detector's.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from t2i_jax.data.scenes.grammar import COLOURS, PLACES, SHAPES, SIZES, Scene, parse
from t2i_jax.data.scenes.reader import SIZE_BOUNDARY, read
from t2i_jax.errors import UserError

SCORES = ("colour", "shape", "size", "count", "position", "all")
# What a level's captions state; a score that does not apply is True.
APPLIES = {
  "one": ("colour", "shape", "size", "count", "position", "all"),
  "two": ("colour", "shape", "count", "position", "all"),
  "counts": ("colour", "shape", "count", "all"),
}
# Largest distance across a relation's axis, as a share of the one along it.
# Scenes are drawn with at most 0.45. Fixed on rendered pictures only.
RELATION_MOST_SKEW = 0.75
_BLOCK = 256  # pictures read at a time, which bounds memory

_AXIS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}

# One object seen: colour, shape (None where it is neither of ours), size, centre.
_Seen = tuple[str | None, str | None, str, np.ndarray]


def _place(centre: np.ndarray) -> str:
  column, row = np.clip((centre * 3).astype(int), 0, 2)
  return PLACES[3 * row + column]


def _related(first: np.ndarray, second: np.ndarray, relation: str) -> bool:
  axis, sign = _AXIS[relation]
  offset = first - second
  along = sign * offset[axis]
  return bool(along > 0 and abs(offset[1 - axis]) <= RELATION_MOST_SKEW * along)


def _agreement(seen: _Seen, thing) -> int:
  return (seen[0] == thing.colour) + (seen[1] == thing.shape)


def _best(options: list, score) -> list:
  """The options with the highest score."""
  scores = [score(option) for option in options]
  return [o for o, s in zip(options, scores, strict=True) if s == max(scores)]


def _judge(scene: Scene, seen: list[_Seen]) -> tuple[bool, ...]:
  """Values of `SCORES`, of a picture in which `seen` was found."""
  if not seen:
    return tuple(score not in APPLIES[scene.level] for score in SCORES)
  colour = {s[0] for s in seen} == {thing.colour for thing in scene.things}
  shape = {s[1] for s in seen} == {thing.shape for thing in scene.things}
  found = Counter((s[0], s[1]) for s in seen)
  said = Counter({(t.colour, t.shape): t.count for t in scene.things})
  if found.keys() == said.keys():
    count = found == said
  else:
    count = sorted(found.values()) == sorted(said.values())
  size = position = True
  if scene.level == "one":
    (thing,) = scene.things
    best = _best(seen, lambda s: _agreement(s, thing))
    size = any(s[2] == thing.size for s in best)
    position = any(_place(s[3]) == thing.place for s in best)
  elif scene.level == "two":
    first, second = scene.things
    pairs = [(a, b) for i, a in enumerate(seen) for j, b in enumerate(seen) if i != j]
    best = _best(pairs, lambda p: _agreement(p[0], first) + _agreement(p[1], second))
    position = any(_related(a[3], b[3], scene.relation) for a, b in best)
  every = colour and shape and size and count and position and found == said
  return colour, shape, size, count, position, every


def verify(images: np.ndarray, captions: Sequence[str]) -> dict[str, np.ndarray]:
  """Judges pictures by their captions.

  Every object of a picture counts, and a region that is no known shape is an
  object of none. The scores are:
    colour: the colours seen are those said.
    shape: the shapes seen are those said.
    size: the object is of the size said (level "one").
    count: as many objects of each kind as said. Where other kinds are seen
      than said, their numbers are compared whatever the kinds.
    position: the object is in the place said (level "one"), or the two objects
      that agree best with those said are so related (level "two").
    all: all of these, and each kind has its own colour, shape and count.

  Args:
    images: uint8 [n, R, R, 3], R >= 32.
    captions: n captions of the scenes' grammar.

  Returns:
    bool [n] for each of `SCORES`. A score that a caption says nothing of (see
    `APPLIES`) is True.

  Raises:
    UserError: on pictures of another type or shape, another number of captions
      than of pictures, or text that is no caption of a scene.
  """
  if len(images) != len(captions):
    raise UserError(
      f"verifier: {len(images)} pictures and {len(captions)} captions; give one caption a picture"
    )
  try:
    scenes = [parse(caption) for caption in captions]
  except ValueError as error:
    raise UserError(f"verifier: {error}; it judges pictures of the scenes only") from None
  colours = [*COLOURS, None]  # index -1 is None
  shapes = [*SHAPES, None]
  seen: list[list[_Seen]] = [[] for _ in scenes]
  for start in range(0, len(images), _BLOCK):
    objects = read(images[start : start + _BLOCK])
    sizes = np.array(SIZES)[(objects.radius > SIZE_BOUNDARY).astype(int)]
    for i, picture in enumerate(objects.picture):
      seen[start + picture].append(
        (colours[objects.colour[i]], shapes[objects.shape[i]], sizes[i], objects.centre[i])
      )
  judged = [_judge(scene, found) for scene, found in zip(scenes, seen, strict=True)]
  table = np.array(judged, bool).reshape(-1, len(SCORES))
  return {score: table[:, i] for i, score in enumerate(SCORES)}
