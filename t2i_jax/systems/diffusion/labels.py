"""Labels beside a text, or in its place: what networks are told of a data set's attributes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.systems.base import GUIDE, Array, Batch, Conditioning, Field
from t2i_jax.systems.diffusion.denoiser import Denoiser
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import Variables

LABEL = "label"
UNSAID = -1  # a label that the network is not told


@dataclasses.dataclass(frozen=True, eq=False)
class Labelled(Denoiser):
  """A diffusion system that may be told labels; put it before the kind of `Denoiser` that it is.

  Attributes (beside those of `Denoiser`):
    classes: (attribute, number of its values) pairs, in the order of the batch's `label`, whose
      embeddings are added up; () for a model without labels, which only a guide makes obey.
    label_drop: probability of training on no label (Ho and Salimans 2022), so that there is
      something for `guidance` to lead away from.
  """

  classes: tuple[tuple[str, int], ...] = ()
  label_drop: float = 0.0

  def __post_init__(self):
    super().__post_init__()
    check_labels(self)

  @property
  def labels(self) -> tuple[tuple[str, int], ...]:
    return self.classes or super().labels

  def batch_spec(self) -> dict[str, Field]:
    return {**super().batch_spec(), **label_spec(self.classes)}

  def condition(self, variables: Variables, batch: Batch) -> Conditioning:
    return asked_for(self, super().condition(variables, batch), batch)


def check_labels(system: Any) -> None:
  """Raises UserError for labels that make no model.

  Args:
    system: with `classes`, (attribute, number of its values) pairs in the order of the batch's
      `label`; `label_drop`, the probability of training on none; and `guide`.
  """
  classes, drop = system.classes, system.label_drop
  if not 0.0 <= drop <= 1.0:
    raise UserError(f"model.label_drop={drop} is no probability; use 0 to 1")
  if drop and not classes:
    raise UserError(f"model.label_drop={drop} is of labels, and model.classes names none; leave "
                    "one of them out")
  for name, number in classes:
    if number < 1:
      raise UserError(f"model.classes: '{name}' has {number} values; give it 1 or more")
  theirs = system.guide.labels if system.guide else ()
  if classes and theirs and _pairs(theirs) != _pairs(classes):
    raise UserError(f"components.{GUIDE} reads the labels {_listed(theirs)}, and this model "
                    f"{_listed(classes)}; train both on the same data set")


def rows_of(classes: tuple[tuple[str, int], ...]) -> int:
  """Rows of the table of all attributes' values."""
  return sum(number for _, number in classes)


def label_spec(classes: tuple[tuple[str, int], ...]) -> dict[str, Field]:
  """What a batch must bring."""
  return {LABEL: Field((len(classes),), "int32")} if classes else {}


def trained(system: Any, given: Conditioning, batch: Batch, rng: Array | None) -> Conditioning:
  """Conditioning with a batch's labels; with `rng`, some are dropped as in training."""
  if not system.classes:
    return given
  label = batch[LABEL]
  if rng is not None and system.label_drop:
    rows = (len(label), 1)
    dropped = jax.random.bernoulli(fold_name(rng, "label_drop"), system.label_drop, rows)
    label = jnp.where(dropped, UNSAID, label)
  return _labelled(given, label, system.classes)


def asked_for(system: Any, given: Conditioning, batch: Batch) -> Conditioning:
  """Conditioning of prompts with their labels, and with its null."""
  if not system.classes:
    return given
  null = given.null
  if system.label_drop:
    unsaid = jnp.full_like(batch[LABEL], UNSAID)
    null = _labelled(Conditioning() if null is None else null, unsaid, system.classes)
  elif null is not None:
    null = _labelled(null, batch[LABEL], system.classes)
  return _labelled(given, batch[LABEL], system.classes).replace(null=null)


def _labelled(
  given: Conditioning, label: Array, classes: tuple[tuple[str, int], ...]
) -> Conditioning:
  """Conditioning with the labels' rows in the network's one table, int32 [B, attributes]."""
  first = np.cumsum([0, *(number for _, number in classes[:-1])])
  rows = jnp.where(label >= 0, label + first, UNSAID)
  return given.replace(extra={**given.extra, LABEL: rows})


def _pairs(labels: Any) -> tuple[tuple[str, int], ...]:
  return tuple(map(tuple, labels))


def _listed(labels: Any) -> str:
  return ", ".join(f"{name} ({number})" for name, number in labels)
