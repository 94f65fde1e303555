"""Config files, run, and their keys set from the command line.

An unknown key or value is an error that names the nearest valid one.
"""

import importlib.util
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from t2i_jax.config import check_ranges, flatten, shared_sections
from t2i_jax.durations import parse_duration
from t2i_jax.errors import UserError, nearest, unknown
from t2i_jax.values import literal, typed

# Keys that take a duration: steps as an integer, or a text; see `durations`.
DURATIONS = (
  "train.duration",
  "optimizer.warmup",
  "checkpoint.every",
  "checkpoint.keep_every",
  "log.every",
  "sample.every",
  "evaluate.every",
  "evaluate.metrics_every",
)
# Sections of paths by names that are the user's.
PATHS = ("components", "evaluate.networks")


def load_config(spec: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
  """Loads `FILE.py` or `FILE.py:ARG` and applies overrides by dotted key.

  Raises:
    UserError: for a missing file or one whose code fails, an argument or key
      that does not exist, or a value of another type than the one it replaces.
  """
  path, _, arg = spec.partition(":")
  if not Path(path).is_file():
    folder = Path(path).parent
    there = [str(p) for p in folder.glob("*.py")] if folder.is_dir() else []
    raise UserError(f"no config file at '{path}'{nearest(path, there)}")
  config = _run_file(path, arg or None)
  free = () if config.sample.options else ("sample.options",)  # those of a component
  for key, text in (overrides or {}).items():
    override(config, key, text, free)
  check_ranges(config)
  return config


def _run_file(path: str, arg: str | None) -> ConfigDict:
  """What `get_config(arg)` of a Python file returns."""
  module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
  if module_spec is None:
    raise UserError(f"'{path}' is no Python file, so it is not a config")
  module = importlib.util.module_from_spec(module_spec)
  try:
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise UserError(f"'{path}' has no get_config(arg), so it is not a config")
    config = module.get_config(arg)
  except UserError:
    raise
  except Exception as error:  # Whatever the user's code may raise.
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    where = f", line {lines[-1]}" if lines else ""
    raise UserError(f"{path}{where}: {type(error).__name__}: {error}") from error
  if not isinstance(config, ConfigDict) or not set(shared_sections()) <= set(config):
    raise UserError(f"{path}: get_config returns no config that begins as recipe.base(...)")
  return config


def override(config: ConfigDict, key: str, text: str, free: Sequence[str] = ()) -> None:
  """Sets `config.<key>` from the command line's text, keeping its type.

  In sections that are `free` any key is new, and takes any literal.
  """
  flat = flatten(config)
  if key not in flat and not _is_section(config, key):
    section = key.rpartition(".")[0]
    if section in PATHS or section.startswith("players.") or section in free:
      with config.unlocked():
        _set_free(config, key, text)
      return
    raise unknown("config key", key, flat)
  if key not in flat:
    inside = ", ".join(k for k in flat if k.startswith(key + ".")) or f"{key}.NAME"
    raise UserError(f"config key '{key}' is a section; set one of its keys: {inside}")
  value = _parsed(key, text, flat[key])
  section = config
  *parents, last = key.split(".")
  for parent in parents:
    section = section[parent]
  with section.ignore_type():
    section[last] = value


def _parsed(key: str, text: str, old: Any) -> Any:
  """The value of a key from the command line's text."""
  if key in DURATIONS or (key.startswith("players.") and key.endswith(".warmup")):
    value = int(text) if text.isdecimal() else text
    parse_duration(value, key)
    return value
  return typed(f"config key {key}", text, old)


def _is_section(config: ConfigDict, key: str) -> bool:
  for part in key.split("."):
    if not isinstance(config, ConfigDict) or part not in config:
      return False
    config = config[part]
  return isinstance(config, ConfigDict)


def _set_free(config: ConfigDict, key: str, text: str) -> None:
  """Sets a key of a section whose keys are the user's: a component, a player's option..."""
  *parents, last = key.split(".")
  if parents[0] == "players":
    if len(parents) != 2:
      raise UserError(f"config key '{key}': write players.PLAYER.OPTION")
    if last not in config.optimizer:
      raise unknown("optimizer option", last, config.optimizer)
    if parents[1] not in config.players:
      config.players[parents[1]] = ConfigDict()
    config.players[parents[1]][last] = _parsed(key, text, config.optimizer[last])
  elif ".".join(parents) in PATHS:
    section = config
    for parent in parents:
      section = section[parent]
    section[last] = text
  else:
    config[parents[0]][parents[1]][last] = literal(text)
