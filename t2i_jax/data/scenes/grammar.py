"""What a scene is, and the grammar that says it and reads it back.

A `Scene` holds what its caption says and nothing else: a size, place or number
that goes unsaid is None or 1, and the renderer chooses it. `parse` inverts
`caption` for every phrasing, so a picture can be judged from its caption alone.
"""

import dataclasses
import re
from functools import cache

COLOURS = {
  "red": (216, 32, 40),
  "orange": (246, 138, 20),
  "yellow": (238, 218, 30),
  "green": (36, 150, 60),
  "cyan": (40, 200, 214),
  "blue": (36, 76, 220),
  "purple": (126, 40, 160),
  "pink": (246, 96, 186),
  "black": (28, 28, 32),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = ("small", "large")
PLACES = (
  "top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right"
)  # fmt: skip
RELATIONS = ("left of", "right of", "above", "below")
LEVELS = ("one", "two", "counts")
MOST_THINGS = 6

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@dataclasses.dataclass(frozen=True)
class Thing:
  """`count` objects of one colour and shape; `size` and `place` are None where unsaid."""

  colour: str
  shape: str
  size: str | None = None
  place: str | None = None
  count: int = 1


@dataclasses.dataclass(frozen=True)
class Scene:
  """What a caption says.

  Attributes:
    level: one of `LEVELS`.
    things: one thing with size and place ("one"); two of different kinds
      ("two"); one to three different kinds with their counts ("counts").
    relation: where things[0] lies seen from things[1], at level "two".
  """

  level: str
  things: tuple[Thing, ...]
  relation: str | None = None


_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_CORNER = ("at the {v} {h}", "in the {v} {h} corner", "in the {v} {h} of the picture")
_PLACE_WORDS = {
  f"{v} {h}": tuple(p.format(v=v, h=h) for p in _CORNER)
  for v in ("top", "bottom")
  for h in ("left", "right")
}
for _v in ("top", "bottom"):
  _PLACE_WORDS[_v] = (f"at the {_v}", f"in the {_v} middle", f"at the {_v} of the picture")
for _h in ("left", "right"):
  _PLACE_WORDS[_h] = (f"on the {_h}", f"in the middle {_h}", f"on the {_h} of the picture")
_PLACE_WORDS["centre"] = ("in the centre", "in the middle", "in the middle of the picture")

_RELATION_WORDS = {
  "left of": ("left of", "to the left of", "on the left of"),
  "right of": ("right of", "to the right of", "on the right of"),
  "above": ("above", "over"),
  "below": ("below", "under"),
}
# The same relation, said of things[0] after things[1] has been named.
_BACK_WORDS = {
  "left of": ("to its left", "on its left"),
  "right of": ("to its right", "on its right"),
  "above": ("above it", "over it"),
  "below": ("below it", "under it"),
}
_NUMBERS = ("one", "two", "three", "four", "five", "six")

_ONE = (
  "a {size} {colour} {shape} {place}",
  "there is a {size} {colour} {shape} {place}",
  "a picture of a {size} {colour} {shape} {place}",
  "{place} there is a {size} {colour} {shape}",
  "a {colour} {shape}, {size}, {place}",
  "a {shape} that is {size} and {colour} {place}",
)
_TWO = (
  "a {colour0} {shape0} {relation} a {colour1} {shape1}",
  "there is a {colour0} {shape0} {relation} a {colour1} {shape1}",
  "a picture of a {colour0} {shape0} {relation} a {colour1} {shape1}",
  "{relation} a {colour1} {shape1} there is a {colour0} {shape0}",
  "a {colour1} {shape1} with a {colour0} {shape0} {back}",
)
_COUNTS = ("{list}", "there {are} {list}", "a picture of {list}", "a picture with {list}")


class _Choices:
  """Successive choices out of one number."""

  def __init__(self, draw: int):
    self.rest = (int(draw) * 0x9E3779B97F4A7C15) % 2**64 >> 16

  def __call__(self, options):
    self.rest, pick = divmod(self.rest, len(options))
    return options[pick]


class _Replay:
  """Choices made before, then the first of each: what it takes to go through all of them."""

  def __init__(self, made: list[int]):
    self.made, self.sizes = list(made), []

  def __call__(self, options):
    number = len(self.sizes)
    self.sizes.append(len(options))
    if number == len(self.made):
      self.made.append(0)
    return options[self.made[number]]


def _articles(text: str) -> str:
  return re.sub(r"\ba (?=[aeiou])", "an ", text)


def _plural(shape: str) -> str:
  return shape + ("es" if shape.endswith("s") else "s")


def _kind(thing: Thing, choose: _Choices) -> str:
  if thing.count == 1:
    return f"{choose(('one', 'a'))} {thing.colour} {thing.shape}"
  return f"{_NUMBERS[thing.count - 1]} {thing.colour} {_plural(thing.shape)}"


def caption(scene: Scene, draw: int) -> str:
  """A caption of `scene`, lower case; the number `draw` picks its phrasing."""
  return _said(scene, _Choices(draw))


def captions_of(scene: Scene) -> list[str]:
  """Every caption of `scene`, each once."""
  found: dict[str, None] = {}
  made: list[int] = []
  while True:
    replay = _Replay(made)
    found[_said(scene, replay)] = None
    made = replay.made
    while made and made[-1] + 1 == replay.sizes[len(made) - 1]:
      made.pop()
    if not made:
      return list(found)
    made[-1] += 1


def _said(scene: Scene, choose) -> str:
  if scene.level == "one":
    (thing,) = scene.things
    text = choose(_ONE).format(
      size=choose(_SIZE_WORDS[thing.size]),
      colour=thing.colour,
      shape=thing.shape,
      place=choose(_PLACE_WORDS[thing.place]),
    )
  elif scene.level == "two":
    first, second = scene.things
    text = choose(_TWO).format(
      colour0=first.colour,
      shape0=first.shape,
      colour1=second.colour,
      shape1=second.shape,
      relation=choose(_RELATION_WORDS[scene.relation]),
      back=choose(_BACK_WORDS[scene.relation]),
    )
  else:
    pattern = choose(_COUNTS)
    kinds = [_kind(thing, choose) for thing in scene.things]
    listed = " and ".join([", ".join(kinds[:-1]), kinds[-1]] if len(kinds) > 1 else kinds)
    text = pattern.format(list=listed, are="is" if scene.things[0].count == 1 else "are")
  return _articles(text)


def _meaning(words: dict[str, tuple[str, ...]]) -> dict[str, str]:
  return {phrase: name for name, phrases in words.items() for phrase in phrases}


_SIZE_OF = _meaning(_SIZE_WORDS)
_PLACE_OF = _meaning(_PLACE_WORDS)
_RELATION_OF = _meaning(_RELATION_WORDS) | _meaning(_BACK_WORDS)
_COUNT_OF = {word: i + 1 for i, word in enumerate(_NUMBERS)} | {"a": 1, "an": 1}
_SHAPE_OF = {shape: shape for shape in SHAPES} | {_plural(shape): shape for shape in SHAPES}


@cache
def _patterns() -> dict[str, list[re.Pattern]]:
  """Regular expressions of the phrasings at levels "one" and "two"."""

  def field(name, words):
    return f"(?P<{name}>{'|'.join(words)})"

  fields = {
    "size": field("size", _SIZE_OF),
    "place": field("place", _PLACE_OF),
    "relation": field("relation", _meaning(_RELATION_WORDS)),
    "back": field("relation", _meaning(_BACK_WORDS)),
  }
  for suffix in ("", "0", "1"):
    fields["colour" + suffix] = field("colour" + suffix, COLOURS)
    fields["shape" + suffix] = field("shape" + suffix, SHAPES)

  def compiled(pattern):
    return re.compile(re.sub(r"\ba (?=\{)", "an? ", pattern).format(**fields))

  return {"one": [compiled(p) for p in _ONE], "two": [compiled(p) for p in _TWO]}


def _parse_counts(text: str) -> Scene | None:
  things = []
  for part in re.split(r", | and ", re.sub(r"^(there is|there are|a picture of|a picture with) ",
                                           "", text)):  # fmt: skip
    words = part.split(" ")
    if len(words) != 3:
      return None
    count, colour, shape = _COUNT_OF.get(words[0]), words[1], _SHAPE_OF.get(words[2])
    if count is None or colour not in COLOURS or shape is None:
      return None
    if (count == 1) != (words[2] == shape):
      return None
    things.append(Thing(colour, shape, count=count))
  return Scene("counts", tuple(things))


def parse(caption: str) -> Scene:
  """The scene that a caption says.

  Raises:
    ValueError: if the text is not a caption of this grammar.
  """
  for pattern in _patterns()["one"]:
    if found := pattern.fullmatch(caption):
      thing = Thing(found["colour"], found["shape"], _SIZE_OF[found["size"]],
                    _PLACE_OF[found["place"]])  # fmt: skip
      return Scene("one", (thing,))
  for pattern in _patterns()["two"]:
    if found := pattern.fullmatch(caption):
      things = tuple(Thing(found["colour" + i], found["shape" + i]) for i in "01")
      return Scene("two", things, _RELATION_OF[found["relation"]])
  scene = _parse_counts(caption)
  if scene is None:
    raise ValueError(f"not a caption of the scenes: {caption!r}")
  return scene
