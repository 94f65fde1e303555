"""The contract between a system and the rest of the project.

A system is one method of the literature: a frozen dataclass whose fields are
its config section, which holds no arrays and does no I/O. It says how its
variables are made, which players train them, and what it can do with them
(sample, encode and decode, guide: `systems/capabilities.py`). The loop, the
step, checkpoints, exports and commands know systems by these two pages only.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import jax
from flax import struct

from t2i_jax.errors import UserError
from t2i_jax.systems.trees import NO_VARIABLES, Variables, with_params

Array = jax.Array
Batch = Mapping[str, Any]
GUIDE = "guide"  # the component that steers a sampler


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
