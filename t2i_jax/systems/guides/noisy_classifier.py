"""A classifier of noised pictures, which makes a denoiser obey a label.

Dhariwal and Nichol 2021, section 4 and appendix H: it is trained on pictures at all times of the
denoiser's process, which a classifier of clean pictures never saw. Of data whose pictures have
several attributes it has logits for each.
"""

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from t2i_jax.diffusion.schedules import make_process
from t2i_jax.diffusion.timesteps import stratified
from t2i_jax.errors import UserError, unknown
from t2i_jax.networks.encoder_unet import POOLS, EncoderUNet
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Aux, Batch, Conditioning, Field, Player
from t2i_jax.systems.checks import check_levels, check_positive
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.guides.times import by_quarter
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables

CLASSIFIER = "classifier"
UNSAID = -1  # a label that is not known, or not wanted


@dataclasses.dataclass(frozen=True, eq=False)
class NoisyClassifier(base.System):
  """See the module's docstring.

  Attributes:
    text: of the config; nothing of it is used.
    resolution: side of the pictures, in pixels.
    classes: (attribute, number of its values) pairs, in the order of the batch's `label`.
    schedule ... sigma_max: of the process, as of the denoiser that it is to guide.
    channels ... remat, pool, patch: of the `EncoderUNet`.
    dtype: type of the computation.
  """

  text: TextConditioner
  resolution: int = 64
  classes: tuple[tuple[str, int], ...] = ()
  schedule: str = "linear"
  steps: int = 1000
  channels: int = 128
  multipliers: tuple[float, ...] = (1, 2, 3, 4)
  blocks: int = 2
  attention: str = "block"
  attention_levels: tuple[int, ...] = (1, 2, 3)
  head_channels: int = 64
  groups: int = 32
  epsilon: float = 1e-5
  scale_shift: bool = True
  dropout: float = 0.0
  block_resample: bool = True
  remat: bool = False
  pool: str = "attention"
  patch: int = 1
  dtype: Any = jnp.float32

  reads_text = False
  ema_groups = (CLASSIFIER,)

  def __post_init__(self):
    check_positive(
      "model", self, "resolution", "channels", "blocks", "head_channels", "groups", "patch"
    )
    if not self.classes:
      raise UserError("noisy_classifier learns a data set's labels, and model.classes names none; "
                      "use a data set that has some, such as scenes")
    if self.pool not in POOLS:
      raise unknown("model.pool", self.pool, POOLS)
    coarsest = self.patch * 2 ** (len(self.multipliers) - 1)
    if self.resolution % coarsest:
      raise UserError(f"model.resolution={self.resolution} does not divide by {coarsest} "
                      "(model.patch times 2 for each level but the first); change one of them")
    check_levels(self, (len(self.multipliers) - 1,))
    self.process  # noqa: B018

  @cached_property
  def process(self):
    return make_process(self.schedule, self.steps)

  @cached_property
  def network(self) -> EncoderUNet:
    names = {field.name for field in dataclasses.fields(EncoderUNet)} - {"parent", "name"}
    given = {name: getattr(self, name) for name in names if hasattr(self, name)}
    return EncoderUNet(**{**given, "classes": 0}, out_channels=sum(n for _, n in self.classes))

  @property
  def labels(self) -> tuple[tuple[str, int], ...]:
    return self.classes

  @property
  def players(self) -> tuple[Player, ...]:
    return (Player(CLASSIFIER, self.ema_groups, self.loss),)

  def batch_spec(self) -> dict[str, Field]:
    return {
      "image": Field((self.resolution, self.resolution, 3), "uint8"),
      "label": Field((len(self.classes),), "int32"),
    }

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    x = normalize_images(batch["image"][:1])
    fresh = self.network.init(fold_name(rng, CLASSIFIER), x, jnp.zeros(1))
    return trees.as_group(CLASSIFIER, fresh)

  def loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """The sum of the attributes' cross-entropies; labels that are unsaid count nothing."""
    terms, u = self._terms(variables, batch, rng, train=True)
    values = {name: jnp.mean(value) for name, value in terms.items()}
    values |= by_quarter("accuracy", terms["accuracy/all"], u)
    return values["cross_entropy"], Aux(values)

  def evaluation_loss(self, variables: Variables, batch: Batch, rng: Array) -> dict[str, Array]:
    """The cross-entropy in nats, and by attribute and for all together whether it is right [B].

    Each picture is noised at a time of its own.
    """
    return self._terms(variables, batch, rng, train=False)[0]

  def read(self, variables: Variables, batch: Batch) -> dict[str, Array]:
    """The labels of prompts."""
    return {"label": batch["label"]}

  def log_prob(
    self, variables: Variables, x_t: Array, t: Array, conditioning: Conditioning
  ) -> Array:
    """The sum over attributes of log p(label | x_t), [B].

    Args:
      variables: of this system.
      x_t: noised pictures [B, H, W, 3].
      t: [B], times of the process; they may be fractional.
      conditioning: with `label`, int32 [B, attributes]; -1 counts nothing.
    """
    logits = self._logits(variables, x_t, t, train=False)
    return -sum(self._costs(logits, conditioning.extra["label"]))

  def _terms(
    self, variables: Variables, batch: Batch, rng: Array, train: bool
  ) -> tuple[dict[str, Array], Array]:
    """Costs and hits of each example [B], and where in [0, 1) its time lies."""
    x_0 = normalize_images(batch["image"])
    u = stratified(fold_name(rng, "time"), len(x_0))
    t = self.process.time(u)
    noise = jax.random.normal(fold_name(rng, "noise"), x_0.shape)
    logits = self._logits(
      variables, self.process.corrupt(x_0, noise, t), t, train=train,
      rngs={"dropout": fold_name(rng, "dropout")},
    )
    found = {
      name: (jnp.argmax(row, axis=-1) == label) | (label == UNSAID)
      for (name, _), row, label in zip(self.classes, logits, batch["label"].T, strict=True)
    }  # fmt: skip
    found["all"] = jnp.all(jnp.stack([*found.values()]), axis=0)
    accuracy = {f"accuracy/{name}": value.astype(jnp.float32) for name, value in found.items()}
    return {"cross_entropy": sum(self._costs(logits, batch["label"])), **accuracy}, u

  def _logits(self, variables: Variables, x: Array, t: Array, **kwargs: Any) -> list[Array]:
    """[B, values] of each attribute."""
    logits = self.network.apply(
      trees.group(variables, CLASSIFIER), x, self.process.embedded(t), **kwargs
    )
    ends = [sum(n for _, n in self.classes[: i + 1]) for i in range(len(self.classes) - 1)]
    return jnp.split(logits, ends, axis=-1)

  def _costs(self, logits: list[Array], labels: Array) -> list[Array]:
    """Cross-entropies [B] of each attribute."""
    costs = []
    for row, label in zip(logits, labels.T, strict=True):
      chosen = jnp.maximum(label, 0)[:, None]
      log_p = jnp.take_along_axis(jax.nn.log_softmax(row), chosen, axis=-1)[:, 0]
      costs.append(jnp.where(label == UNSAID, 0.0, -log_p))
    return costs
