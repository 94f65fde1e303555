"""The training step: every player moves, in order. It knows no system."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t2i_jax.errors import UserError
from t2i_jax.parallel.flops import every
from t2i_jax.systems import trees
from t2i_jax.systems.base import Aux, Batch, Player, System
from t2i_jax.training.state import State

# Steps between two forward passes of the averaged networks, for statistics of their own.
STATISTICS_EVERY = 4

Array = jax.Array
Metrics = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class StepOptions:
  """What the step needs to know beside the system.

  Attributes:
    seed: of the run; the step's key is `fold_in(seed, step)`.
    accumulate: microbatches a batch (or a repeat's slice of it) is cut into.
    ema_decay: of the moving average; 0 keeps none.
    ema_warmup: let the decay grow as (1 + n) / (10 + n) until it reaches
      `ema_decay`, n being the player's updates, so that the average forgets
      the initial parameters.
  """

  seed: int = 0
  accumulate: int = 1
  ema_decay: float = 0.9999
  ema_warmup: bool = True


def make_step(
  system: System,
  optimizers: Mapping[str, optax.GradientTransformation],
  options: StepOptions,
) -> Callable[[State, Batch], tuple[State, Metrics]]:
  """The pure function `(state, batch) -> (state, metrics)`.

  Metrics are scalars named `player/metric`, NaN where the player did not move,
  and the flag `finite`: whether every loss, gradient norm and updated
  collection of the step is.
  """
  check_accumulation(system, options.accumulate)

  def step(state: State, batch: Batch) -> tuple[State, Metrics]:
    rng = jax.random.fold_in(jax.random.key(options.seed), state.step)
    move = _simultaneous if system.simultaneous else _alternating
    state, metrics = move(system, optimizers, options, state, batch, rng)
    state = _with_statistics(system, options, state, batch, rng)
    metrics["finite"] = jnp.all(
      jnp.stack([v for k, v in metrics.items() if k.endswith("/finite")])
    )
    return state.replace(step=state.step + 1), metrics

  return step


def check_accumulation(system: System, accumulate: int) -> list[str]:
  """Warnings about players whose loss mixes examples.

  Raises:
    UserError: where accumulation would compute something else than the loss.
  """
  warnings = []
  for player in system.players:
    if accumulate > 1 and player.couples_examples == "exact":
      raise UserError(
        f"train.accumulate={accumulate}: the {player.name}'s loss compares the examples of a "
        "batch, which microbatches would change; set train.accumulate=1"
      )
    if accumulate > 1 and player.couples_examples == "approximate":
      warnings.append(
        f"train.accumulate={accumulate}: the {player.name}'s loss mixes examples (such as batch "
        "statistics), so it sees microbatches as small batches"
      )
  return warnings


def check_division(system: System, batch_size: int, accumulate: int, shards: int = 1) -> None:
  """Raises UserError unless a batch divides into every player's repeats and microbatches.

  Args:
    system: whose players they are.
    batch_size, accumulate: of the config.
    shards: parts into which the devices split each of them.
  """
  for player in system.players:
    parts = player.repeats * accumulate
    repeats = f" in each of the {player.name}'s {player.repeats} updates"
    cut = f"train.accumulate={accumulate} microbatches{repeats if player.repeats > 1 else ''}"
    if batch_size % (parts * shards):
      over = f", each over {shards} devices" if shards > 1 else ""
      raise UserError(
        f"train.batch_size={batch_size} does not divide into {cut}{over}; use a multiple of "
        f"{parts * shards}"
      )
    if player.couples_examples != "no" and batch_size == parts:
      raise UserError(
        f"the {player.name}'s loss compares the examples of a batch, and there is one in each of "
        f"{cut}; use a larger train.batch_size"
      )


def _alternating(system, optimizers, options, state, batch, rng):
  """Each player sees what the players before it left."""
  metrics: Metrics = {}
  for player in system.players:

    def move(state: State, player=player) -> tuple[State, Metrics]:
      return _move(player, optimizers[player.name], options, state, batch, rng)

    if player.always:
      state, measured = move(state)
    elif player.shares_forward:
      state, measured = _kept(player.moves(state.step), move, state)
    else:
      state, measured = every(player.every, player.moves(state.step), move, _stay(move), state)
    metrics.update({f"{player.name}/{k}": v for k, v in measured.items()})
  return state, metrics


def _kept(due: Array, move, state: State) -> tuple[State, Metrics]:
  """A player's move outside of any branch, kept where it is due."""
  moved, measured = move(state)
  stayed, absent = _stay(move)(state)
  choose = lambda new, old: new if new is old else jnp.where(due, new, old)  # noqa: E731
  return jax.tree.map(choose, moved, stayed), jax.tree.map(choose, measured, absent)


def _stay(move):
  """The branch in which a player does not move: same state, no measurement."""

  def stay(state: State) -> tuple[State, Metrics]:
    _, shapes = jax.eval_shape(move, state)
    return state, {
      k: jnp.ones(v.shape, bool) if v.dtype == bool else jnp.full(v.shape, jnp.nan, v.dtype)
      for k, v in shapes.items()
    }

  return stay


def _move(
  player: Player, optimizer, options: StepOptions, state: State, batch: Batch, rng: Array
) -> tuple[State, Metrics]:
  """All of one player's updates in a step."""
  measured = []
  for repeat in range(player.repeats):
    part = _slice(batch, player.repeats, repeat, f"the {player.name}'s repeats")
    key = jax.random.fold_in(rng, repeat) if player.repeats > 1 else rng
    gradients, aux = _accumulated(player, options.accumulate, state, part, key)
    state, metrics = _update(player, optimizer, options, state, gradients, aux)
    measured.append(metrics)
  merged = jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), axis=0), *measured)
  return state, {k: v == 1 if k == "finite" else v for k, v in merged.items()}


def _accumulated(
  player: Player, parts: int, state: State, batch: Batch, rng: Array
) -> tuple[dict[str, Any], Aux]:
  """Gradients averaged over microbatches, collections threaded through them."""
  variables = state.variables()
  if parts == 1:
    return player.gradients(variables, batch, rng, state.step)
  stacked = jax.tree.map(lambda x: _interleaved(x, parts, "train.accumulate"), dict(batch))
  first = jax.tree.map(lambda x: x[0], stacked)
  shapes = jax.eval_shape(player.gradients, variables, first, rng, state.step)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1].metrics))
  held = {
    kind: {name: variables[kind][name] for name in groups}
    for kind, groups in shapes[1].collections.items()
  }

  def body(carry, inputs):
    (gradients, metrics), collections = carry
    i, part = inputs
    new, aux = player.gradients(
      trees.merge(variables, collections), part, jax.random.fold_in(rng, i), state.step
    )
    total = jax.tree.map(jnp.add, (gradients, metrics), (new, aux.metrics))
    return (total, aux.collections), None

  (total, collections), _ = jax.lax.scan(body, (zeros, held), (jnp.arange(parts), stacked))
  gradients, metrics = jax.tree.map(lambda x: x / parts, total)
  return gradients, Aux(metrics, collections)


def _update(
  player: Player, optimizer, options: StepOptions, state: State, gradients, aux: Aux
) -> tuple[State, Metrics]:
  """One optimizer update of one player, its EMA, and what to log of it."""
  trained = {name: state.params[name] for name in player.trains}
  updates, optimizer_state = optimizer.update(gradients, state.optimizer[player.name], trained)
  trained = optax.apply_updates(trained, updates)
  count = state.updates[player.name]
  norm = optax.tree.norm(gradients)
  finite = jnp.isfinite(norm) & jnp.isfinite(aux.metrics["loss"])
  for leaf in jax.tree.leaves(aux.collections):
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      finite &= jnp.all(jnp.isfinite(leaf))
  state = state.replace(
    params={**state.params, **trained},
    ema={**state.ema, **_averaged(state.ema, trained, count, options)},
    optimizer={**state.optimizer, player.name: optimizer_state},
    updates={**state.updates, player.name: count + 1},
    collections=trees.merge(state.collections, aux.collections),
  )
  return state, {**aux.metrics, "gradient_norm": norm, "finite": finite}


def _averaged(ema, trained, count: Array, options: StepOptions) -> dict[str, Any]:
  decay = jnp.float32(options.ema_decay)
  if options.ema_warmup:
    decay = jnp.minimum(decay, (1.0 + count) / (10.0 + count))
  groups = {name: tree for name, tree in trained.items() if name in ema}
  return jax.tree.map(
    lambda old, new: old + (1.0 - decay) * (new - old), {g: ema[g] for g in groups}, groups
  )


def _with_statistics(
  system: System, options: StepOptions, state: State, batch: Batch, rng: Array
) -> State:
  """Now and then the averaged networks see a batch, for collections that belong to them.

  A running mean of what the networks in training compute is not what their average computes: noise
  that has averaged out of the parameters is still in it (Brock et al. 2019, appendix D, recompute
  the statistics for the same reason). Of the losses only the forward pass up to the collections
  stays in the program.
  """
  if not jax.tree.leaves(state.ema_collections):
    return state

  def see(state: State) -> State:
    part = _slice(batch, options.accumulate, 0, "train.accumulate")
    variables, seen = state.variables(ema=True), state.ema_collections
    if system.simultaneous:
      losses = [system.joint_losses]
    else:
      losses = [player.loss for player in system.players]
    for loss in losses:
      _, aux = loss(variables, part, rng, state.step)
      for kind, groups in aux.collections.items():
        held = {n: tree for n, tree in groups.items() if n in seen.get(kind, {})}
        seen = trees.merge(seen, {kind: held})
    return state.replace(ema_collections=seen)

  due = state.step % STATISTICS_EVERY == 0
  return every(STATISTICS_EVERY, due, see, lambda state: state, state)


def _simultaneous(system, optimizers, options, state, batch, rng):
  """All players move from the same point, their losses from one forward pass.

  The Jacobian of (loss of each player) is pulled back once a player; the
  forward pass is shared.
  """
  if options.accumulate > 1 or any(not p.always or p.repeats > 1 for p in system.players):
    raise UserError(
      "simultaneous play takes one batch whole and all players at every step; "
      "set train.accumulate=1, or play=alternating"
    )
  variables = state.variables()

  def losses_of(params):
    losses, aux = system.joint_losses(
      trees.with_params(variables, params), batch, rng, state.step
    )
    return losses, aux

  losses, pull_back, aux = jax.vjp(losses_of, state.params, has_aux=True)
  metrics: Metrics = {}
  for player in system.players:
    cotangent = {name: jnp.float32(name == player.name) for name in losses}
    (gradients,) = pull_back(cotangent)
    own = Aux({"loss": losses[player.name]}, {})
    state, measured = _update(
      player, optimizers[player.name], options, state,
      {name: gradients[name] for name in player.trains}, own,
    )
    metrics.update({f"{player.name}/{k}": v for k, v in measured.items()})
  metrics.update(aux.metrics)
  collections = jax.tree.leaves(aux.collections)
  metrics["collections/finite"] = jnp.all(
    jnp.stack([jnp.all(jnp.isfinite(x)) for x in collections] or [jnp.bool_(True)])
  )
  return state.replace(collections=trees.merge(state.collections, aux.collections)), metrics


def _slice(batch: Batch, parts: int, index: int, what: str) -> Batch:
  if parts == 1:
    return batch
  return jax.tree.map(lambda x: _interleaved(x, parts, what)[index], dict(batch))


def _interleaved(x: Array, parts: int, what: str) -> Array:
  """[B, ...] -> [parts, B / parts, ...]; part i is rows i, i + parts...

  Taking every parts-th row, not a block, keeps each row on its device when the
  batch is sharded.
  """
  if x.shape[0] % parts:
    raise UserError(f"a batch of {x.shape[0]} does not divide into {parts} parts for {what}")
  return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
