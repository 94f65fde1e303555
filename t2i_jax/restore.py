"""Where a run's state comes from, and how it is stored and read back."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

import t2i_jax
from t2i_jax import assembly, batch_spec, export, workdirs
from t2i_jax.errors import UserError
from t2i_jax.parallel.compiler_flags import options_of
from t2i_jax.parallel.distributed import agree_on
from t2i_jax.parallel.mesh import batch_sharding, make_mesh
from t2i_jax.parallel.sharding import parse_rules, place, put, shardings
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import System
from t2i_jax.text.tokenizer import Tokenizers
from t2i_jax.training import marker
from t2i_jax.training import state as states
from t2i_jax.training.checkpoint import Checkpoints
from t2i_jax.training.optimizers import make_optimizer, unmatched
from t2i_jax.training.state import State
from t2i_jax.training.writers import tell


@dataclasses.dataclass
class Plan:
  """What a state will be, before any of it exists.

  Attributes:
    optimizers: by player.
    shardings: of the state.
    abstract_state: its shapes with their shardings.
    initialise: `(batch, frozen) -> State`, pure.
  """

  optimizers: dict[str, optax.GradientTransformation]
  shardings: State
  abstract_state: State
  initialise: Callable[[Any, Any], State]

  @classmethod
  def make(
    cls, config: ConfigDict, mesh: Mesh, system: System, frozen: Mapping[str, Any], total: int,
    steps_of: Callable[[Any, str], int],
  ) -> "Plan":
    """The state of a config's run of `total` steps on a mesh.

    Raises:
      UserError: for players, optimizers or sharding rules that do not exist.
    """
    batch = batch_spec.abstract_batch(system, config.train.batch_size)
    sections = assembly.player_sections(config, system, steps_of)

    # Its trace is kept for the shapes of the whole state.
    @functools.partial(jax.jit, inline=True)
    def variables(batch, frozen):
      return states.initialise(system, config.seed, batch, frozen)

    shapes = jax.eval_shape(variables, batch, frozen)["params"]
    optimizers = {
      player.name: make_optimizer(
        sections[player.name], _updates(total, player), {g: shapes[g] for g in player.trains}
      )
      for player in system.players
    }

    pairs = {tuple(p) for section in sections.values() for p in section["multipliers"]}
    for pattern in unmatched(sorted(pairs), shapes):
      tell(f"warning: optimizer.multipliers: no parameter's path has '{pattern}' in it")

    def initialise(batch, frozen) -> State:
      made = variables(batch, frozen)
      return states.create(system, optimizers, made, frozen, config.ema.decay > 0)

    abstract = jax.eval_shape(initialise, batch, frozen)
    placed = shardings(abstract, parse_rules(config.sharding.rules), mesh)
    abstract = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed
    )
    return cls(optimizers, placed, abstract, initialise)

  def create(self, batch: Any, frozen: Mapping[str, Any]) -> State:
    """A fresh state, made in place on the devices."""
    device = next(iter(self.shardings.step.device_set))
    made = jax.jit(
      self.initialise, out_shardings=self.shardings, compiler_options=options_of(device)
    )
    return made(batch, frozen)


def _updates(total: int, player: base.Player) -> int:
  """How often a player moves in a run of `total` steps: the length of its schedule."""
  return max(-(-(total - player.start) // player.every), 1) * player.repeats


@dataclasses.dataclass
class Run:
  """A run's state and where it is stored.

  Attributes:
    plan: what the state is made of.
    step: steps done when the run was opened.
    window: per-step metrics of the open logging window.
    hooks_done: which hooks of this step are done; None for all of them.
    lines: of this step in `metrics.jsonl` that stand; None for all of them.
    resting: variables, on the host, of components that training does not compute with.
    checkpoints: where the state is stored.
  """

  plan: Plan
  step: int
  window: list[dict[str, float]]
  hooks_done: Sequence[str] | None
  lines: int | None
  resting: dict[str, dict[str, Any]]
  checkpoints: Checkpoints
  _state: State | None
  _system: str

  @classmethod
  def open(
    cls, config: ConfigDict, workdir: epath.Path, mesh: Mesh, system: System,
    components: assembly.Components, loader: Any, total: int,
    steps_of: Callable[[Any, str], int],
  ) -> "Run":
    """Restores a run or begins one, and puts the loader at its position.

    Precedence: the run's own newest checkpoint; else `config.resume`, another
    run's newest checkpoint, optimizer and step included; else
    `config.init_from`, an export's parameters under a fresh optimizer; else
    scratch.

    Raises:
      UserError: for a checkpoint or export that does not fit.
    """
    _, working = trees.split(components.variables, components.resting)
    plan = Plan.make(config, mesh, system, working, total, steps_of)
    checkpoints = Checkpoints(
      workdir / "checkpoints", keep_last=config.checkpoint.keep_last,
      keep_every=steps_of(config.checkpoint.keep_every, "checkpoint.keep_every") or None,
    )
    agree_on("the step of the newest checkpoint (0 for none)", checkpoints.latest_step() or 0,
             "name a --workdir that all hosts see")
    frozen, resting = _placed(components, config, mesh)
    run = cls(plan, 0, [], None, None, resting, checkpoints, None, config.system)
    if checkpoints.latest_step() is not None:
      run._restore(checkpoints, workdir, frozen, loader)
    elif config.resume:
      workdirs.read_run_config(epath.Path(config.resume))
      others = Checkpoints(epath.Path(config.resume) / "checkpoints", read_only=True)
      run._restore(others, epath.Path(config.resume), frozen, loader)
      run.lines = 0  # those are in the other run's file
      others.close()
    else:
      tell("making the parameters; to compile that takes a minute or so for large networks")
      run._state = plan.create(put(loader.peek(), batch_sharding(mesh)), frozen)
      if config.init_from:
        exported = export.read(config.init_from)
        with assembly.naming_differences(config, exported.config):
          run._state = _initialised(run._state, system, exported)
        # Such as another prediction, of which no array tells.
        different = assembly.differences(config, exported.config, "model")
        if different:
          tell(f"warning: init_from={config.init_from} was trained with {different}")
    return run

  def save_frozen(self, components: assembly.Components, config: ConfigDict, mesh: Mesh) -> None:
    """Stores the frozen groups, once a run; before `take_state`."""
    if self.checkpoints.has_frozen():
      return
    # Those that rest visit the devices, to be stored as all others are.
    placed = place(self.resting, _frozen_shardings(self.resting, config, mesh))
    frozen = trees.merge(self._state.frozen, placed)
    self.checkpoints.save_frozen(frozen, {"components": components.about})

  def take_state(self) -> State:
    """The state, which the caller may donate; the run forgets it."""
    state, self._state = self._state, None
    return state

  def save(self, step: int, state: State, meta: dict[str, Any]) -> None:
    """Stores a state without its frozen groups, in the background."""
    about = {**meta, "system": self._system, "version": t2i_jax.__version__}
    self.checkpoints.save(step, state.replace(frozen={}), about)

  def _restore(
    self, checkpoints: Checkpoints, workdir: epath.Path, frozen: Mapping[str, Any], loader: Any
  ) -> None:
    step = checkpoints.latest_step()
    if step is None:
      raise UserError(f"no checkpoint in {checkpoints.directory}")
    meta = checkpoints.meta(step)
    if meta.get("system") != self._system:
      raise UserError(
        f"the checkpoint in {checkpoints.directory} is of the system {meta.get('system')!r}, "
        f"the config's is {self._system!r}; choose another --workdir or config"
      )
    state = checkpoints.restore(step, self.plan.abstract_state.replace(frozen={}))
    self._state = state.replace(frozen=frozen)
    self.step, self.window = step, meta["window"]
    if meta["hooks_due"]:
      found = marker.read(workdir)
      self.hooks_done = marker.done_at(found, step)
      self.lines = found.lines if found and found.step == step else None
    loader.restore(meta["data"])


def _frozen_shardings(variables: Mapping[str, Any], config: ConfigDict, mesh: Mesh) -> Any:
  rules = parse_rules(config.sharding.rules)
  return shardings({"frozen": dict(variables)}, rules, mesh)["frozen"]


def _placed(
  components: assembly.Components, config: ConfigDict, mesh: Mesh
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The components' variables: on their devices, and on the host of those that rest."""
  if components.held_by is None:
    resting, working = trees.split(components.variables, components.resting)
    return place(working, _frozen_shardings(working, config, mesh)), resting
  abstract = jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
    dict(components.variables), _frozen_shardings(components.variables, config, mesh),
  )
  held = Checkpoints(components.held_by, read_only=True)
  resting, working = trees.split(held.restore_frozen(abstract), components.resting)
  held.close()
  return working, on_host(resting)


def _initialised(state: State, system: System, exported: export.Export) -> State:
  """`state` with the exported parameters and collections where it has the same ones."""

  def taken(kind: str, tree: Any) -> Any:
    shared = [group for group in tree if group in exported.variables.get(kind, {})]
    given = trees.flatten({group: exported.variables[kind][group] for group in shared})
    wanted = trees.flatten({group: tree[group] for group in shared})
    if found := trees.differences(wanted, given):
      raise UserError(f"init_from={exported.path} does not fit this config: of {len(wanted)} "
                      f"arrays {found}; use the model and text sections that it was trained with")
    new = {
      name: place(np.asarray(given[name], x.dtype), x.sharding) for name, x in wanted.items()
    }
    return {**tree, **trees.unflatten(new)}

  if not set(state.params) & set(exported.variables.get("params", {})):
    raise UserError(f"init_from={exported.path} has no parameters for this config's "
                    f"{', '.join(sorted(state.params))}; it is of the system "
                    f"{exported.config.system}")
  params = taken("params", state.params)
  collections = {kind: taken(kind, tree) for kind, tree in state.collections.items()}
  taken_groups = sorted(set(state.params) & set(exported.variables["params"]))
  fresh = sorted(set(state.params) - set(taken_groups))
  tell(f"init_from={exported.path}: takes {', '.join(taken_groups)}"
       + (f"; starts {', '.join(fresh)} from scratch" if fresh else ""))
  copied = lambda tree: jax.tree.map(jax.numpy.copy, tree)  # noqa: E731
  return state.replace(
    params=params, ema={g: copied(params[g]) for g in state.ema}, collections=collections,
    ema_collections={
      kind: {g: copied(collections[kind][g]) for g in groups}
      for kind, groups in state.ema_collections.items()
    },
  )


def held_variables(system: System, state: State, ema: bool) -> dict[str, Any]:
  """Variables of the groups that sampling needs, where they lie."""
  return trees.split(state.variables(ema), (*system.ema_groups, *system.frozen_groups))[0]


def on_host(tree: Any) -> Any:
  """A tree of global arrays as numpy arrays; on several hosts, called by all of them."""
  if jax.process_count() > 1:
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)
  return jax.device_get(tree)


def restored_variables(
  workdir: epath.Path, step: int | None, ema: bool
) -> tuple[ConfigDict, int, dict[str, Any], Tokenizers, dict[str, Any]]:
  """Config, step, exportable variables, tokenizers and `Components.about` of a run's checkpoint.

  Raises:
    UserError: where there is no run, no such checkpoint, or a damaged one.
  """
  config = workdirs.read_run_config(workdir)
  mesh = make_mesh({"data": -1})
  components = assembly.load_components(config, workdir)
  system = assembly.build_system(config, components.systems)
  tokenizers = Tokenizers.load(workdir / workdirs.TOKENIZER)
  checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
  step = checkpoints.latest_step() if step is None else step
  if step is None:
    raise UserError(f"no checkpoint in {checkpoints.directory} yet")
  plan = Plan.make(config, mesh, system, components.variables, 1, lambda value, key: 0)
  state = checkpoints.restore(step, plan.abstract_state.replace(frozen={}))
  frozen, _ = _placed(components, config, mesh)
  checkpoints.close()
  variables = held_variables(system, state.replace(frozen=frozen), ema)
  return config, step, on_host(variables), tokenizers, components.about
