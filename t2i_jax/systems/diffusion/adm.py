"""The ablated diffusion model, conditioned on labels, for guidance by a classifier.

Dhariwal and Nichol 2021 (Diffusion Models Beat GANs on Image Synthesis): the U-Net of section 3,
trained with the learned variances of Nichol and Dhariwal 2021 (Improved Denoising Diffusion
Probabilistic Models, section 3.1). Its guide is that of section 4, for which `noisy_classifier` is
a system: the ancestral solver shifts its mean along the classifier's gradient (algorithm 1), the
deterministic ones shift the noise (algorithm 2).
"""

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.networks.unet import UNet
from t2i_jax.systems import base
from t2i_jax.systems.base import GUIDE, Array, Batch, Conditioning, Field, Variables
from t2i_jax.systems.diffusion.ddpm import DDPM
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.systems.diffusion.unet_options import make_unet

LABEL = "label"
UNSAID = -1  # a label that the network is not told


@dataclasses.dataclass(frozen=True, eq=False)
class ADM(DDPM):
  """See the module's docstring.

  Attributes (beside those of `DDPM`):
    classes: (attribute, number of its values) pairs, in the order of the batch's `label`, whose
      embeddings are added up; () for a model without labels, which only a guide makes obey.
    label_drop: probability of training on no label (Ho and Salimans 2022), so that there is
      something for `guidance` to lead away from; 0 for the published models.
  """

  classes: tuple[tuple[str, int], ...] = ()
  label_drop: float = 0.0
  learned_variance: bool = True
  channels: int = 192
  multipliers: tuple[float, ...] = (1, 2, 3, 4)
  blocks: int = 3
  attention: str = "block"
  attention_levels: tuple[int, ...] = (1, 2, 3)
  epsilon: float = 1e-5
  block_resample: bool = True

  def __post_init__(self):
    super().__post_init__()
    if not 0.0 <= self.label_drop <= 1.0:
      raise UserError(f"model.label_drop={self.label_drop} is no probability; use 0 to 1")
    if self.label_drop and not self.classes:
      raise UserError(f"model.label_drop={self.label_drop} is of labels, and model.classes names "
                      "none; leave one of them out")
    for name, number in self.classes:
      if number < 1:
        raise UserError(f"model.classes: '{name}' has {number} values; give it 1 or more")
    theirs = self.guide.labels if self.guide else ()
    if self.classes and theirs and _pairs(theirs) != _pairs(self.classes):
      raise UserError(f"components.{GUIDE} reads the labels {_listed(theirs)}, and this model "
                      f"{_listed(self.classes)}; train both on the same data set")

  @property
  def labels(self) -> tuple[tuple[str, int], ...]:
    return self.classes or super().labels

  @cached_property
  def network(self) -> UNet:
    return make_unet(self, 3 * self.outputs, classes=sum(number for _, number in self.classes))

  def batch_spec(self) -> dict[str, Field]:
    labels = {LABEL: Field((len(self.classes),), "int32")} if self.classes else {}
    return {**super().batch_spec(), **labels}

  def init_denoiser(self, rng: Array, x: Array, given: Conditioning) -> Variables:
    return self.network.init(rng, x, jnp.zeros(len(x), jnp.int32), **_arguments(given))

  def output(
    self, variables: Variables, x: Array, t: Array, given: Conditioning, **kwargs: Any
  ) -> Array:
    own = base.group(variables, DENOISER)
    return self.network.apply(own, x, t, **_arguments(given), **kwargs)

  def reading(
    self, variables: Variables, batch: Batch, rng: Array | None
  ) -> tuple[Conditioning, Array | None]:
    given, drafted = super().reading(variables, batch, rng)
    if not self.classes:
      return given, drafted
    label = batch[LABEL]
    if rng is not None and self.label_drop:
      rows = (len(label), 1)
      dropped = jax.random.bernoulli(base.fold_name(rng, "label_drop"), self.label_drop, rows)
      label = jnp.where(dropped, UNSAID, label)
    return self._labelled(given, label), drafted

  def condition(self, variables: Variables, batch: Batch) -> Conditioning:
    given = super().condition(variables, batch)
    if not self.classes:
      return given
    null = given.null
    if self.label_drop:
      unsaid = jnp.full_like(batch[LABEL], UNSAID)
      null = self._labelled(Conditioning() if null is None else null, unsaid)
    elif null is not None:
      null = self._labelled(null, batch[LABEL])
    return self._labelled(given, batch[LABEL]).replace(null=null)

  def _labelled(self, given: Conditioning, label: Array) -> Conditioning:
    """Conditioning with the labels' rows in the network's one table, int32 [B, attributes]."""
    first = np.cumsum([0, *(number for _, number in self.classes[:-1])])
    rows = jnp.where(label >= 0, label + first, UNSAID)
    return given.replace(extra={**given.extra, LABEL: rows})


def _arguments(given: Conditioning) -> dict[str, Array | None]:
  """What the U-Net reads of the conditioning."""
  return {
    "context": given.sequence, "mask": given.mask, "pooled": given.pooled,
    "layout": given.extra.get("layout"), "label": given.extra.get(LABEL),
  }


def _pairs(labels: Any) -> tuple[tuple[str, int], ...]:
  return tuple(map(tuple, labels))


def _listed(labels: Any) -> str:
  return ", ".join(f"{name} ({number})" for name, number in labels)
