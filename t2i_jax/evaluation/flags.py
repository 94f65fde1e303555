"""What is wrong with an evaluation's flags, found before anything is read or drawn."""

from collections.abc import Sequence
from typing import Any

import jax

from t2i_jax.errors import UserError
from t2i_jax.evaluation.points import Model
from t2i_jax.evaluation.scoring import LOSS, VERIFIER
from t2i_jax.sample import COMMON


def check(flags: Any) -> None:
  """Raises UserError for flags that are out of range, or say two things."""
  for name, least in (("pictures", 2), ("each", 1), ("batch_size", 1), ("reference_pictures", 2),
                      ("resolution", 1)):
    value = getattr(flags, name)
    if value is not None and value < least:
      why = ", so that captions can be shuffled" if name == "pictures" else ""
      raise UserError(f"--{name.replace('_', '-')}={value}: use {least} or more{why}")
  if flags.prompts and flags.split:
    raise UserError("--prompts and --split are both given; draw for one or the other")
  if flags.reference_only and not flags.save_reference:
    raise UserError("--reference-only keeps nothing; name a file with --save-reference=FILE.npz")
  if flags.save_reference and not flags.save_reference.endswith(".npz"):
    raise UserError(f"--save-reference={flags.save_reference}: name a file that ends in .npz")
  if flags.geneval and not flags.prompts:
    raise UserError("--geneval needs GenEval's prompts; give --prompts=evaluation_metadata.jsonl")
  for name in (LOSS, VERIFIER) if flags.prompts else ():
    if name in flags.metric:
      raise UserError(f"the metric '{name}' is of a data set's split; leave --prompts out")
  if jax.process_count() > 1 and not flags.output:
    raise UserError("several processes share one folder; name it with --output")


def check_kinds(flags: Any, models: Sequence[Model]) -> None:
  """Raises UserError unless all exports do the same, and the flags are of what they do."""
  first = models[0]
  for model in models:
    if model.reconstructs != first.reconstructs:
      one, other = (first, model) if model.reconstructs else (model, first)
      raise UserError(f"--export={one.path} draws pictures, and --export={other.path} encodes and "
                      "decodes real ones; measure them in two commands")
  if not first.reconstructs:
    return
  of_drawing = ["guide", "prompts", "geneval", *COMMON, "option", "sweep"]
  given = [name for name in of_drawing if getattr(flags, name)]
  given += ["each"] * (flags.each > 1)
  if given:
    raise UserError(f"--{given[0]} is of drawing, and --export={first.path} is a first stage, "
                    "which encodes and decodes a split's pictures; leave it out")


def named_paths(given: Sequence[str]) -> dict[str, str]:
  """`{kind: path}` of `--network=KIND=FILE`; UserError for one that is none, or given twice."""
  paths: dict[str, str] = {}
  for text in given:
    name, equals, path = text.partition("=")
    if not equals or not path:
      raise UserError(f"--network={text} is not NAME=FILE")
    if name in paths:
      raise UserError(f"--network={name} is given twice")
    paths[name] = path
  return paths
