"""A classifier of pictures' attributes, whose features compare pictures.

It stands in for LPIPS's network, and for the one of the Frechet distance, where
their public files are not at hand; what uses it is called "feature_net".
"""

import dataclasses
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import optax

from t2i_jax.errors import UserError
from t2i_jax.networks.feature_net import FeatureNet as Network
from t2i_jax.networks.feature_net import Features
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Aux, Batch, Field, Player
from t2i_jax.systems.checks import check_positive
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.perceptual.features import squared_difference
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables

NETWORK = "network"


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNet(base.System):
  """See the module's docstring.

  Attributes:
    text: of the config; nothing of it is used.
    resolution: side of the pictures that it is trained on; it takes others as well.
    classes: (attribute, number of its values) pairs, in the order of the batch's `label`.
    channels, groups, grid, width: of the network.
    dtype: type of the computation.
  """

  text: TextConditioner
  resolution: int = 64
  classes: tuple[tuple[str, int], ...] = ()
  channels: tuple[int, ...] = (16, 32, 64, 64)
  groups: int = 8
  grid: int = 4
  width: int = 128
  dtype: Any = jnp.float32

  name = "feature_net"
  reads_text = False
  ema_groups = (NETWORK,)

  def __post_init__(self):
    check_positive(
      "model", self, "resolution", "channels", "groups", "grid", "width"
    )
    if not self.classes:
      raise UserError("feature_net learns a data set's labels, and model.classes names none; use a "
                      "data set that has some, such as scenes")
    for channels in self.channels:
      if channels % self.groups:
        raise UserError(f"model.groups={self.groups} does not divide the {channels} channels of a "
                        "level; change one of them")
    self._check_side(self.resolution, f"model.resolution={self.resolution}")

  def _check_side(self, side: int, what: str) -> None:
    step = self.grid * 2 ** (len(self.channels) - 1)
    if side % step:
      raise UserError(f"{what} does not divide by {step} (model.grid times 2 for each of "
                      "model.channels but the first); change one of them")

  @cached_property
  def network(self) -> Network:
    return Network(
      tuple(number for _, number in self.classes), self.channels, self.groups, self.grid,
      self.width, self.dtype,
    )  # fmt: skip

  @property
  def players(self) -> tuple[Player, ...]:
    return (Player("classifier", (NETWORK,), self.loss),)

  def batch_spec(self) -> dict[str, Field]:
    return {
      "image": Field((self.resolution, self.resolution, 3), "uint8"),
      "label": Field((len(self.classes),), "int32"),
    }

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    image = normalize_images(batch["image"][:1])
    return trees.as_group(NETWORK, self.network.init(fold_name(rng, NETWORK), image))

  def loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """The sum of the attributes' cross-entropies."""
    values = {k: jnp.mean(v) for k, v in self._terms(variables, batch).items()}
    return values["cross_entropy"], Aux(values)

  def evaluation_loss(self, variables: Variables, batch: Batch, rng: Array) -> dict[str, Array]:
    """The cross-entropy in nats, and by attribute and for all together whether it is right [B]."""
    return self._terms(variables, batch)

  def distance(self, variables: Variables, a: Array, b: Array) -> Array:
    """The sum over levels of squared differences of unit features, [B].

    As LPIPS (Zhang et al. 2018, equation 1) without learned weights.
    """
    ours, theirs = self._apply(variables, a).levels, self._apply(variables, b).levels
    return sum(map(squared_difference, ours, theirs))

  def features(self, variables: Variables, images: Array) -> Array:
    """What the attributes are read of, float32 [B, F], of pictures [B, H, W, 3] in [-1, 1]."""
    return self._apply(variables, images).vector

  def _apply(self, variables: Variables, images: Array) -> Features:
    for side in images.shape[1:3]:
      self._check_side(side, f"feature_net: a side of {side} pixels")
    return self.network.apply(trees.group(variables, NETWORK), images)

  def _terms(self, variables: Variables, batch: Batch) -> dict[str, Array]:
    logits = self._apply(variables, normalize_images(batch["image"])).logits
    labels = jnp.moveaxis(batch["label"], 1, 0)
    costs = map(optax.softmax_cross_entropy_with_integer_labels, logits, labels)
    right = {
      name: jnp.argmax(row, axis=-1) == label
      for (name, _), row, label in zip(self.classes, logits, labels, strict=True)
    }
    right["all"] = jnp.all(jnp.stack([*right.values()]), axis=0)
    accuracy = {f"accuracy/{name}": value.astype(jnp.float32) for name, value in right.items()}
    return {"cross_entropy": sum(costs), **accuracy}
