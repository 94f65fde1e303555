"""The contract between a system and the rest of the project.

A system is one method of the literature: a frozen dataclass whose fields are
its config section, which holds no arrays and does no I/O. It says how its
variables are made, which players train them, and what it can do with them
(sample, encode and decode, guide). The loop, the step, checkpoints, exports
and commands know systems by this page only.

Variables are one dictionary `{collection: {group: tree}}`, as Linen lays them
out, with one more level for the group:

  {"params": {"text_encoder": ..., "denoiser": ...}, "batch_stats": {...}}
"""

import abc
import dataclasses
import types
import zlib
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct

from t2i_jax.errors import UserError, unknown

Array = jax.Array
Batch = Mapping[str, Any]
Variables = Mapping[str, Mapping[str, Any]]
GUIDE = "guide"  # the component that steers a sampler
NO_VARIABLES: Variables = types.MappingProxyType({})


@dataclasses.dataclass
class Aux:
  """What a loss hands back beside its scalar.

  Attributes:
    metrics: scalars to log.
    collections: `{collection: {group: tree}}`, the groups that changed; they
      replace the old ones before the next player moves.
  """

  metrics: dict[str, Array] = dataclasses.field(default_factory=dict)
  collections: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


jax.tree_util.register_dataclass(Aux, ["metrics", "collections"], [])

Loss = Callable[[Variables, Batch, Array, Array], tuple[Array, Aux]]


@dataclasses.dataclass(frozen=True)
class Player:
  """One optimizer, the loss it minimises, and the groups it updates.

  Attributes:
    name: its section under `config.players`, and its metrics' prefix.
    trains: parameter groups; every trained group belongs to exactly one player.
    loss: `(variables, batch, rng, step) -> (scalar, Aux)`.
    start: first step at which it moves.
    every: it moves at steps `start`, `start + every`...
    repeats: updates a step, each on its own equal slice of the batch.
    couples_examples: whether an example's loss depends on the others of its
      batch (batch norm, contrastive terms, rolled negatives). "approximate":
      accumulation changes the result a little, and warns; "exact": it would
      compute something else, and is refused.
    shares_forward: whether another player of the step runs most of its forward pass too. Its
      gradients are then computed at every step, and dropped where it does not move: in a branch
      of its own the compiler could not merge the two.
    custom_gradients: `(variables, batch, rng, step) -> (gradients by group,
      Aux)` for a player whose gradient is not that of one scalar (VQGAN's
      adaptive weight). The update stays with the step.
  """

  name: str
  trains: tuple[str, ...]
  loss: Loss
  start: int = 0
  every: int = 1
  repeats: int = 1
  couples_examples: Literal["no", "approximate", "exact"] = "no"
  shares_forward: bool = False
  custom_gradients: Callable[..., tuple[dict[str, Any], Aux]] | None = None

  def gradients(
    self, variables: Variables, batch: Batch, rng: Array, step: Array
  ) -> tuple[dict[str, Any], Aux]:
    """Gradients of the player's loss by group, and its Aux with `loss` in it."""
    if self.custom_gradients is not None:
      return self.custom_gradients(variables, batch, rng, step)

    def loss_of(trained):
      return self.loss(with_params(variables, trained), batch, rng, step)

    trained = {name: variables["params"][name] for name in self.trains}
    (loss, aux), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
    return gradients, dataclasses.replace(aux, metrics={"loss": loss, **aux.metrics})

  @property
  def always(self) -> bool:
    return self.start == 0 and self.every == 1

  def moves(self, step: Array) -> Array:
    """Whether the player updates at `step`."""
    return (step >= self.start) & ((step - self.start) % self.every == 0)


@struct.dataclass
class Conditioning:
  """What a text encoder, or a cache of one, hands to a system.

  Attributes:
    sequence: [B, L, D] features of the tokens, or None.
    mask: bool [B, L], the tokens that count.
    pooled: [B, P], one vector a caption, or None.
    extra: labels, images, masks, neighbours, sizes, by name.
    null: the same with no caption, for classifier-free guidance, or None.
  """

  sequence: Array | None = None
  mask: Array | None = None
  pooled: Array | None = None
  extra: dict[str, Array] = struct.field(default_factory=dict)
  null: "Conditioning | None" = None


@dataclasses.dataclass(frozen=True)
class Field:
  """Shape (without the batch axis) and type of one entry of a batch."""

  shape: tuple[int, ...]
  dtype: str


class System(abc.ABC):
  """One method; see the module's docstring.

  Every system has `text`, the `TextConditioner` that it is built with.

  Class attributes:
    Options: a `struct.dataclass` of the sampling options with their defaults,
      static fields marked `pytree_node=False`; None without a sampler.
    ema_groups: the trained groups that an export needs, which EMA covers.
    reads_text: whether batches and exports have tokenizers.
    text_of: the component whose text, tokenizers and sampling options the system has in place of
      its config's; "" for none.
  """

  Options: ClassVar[type | None] = None
  reads_text: ClassVar[bool] = True
  text_of: ClassVar[str] = ""

  @property
  def labels(self) -> tuple[tuple[str, int], ...]:
    """(attribute, number of its values) pairs that `condition` reads as a batch's `label`."""
    return ()

  @property
  @abc.abstractmethod
  def players(self) -> tuple[Player, ...]:
    """The players, in the order in which they move."""

  @property
  @abc.abstractmethod
  def ema_groups(self) -> tuple[str, ...]:
    """Trained groups that an export needs."""

  @property
  def frozen_groups(self) -> tuple[str, ...]:
    """Groups that components bring, that no player trains."""
    return ()

  @abc.abstractmethod
  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    """Fresh variables of the trained groups, from the first real batch.

    `frozen` holds the variables of the components, which a data-dependent
    initialisation may need.
    """

  @abc.abstractmethod
  def batch_spec(self) -> dict[str, Field]:
    """The batch entries that training reads, by '/'-joined path."""

  def joint_losses(
    self, variables: Variables, batch: Batch, rng: Array, step: Array
  ) -> tuple[dict[str, Array], Aux]:
    """Every player's loss from one forward pass; only with `simultaneous`."""
    raise UserError(f"{type(self).__name__} has no simultaneous play; set play=alternating")

  @property
  def simultaneous(self) -> bool:
    """Whether all players move from the same point, through one `jax.vjp`."""
    return False


@runtime_checkable
class Sampler(Protocol):
  """A system that draws pictures."""

  Options: ClassVar[type]

  def condition(self, variables: Variables, batch: Batch) -> Conditioning:
    """Encodes `batch["text"]`; a program of its own, null included."""

  def sample(
    self, variables: Variables, conditioning: Conditioning, keys: Array, options: Any
  ) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1], or a `Finisher`'s latents; one key [B] a picture."""


@runtime_checkable
class Editor(Protocol):
  """A sampler that can begin with a picture.

  `condition` then reads of the batch the `image`, uint8 [B, H, W, 3], and, where some of it is to
  stay, `known`, bool [B, H, W, 1]; and its options have `strength`, `height` and `width`.
  """

  def encoded(self, variables: Variables, images: Array) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1] as what is sampled."""


@runtime_checkable
class ManyShapes(Protocol):
  """A system whose pictures need not be squares: data sets may have buckets, drawings a size."""

  def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
    """Of what is modelled of such a picture, (h, w, c); UserError for one that it does not take."""


@runtime_checkable
class Finisher(Protocol):
  """A sampler whose `sample` gives latents, not yet pictures.

  A second program makes pictures of them, so that only one of the two needs the first stage, which
  may be off the devices until then.
  """

  def finish(self, variables: Variables, drawn: Array) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1] of what `sample` gave, [B, ...]."""


@runtime_checkable
class FirstStage(Protocol):
  """An autoencoder whose latents another system models.

  Attributes:
    scale, shift: published latents z are (z - shift) * scale where they are modelled; a scale of 0
      is not given, and is measured.
  """

  scale: float
  shift: float

  def encode(self, variables: Variables, images: Array) -> Array:
    """[B, H, W, 3] in [-1, 1] -> moments [B, h, w, 2c]: mean, then log-variance in [-30, 20]."""

  def decode(self, variables: Variables, latents: Array) -> Array:
    """Latents [B, h, w, c], neither shifted nor scaled -> pictures [B, H, W, 3], about [-1, 1]."""

  def latent_shape(self, resolution: int) -> tuple[int, int, int]:
    """(h, w, c) of square pictures; UserError for a side that does not divide."""


@runtime_checkable
class Perceptual(Protocol):
  """A trained network in whose features pictures are compared.

  Attributes:
    name: how every loss and score that uses it is called, such as "lpips".
  """

  name: str

  def distance(self, variables: Variables, a: Array, b: Array) -> Array:
    """Of pictures [B, H, W, 3] in [-1, 1], [B]; 0 for equal ones."""


@runtime_checkable
class TextEncoder(Protocol):
  """A system that turns token ids into conditioning."""

  def encode(self, variables: Variables, text: Mapping[str, Array]) -> Conditioning:
    """Of `ids` and `mask` [B, L]."""

  def null_text(self) -> Mapping[str, Any]:
    """`ids` and `mask` [L] of the empty caption; L is what the encoder takes."""


@runtime_checkable
class Guide(Protocol):
  """A system whose log-probability steers another's sampler.

  Attributes:
    process: of the noised pictures that it was trained on; the other's is to be the same.
  """

  process: Any

  def read(self, variables: Variables, batch: Batch) -> dict[str, Array]:
    """What it needs of prompts, for `Conditioning.extra`.

    `batch` has their `label`, as far as they have `labels`, and, of guides that read text, `ids`
    and `mask` by the guide's own tokenizer as `text`.
    """

  def log_prob(
    self, variables: Variables, x_t: Array, t: Array, conditioning: Conditioning
  ) -> Array:
    """Of noised pictures [B, ...] at times [B] of the process, [B]; the times may be fractional."""


@runtime_checkable
class Evaluated(Protocol):
  """A system with a loss to report on held-out batches."""

  def evaluation_loss(
    self, variables: Variables, batch: Batch, rng: Array
  ) -> dict[str, Array]:
    """Per-example metrics [B], which the caller averages over valid rows."""


def check_positive(section: str, values: Any, *names: str) -> None:
  """Raises UserError where one of these attributes, a number or numbers, is not at least 1."""
  for name in names:
    value = getattr(values, name)
    if value == () or min(value if isinstance(value, tuple) else (value,)) < 1:
      raise UserError(f"{section}.{name}={value}: use 1 or more")


def check_levels(values: Any, always: tuple[int, ...] = (), positions: bool = False) -> None:
  """Raises UserError unless levels divide into groups, and those that attend into heads.

  Args:
    values: with `channels`, `multipliers`, `groups` and `attention_levels`; of attention with
      several heads also `heads`, their number, or, without it or where it is 0, `head_channels`.
    always: levels that attend besides.
    positions: whether attention has two-dimensional positions, which come in fours.
  """
  for multiplier in values.multipliers:
    if values.channels * multiplier % values.groups:
      raise UserError(
        f"model.groups={values.groups} does not divide the {values.channels * multiplier} channels "
        "of a level; change one of them"
      )
  for level in values.attention_levels:
    if not 0 <= level < len(values.multipliers):
      raise UserError(
        f"model.attention_levels={values.attention_levels} names level {level}, "
        f"of levels 0 to {len(values.multipliers) - 1}"
      )
  for level in {*values.attention_levels, *always}:
    width = int(values.channels * values.multipliers[level])
    name = "heads" if getattr(values, "heads", 0) else "head_channels"
    parts = getattr(values, name, 1)
    if width % (parts if name == "heads" else min(parts, width)) or (positions and width % 4):
      raise UserError(
        f"the {width} channels of level {level} attend, and do not divide by "
        f"model.{name}={parts}{' or, for positions, by 4' * positions}; change one of them"
      )


def require(system: System, capability: type, what: str) -> None:
  """Raises UserError unless `system` has the capability that `what` needs."""
  if not isinstance(system, capability):
    raise UserError(
      f"{what} needs a system with {capability.__name__}; {type(system).__name__} has none"
    )


def group(variables: Variables, name: str) -> dict[str, Any]:
  """One group's variables, as a Linen module's `apply` takes them."""
  return {kind: groups[name] for kind, groups in variables.items() if name in groups}


def as_group(name: str, variables: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """A Linen module's variables as those of the group `name`."""
  return {kind: {name: tree} for kind, tree in variables.items()}


def merge(*parts: Variables) -> dict[str, dict[str, Any]]:
  """Variables of several groups in one dictionary; later parts win by group."""
  merged: dict[str, dict[str, Any]] = {}
  for part in parts:
    for kind, groups in part.items():
      merged[kind] = {**merged.get(kind, {}), **groups}
  return merged


def split(
  variables: Variables, names: tuple[str, ...]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
  """The variables of the groups that are named, and those of the others."""
  parts = []
  for named in (True, False):
    kept = {
      kind: {name: tree for name, tree in groups.items() if (name in names) == named}
      for kind, groups in variables.items()
    }
    parts.append({kind: groups for kind, groups in kept.items() if groups})
  return parts[0], parts[1]


def with_params(variables: Variables, params: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """`variables` with the parameters of some groups replaced."""
  return merge(variables, {"params": params})


def fold_name(rng: Array, name: str) -> Array:
  """A key for the draw called `name`; the same name gives the same draw."""
  return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def picture_keys(seed: Array | int, indices: Array) -> Array:
  """Key i of a sampling call, `fold_in(seed, picture index)`: keys [B].

  A picture thus depends on its seed and index, not on the batch around it.
  """
  base = jax.random.key(seed)
  return jax.vmap(lambda i: jax.random.fold_in(base, i))(indices)


def normalize_images(images: Array) -> Array:
  """uint8 [B, H, W, 3] to float32 in [-1, 1], on the device."""
  return images.astype(jnp.float32) / 127.5 - 1.0


def make_options(system: type[System] | System, overrides: Mapping[str, Any]) -> Any:
  """The system's sampling options with `overrides`.

  Raises:
    UserError: for an option that the system does not have.
  """
  if system.Options is None:
    name = system.__name__ if isinstance(system, type) else type(system).__name__
    raise UserError(f"{name} draws no pictures, so it takes no sampling options")
  valid = {field.name for field in dataclasses.fields(system.Options)}
  for name in overrides:
    if name not in valid:
      raise unknown("sampling option", name, valid)
    value = overrides[name]
    if isinstance(value, float) and not abs(value) <= float(jnp.finfo(jnp.float32).max):
      raise UserError(f"sampling option {name}={value} is no number that a device can hold")
  return system.Options(**overrides)
