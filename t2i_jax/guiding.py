"""How a guide comes to an export or a run: its variables, its tokenizer, the labels it reads."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from t2i_jax import data, export
from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.base import GUIDE, System
from t2i_jax.systems.capabilities import PictureGuide
from t2i_jax.text.tokenizer import Tokenizers


def guided(exported: export.Export, path: str | Path) -> export.Export:
  """An export with another as its component `guide`, in place of one that it may have.

  Raises:
    UserError: for one that cannot be read.
  """
  guide = export.read(path)
  about = {"config": guide.config.to_dict(), "components": guide.components, "step": guide.step,
           "fingerprint": export.fingerprint(path)}
  theirs = {kind: {GUIDE: groups} for kind, groups in guide.variables.items()}
  _, ours = trees.split(exported.variables, (GUIDE,))
  return dataclasses.replace(
    exported, variables=trees.merge(ours, theirs),
    components={**exported.components, GUIDE: about},
    tokenizers=with_tokenizer(exported.tokenizers, {GUIDE: guide.tokenizers}),
  )


def references(
  system: System, image: np.ndarray | None, weights: Mapping[str, float]
) -> dict[str, np.ndarray]:
  """What a batch has for a system's guide, one row; see `PictureGuide.references`.

  Raises:
    UserError: as it and `picture_guide`.
  """
  return picture_guide(system).references(image, weights)


def picture_guide(system: System) -> PictureGuide:
  """A system's guide, which takes pictures.

  Raises:
    UserError: for a system without a guide, or with one that no picture tells anything.
  """
  guide = getattr(system, GUIDE, None)
  if guide is None:
    raise UserError("a guide's picture or weights are given and there is no guide; name one, "
                    "--guide=EXPORT")
  if not isinstance(guide, PictureGuide):
    raise UserError(f"the guide, a {type(guide).__name__}, takes no picture and no weights; leave "
                    "them out")
  return guide


def with_tokenizer(tokenizers: Tokenizers, given: Mapping[str, Tokenizers]) -> Tokenizers:
  """Tokenizers, and that of the guide among components' `given` ones, if it reads text.

  Raises:
    UserError: it reads with several.
  """
  if GUIDE not in given:
    return tokenizers
  theirs = given[GUIDE].of
  if len(theirs) > 1:
    raise UserError(f"components.{GUIDE} reads text with {', '.join(theirs)}; a guide may have one "
                    "text encoder")
  ours = {name: tokenizer for name, tokenizer in tokenizers.of.items() if name != GUIDE}
  for tokenizer in theirs.values():
    ours[GUIDE] = tokenizer
  return Tokenizers(ours)


def check_labels(system: System, config: ConfigDict) -> None:
  """Raises UserError unless the labels that are wanted can be read from prompts, `read_labels`."""
  there = data.labels(config.data.name)
  if _by_number(system, config) or tuple((there or {}).items()) == tuple(map(tuple, system.labels)):
    return
  wanted = ", ".join(f"{name} ({number})" for name, number in system.labels)
  raise UserError(f"pictures are drawn by the labels {wanted}, which the captions of data set "
                  f"'{config.data.name}' do not say; use a guide or a model of that data set")


def read_labels(system: System, config: ConfigDict, prompts: Sequence[str]) -> np.ndarray:
  """The labels, int32 [n, attributes], that prompts say: a caption of the run's data set, or, where
  it has no labels and one attribute is wanted, the number of its value ("207").

  Raises:
    UserError: a prompt says none.
  """
  if not _by_number(system, config):
    return data.read_labels(config.data.name, prompts)
  ((name, number),) = system.labels
  numbers = {str(value): value for value in range(number)}
  for prompt in prompts:
    if prompt.strip() not in numbers:
      raise UserError(f"a label cannot be read: the prompt '{prompt}' is no number of a {name}; "
                      f"give one of 0 to {number - 1}")
  return np.array([numbers[prompt.strip()] for prompt in prompts], np.int32)[:, None]


def _by_number(system: System, config: ConfigDict) -> bool:
  return len(system.labels) == 1 and data.labels(config.data.name) is None
