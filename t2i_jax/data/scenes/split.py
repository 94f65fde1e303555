"""Which scenes are trained on, and which are held out.

The split is a fixed function of what a scene says. It depends on no seed, so
that every run, tokenizer and score agrees on it.
"""

import hashlib
import itertools
from collections.abc import Iterator

from t2i_jax.data.scenes.grammar import (
  COLOURS,
  MOST_THINGS,
  OPPOSITE,
  PLACES,
  RELATIONS,
  SHAPES,
  SIZES,
  Scene,
  Thing,
)

SPLITS = ("train", "held_out_combinations", "held_out_pairs")

PAIRS = tuple(itertools.product(COLOURS, SHAPES))
# One shape of each colour is held out, and one or two colours of each shape:
# 9 of the 54 pairs, and every word still occurs in training.
HELD_OUT_PAIRS = tuple(
  (colour, SHAPES[(5 * i + 2) % len(SHAPES)]) for i, colour in enumerate(COLOURS)
)
TRAINED_PAIRS = tuple(pair for pair in PAIRS if pair not in HELD_OUT_PAIRS)
# Of the combinations of trained pairs, one in this many is held out: at least 15 %
# of all combinations, those of held-out pairs counted too.
_HELD_OUT_ONE_IN = 4

_HELD_OUT = frozenset(HELD_OUT_PAIRS)
_MASK = 2**64 - 1


def reverse(scene: Scene) -> Scene:
  """The same two objects in the same relation, said from the other one."""
  return Scene(scene.level, scene.things[::-1], OPPOSITE[scene.relation])


def canonical(scene: Scene) -> Scene:
  """The one scene that stands for all that say the same: kinds sorted, and
  "b right of a" turned into "a left of b"."""
  if scene.relation in ("right of", "below"):
    return reverse(scene)
  if scene.level == "counts":
    kinds = sorted(scene.things, key=lambda thing: (thing.colour, thing.shape, thing.count))
    return Scene(scene.level, tuple(kinds))
  return scene


def split_of(scene: Scene) -> str:
  """The member of `SPLITS` to which a scene belongs."""
  if any((thing.colour, thing.shape) in _HELD_OUT for thing in scene.things):
    return "held_out_pairs"
  same = canonical(scene)
  said = [same.level, same.relation] + [
    (t.colour, t.shape, t.size, t.place, t.count) for t in same.things
  ]
  number = int.from_bytes(hashlib.blake2b(repr(said).encode(), digest_size=8).digest(), "big")
  return "train" if number % _HELD_OUT_ONE_IN else "held_out_combinations"


def one_object_scenes() -> Iterator[Scene]:
  """Every scene of level "one"."""
  for (colour, shape), size, place in itertools.product(PAIRS, SIZES, PLACES):
    yield Scene("one", (Thing(colour, shape, size, place),))


def two_object_scenes() -> Iterator[Scene]:
  """Every scene of level "two", once: as `canonical` says it."""
  for first, second in itertools.permutations(PAIRS, 2):
    for relation in ("left of", "above"):
      yield Scene("two", (Thing(*first), Thing(*second)), relation)


class Random:
  """Splitmix64 (Steele, Lea and Flood, OOPSLA 2014) from a number: cheap to
  start anew for every row, and the same everywhere."""

  def __init__(self, *numbers: int):
    self.state = 0
    for number in numbers:
      self.state = (self.state ^ int(number)) & _MASK
      self.state = self.word()

  def word(self) -> int:
    """The next 64 bits."""
    self.state = (self.state + 0x9E3779B97F4A7C15) & _MASK
    z = self.state
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)

  def pick(self, options):
    """One of a sequence."""
    return options[(self.word() * len(options)) >> 64]


def _counts(kinds: int) -> tuple[tuple[int, ...], ...]:
  """Numbers of each kind. One object, or one each of two kinds, would be a
  picture of another level."""
  return tuple(
    numbers
    for numbers in itertools.product(range(1, MOST_THINGS + 1), repeat=kinds)
    if sum(numbers) <= MOST_THINGS and numbers not in ((1,), (1, 1))
  )


_COUNTS = {kinds: _counts(kinds) for kinds in (1, 2, 3)}


def _kinds(number: int, split: str, random: Random) -> list[tuple[str, str]]:
  """Different (colour, shape) pairs: all trained ones, or one held out."""
  kinds = [random.pick(HELD_OUT_PAIRS if split == "held_out_pairs" else TRAINED_PAIRS)]
  while len(kinds) < number:
    pair = random.pick(TRAINED_PAIRS)
    if pair not in kinds:
      kinds.append(pair)
  place = random.pick(range(number))
  kinds[0], kinds[place] = kinds[place], kinds[0]
  return kinds


def draw_scene(level: str, split: str, random: Random) -> Scene:
  """A scene of a level and a split: uniform at levels "one" and "two"; at
  level "counts" the number of kinds is uniform, and the scene given it."""
  while True:
    if level == "one":
      ((colour, shape),) = _kinds(1, split, random)
      scene = Scene("one", (Thing(colour, shape, random.pick(SIZES), random.pick(PLACES)),))
    elif level == "two":
      things = tuple(Thing(*pair) for pair in _kinds(2, split, random))
      scene = Scene("two", things, random.pick(RELATIONS))
    else:
      numbers = random.pick(_COUNTS[random.pick((1, 2, 3))])
      kinds = _kinds(len(numbers), split, random)
      things = (Thing(*pair, count=n) for pair, n in zip(kinds, numbers, strict=True))
      scene = Scene("counts", tuple(things))
    if split_of(scene) == split:
      return scene
