"""Procedural captioned pictures and their exact verifier.

Three levels: one object of a colour, shape, size and place; two objects in a
relation; up to three kinds of objects with counts.
"""

from t2i_jax.data.scenes.grammar import (
  COLOURS,
  LEVELS,
  PLACES,
  RELATIONS,
  SHAPES,
  SIZES,
  Scene,
  Thing,
  caption,
  parse,
)
from t2i_jax.data.scenes.render import BACKGROUND, render
from t2i_jax.data.scenes.source import Scenes
from t2i_jax.data.scenes.split import (
  HELD_OUT_PAIRS,
  SPLITS,
  TRAINED_PAIRS,
  canonical,
  one_object_scenes,
  split_of,
  two_object_scenes,
)
from t2i_jax.data.scenes.verifier import APPLIES, SCORES, verify

__all__ = [
  "APPLIES",
  "BACKGROUND",
  "COLOURS",
  "HELD_OUT_PAIRS",
  "LEVELS",
  "PLACES",
  "RELATIONS",
  "SCORES",
  "SHAPES",
  "SIZES",
  "SPLITS",
  "TRAINED_PAIRS",
  "Scene",
  "Scenes",
  "Thing",
  "canonical",
  "caption",
  "one_object_scenes",
  "parse",
  "render",
  "split_of",
  "two_object_scenes",
  "verify",
]
