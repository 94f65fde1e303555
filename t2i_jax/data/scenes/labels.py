"""What a scene of one object is, as numbers."""

from collections.abc import Sequence

import numpy as np

from t2i_jax.data.scenes.grammar import COLOURS, PLACES, SHAPES, SIZES, Scene, parse
from t2i_jax.errors import UserError

NAMES = {
  "colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "place": PLACES,
}  # fmt: skip
CLASSES = {attribute: len(names) for attribute, names in NAMES.items()}


def labels_of(scenes: Sequence[Scene]) -> np.ndarray:
  """int32 [n, attributes]: the place of each attribute's value in `NAMES`.

  Raises:
    UserError: a scene is not of one object, all of whose attributes are said.
  """
  rows = []
  for scene in scenes:
    if scene.level != "one":
      raise UserError(f"scenes of level '{scene.level}' have no labels, only those of one object; "
                      "set data.options.levels=one")
    (thing,) = scene.things
    rows.append([names.index(getattr(thing, name)) for name, names in NAMES.items()])
  return np.array(rows, np.int32).reshape(-1, len(NAMES))


def read_labels(captions: Sequence[str]) -> np.ndarray:
  """int32 [n, attributes] of captions of one object.

  Raises:
    UserError: a text is no such caption.
  """
  try:
    scenes = [parse(caption) for caption in captions]
  except ValueError as error:
    raise UserError(f"a label cannot be read: {error}") from error
  return labels_of(scenes)
