"""A config's system, built, and the frozen systems of its components that it is built on."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from t2i_jax import batch_spec, export, systems, workdirs
from t2i_jax import config as configs
from t2i_jax.errors import UserError, unknown
from t2i_jax.parallel.distributed import is_primary
from t2i_jax.systems import trees
from t2i_jax.systems.base import System
from t2i_jax.systems.trees import Variables
from t2i_jax.text.tokenizer import Tokenizers
from t2i_jax.values import typed


def compute_dtype(config: ConfigDict) -> Any:
  """The type of matmuls and convolutions that `config.precision.compute` asks for."""
  name = config.precision.compute
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  choices = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
  return configs.choose("precision.compute", name, choices)


def build_system(
  config: ConfigDict, components: Mapping[str, System] | None = None,
  **cached: Any,
) -> System:
  """The system of a config, in the config's precision; arguments as of `systems.build`."""
  return systems.build(config, components, compute_dtype(config), **cached)


@dataclasses.dataclass
class Components:
  """The frozen systems of a run.

  Attributes:
    systems: by name.
    variables: `{collection: {component: tree}}` of arrays; of their shapes where `held_by` holds
      the arrays.
    about: what builds them again, and which they are:
      `{name: {"config", "components", "step", "fingerprint"}}`, nested.
    held_by: the checkpoint directory of the run that stored them, or None.
    tokenizers: of their prompts, where they were read from their exports.
    resting: names of those that training does not compute with; they stay off the devices.
  """

  systems: dict[str, System]
  variables: dict[str, dict[str, Any]]
  about: dict[str, Any]
  held_by: epath.Path | None = None
  tokenizers: dict[str, Tokenizers] = dataclasses.field(default_factory=dict)
  resting: tuple[str, ...] = ()


def build_with(config: ConfigDict, about: Mapping[str, Any]) -> System:
  """The system of a config whose components are described by `about`, as in `Components`."""
  return build_system(config, _described(about))


def _described(about: Mapping[str, Any]) -> dict[str, System]:
  return {
    name: build_with(configs.from_json(json.dumps(part["config"])), part["components"])
    for name, part in about.items()
  }


def check_fits(system: System, exported: export.Export) -> None:
  """Raises UserError unless an export's arrays have the names and shapes of its system's.

  So with those of the components in it. Names change from version to version. Nothing is
  computed, and no number is read.

  Args:
    system: of the export's config and components.
    exported: with arrays, or anything that has their shape and type.
  """
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), exported.variables)
  _check_fits(system, exported.components, shapes, f"the export {exported.path}")


def _check_fits(
  system: System, components: Mapping[str, Any], variables: Variables, whose: str
) -> None:
  """Components first, as a system may compute with them when it is initialised."""
  for name, part in _described(components).items():
    _check_fits(part, components[name]["components"], trees.group(variables, name),
                f"{whose}: its component {name}")
  frozen, _ = trees.split(variables, system.frozen_groups)
  wanted = jax.eval_shape(
    lambda batch, frozen: system.init(jax.random.key(0), batch, frozen),
    batch_spec.abstract_batch(system, 2), frozen,
  )  # fmt: skip
  wanted, given = (
    trees.flatten(trees.split(of, system.ema_groups)[0]) for of in (wanted, variables)
  )
  if found := trees.differences(wanted, given):
    raise UserError(f"{whose} does not fit its config: of {len(wanted)} arrays {found}; use the "
                    "version of t2i_jax that wrote it, or export its run again")


def load_components(config: ConfigDict, workdir: epath.Path | None = None) -> Components:
  """The systems of `config.components`.

  A run that has begun keeps what it began with, whatever has become of the exports since: its own
  copy is used, or that of the run which it resumes.

  Args:
    config: of the run. Frozen parameters take the type of `precision.frozen`.
    workdir: of the run.

  Raises:
    UserError: for an export that cannot be read, or whose arrays are not its system's.
  """
  from t2i_jax.training.checkpoint import Checkpoints

  if not config.components:
    return Components({}, {}, {})
  if workdir is not None and (workdir / workdirs.CONFIG).exists():
    runs = [workdir]
  else:
    # Left by a command that failed before it was a run.
    if workdir is not None and is_primary() and (workdir / "checkpoints" / "frozen").exists():
      (workdir / "checkpoints" / "frozen").rmtree()
    runs = [epath.Path(config.resume)] if config.resume else []
  for run in runs:
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    if checkpoints.has_frozen():
      meta, flat = checkpoints.describe_frozen()
      checkpoints.close()
      about = meta["components"]
      if run != workdir:
        _check_same_components(config, about, run)
      return Components(
        _described(about), trees.unflatten(flat), about, checkpoints.directory
      )
  dtype = configs.choose(
    "precision.frozen", config.precision.frozen,
    {"float32": jnp.float32, "bfloat16": jnp.bfloat16},
  )
  found = Components({}, {}, {})
  for name, path in config.components.items():
    try:
      exported = export.read(path)
    except UserError as error:
      raise UserError(f"components.{name}: {error}") from error
    found.systems[name] = build_with(exported.config, exported.components)
    check_fits(found.systems[name], exported)
    found.tokenizers[name] = exported.tokenizers
    found.about[name] = {"config": exported.config.to_dict(), "components": exported.components,
                         "step": exported.step, "fingerprint": export.fingerprint(path)}
    for kind, groups in exported.variables.items():
      if kind == "params":
        groups = jax.tree.map(lambda x: x.astype(dtype), groups)
      found.variables.setdefault(kind, {})[name] = groups
  return found


def _check_same_components(config: ConfigDict, about: Mapping[str, Any], run: epath.Path) -> None:
  """Raises UserError where `config.components` are other ones than the run that is resumed had."""
  for name, path in config.components.items():
    if name not in about:
      raise UserError(f"resume={run} has no component '{name}', only "
                      f"{', '.join(sorted(about)) or 'none'}; its parameters were trained without, "
                      "so begin another run")
    # An export that is gone is not asked for: the run has its own copy.
    if (export.located(path) / export.CONFIG).is_file() and (
      export.fingerprint(path) != about[name]["fingerprint"]
    ):
      raise UserError(f"components.{name}={path} is another one than resume={run} was trained "
                      "with; name that one, or begin another run")


def take_sampling_options(config: ConfigDict, components: Components) -> None:
  """Gives the config of a system that samples as a component does that one's sampling options.

  Those that the config has by itself stay, in the type that they have there.

  Raises:
    UserError: for an option that the component does not have.
  """
  text_of = systems.load(config.system).text_of
  if text_of not in components.about:
    return
  options = dict(components.about[text_of]["config"]["sample"]["options"])
  for name, value in config.sample.options.items():
    if name not in options:
      raise unknown(f"sampling option of components.{text_of}", name, options)
    options[name] = typed(f"config key sample.options.{name}", str(value), options[name])
  with config.unlocked():
    config.sample.options = ConfigDict(options)


@contextlib.contextmanager
def naming_differences(config: ConfigDict, theirs: ConfigDict) -> Iterator[None]:
  """Adds to a UserError what the config's `model` and `text` have otherwise than another's."""
  try:
    yield
  except UserError as error:
    different = differences(config, theirs, "text", "model")
    if not different:
      raise
    raise UserError(f"{error}; it was trained with {different}") from error


def differences(config: ConfigDict, theirs: ConfigDict, *sections: str) -> str:
  """What another config has otherwise in some sections, as flags, of many the first; or ""."""
  ours, theirs = configs.flatten(config), configs.flatten(theirs)
  different = [
    f"--config.{name}={theirs[name]}" for section in sections for name in theirs
    if name.partition(".")[0] == section and name in ours and ours[name] != theirs[name]
  ]
  more = f" and {len(different) - 6} more" if len(different) > 6 else ""
  return " ".join(different[:6]) + more


def player_sections(config: ConfigDict, system: System, steps_of) -> dict[str, dict[str, Any]]:
  """Each player's optimizer section: `config.optimizer` under `config.players.NAME`.

  Args:
    config: with `optimizer` and `players`.
    system: whose players they are.
    steps_of: turns a duration into steps, given the value and its key.

  Raises:
    UserError: for a player or an option that does not exist.
  """
  names = [player.name for player in system.players]
  for name, section in config.players.items():
    if name not in names:
      raise unknown(f"player of {config.system}", name, names)
    for key in section:
      if key not in config.optimizer:
        raise unknown(f"option of player {name}", key, config.optimizer)
  sections = {}
  for name in names:
    section = {**config.optimizer, **config.players.get(name, {})}
    sections[name] = {**section, "warmup": steps_of(section["warmup"], "optimizer.warmup")}
  return sections
