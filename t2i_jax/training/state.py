"""Everything that training changes, in one tree."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.base import Batch, System
from t2i_jax.systems.randomness import fold_name


@struct.dataclass
class State:
  """The state that a step takes and returns.

  Nothing random is stored: every draw is a function of (seed, step).

  Attributes:
    step: int32 scalar, steps done.
    params: trained parameters by group, float32.
    ema: their moving averages, for the groups that an export needs.
    optimizer: optax state by player.
    updates: int32, updates done, by player.
    collections: `{collection: {group: tree}}` of trained groups.
    ema_collections: the same that belong to the moving averages, not to the
      parameters themselves: statistics of what averaged networks compute.
    frozen: variables of the groups that components brought. They are stored
      once a run and not in its checkpoints.
  """

  step: jax.Array
  params: dict[str, Any]
  ema: dict[str, Any]
  optimizer: dict[str, Any]
  updates: dict[str, jax.Array]
  collections: dict[str, dict[str, Any]]
  ema_collections: dict[str, dict[str, Any]]
  frozen: dict[str, dict[str, Any]]

  def variables(self, ema: bool = False) -> dict[str, dict[str, Any]]:
    """All variables, as systems take them; with `ema`, averages where they exist."""
    params = {**self.params, **(self.ema if ema else {})}
    averaged = self.ema_collections if ema else {}
    return trees.merge(self.collections, averaged, {"params": params}, self.frozen)


def initialise(
  system: System, seed: int, batch: Batch, frozen: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
  """Variables of the trained groups, `{collection: {group: tree}}`; a pure function.

  Args:
    system: whose `init` makes them.
    seed: of the run.
    batch: the first real batch.
    frozen: variables of the components.
  """
  return trees.merge(system.init(fold_name(jax.random.key(seed), "init"), batch, frozen))


def create(
  system: System,
  optimizers: dict[str, optax.GradientTransformation],
  variables: dict[str, dict[str, Any]],
  frozen: dict[str, dict[str, Any]],
  average: bool,
) -> State:
  """A fresh state; a pure function, to be traced or run under `jit`.

  Args:
    system: whose players are to train.
    optimizers: by player.
    variables: of the trained groups, as from `initialise`.
    frozen: variables of the components.
    average: whether an EMA is kept.
  """
  variables = dict(variables)
  params = variables.pop("params")
  _check_groups(system, params, frozen)
  # Copies: a donated state must not hold one buffer twice.
  copied = lambda groups: jax.tree.map(  # noqa: E731
    jnp.copy, {name: groups[name] for name in system.ema_groups if name in groups}
  )
  averaged = {kind: copied(groups) for kind, groups in variables.items()} if average else {}
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    ema=copied(params) if average else {},
    optimizer={
      player.name: optimizers[player.name].init({g: params[g] for g in player.trains})
      for player in system.players
    },
    updates={player.name: jnp.zeros((), jnp.int32) for player in system.players},
    collections=variables,
    ema_collections={kind: groups for kind, groups in averaged.items() if groups},
    frozen=frozen,
  )


def _check_groups(system: System, params: dict[str, Any], frozen: dict) -> None:
  """Every trained group belongs to exactly one player, and none is frozen too."""
  trained = [name for player in system.players for name in player.trains]
  if sorted(trained) != sorted(params):
    raise UserError(
      f"{type(system).__name__}: the players train {sorted(trained)}, "
      f"but init made the groups {sorted(params)}"
    )
  both = sorted(set(params) & set(frozen.get("params", {})))
  if both:
    raise UserError(f"{type(system).__name__}: groups {both} are both trained and frozen")
