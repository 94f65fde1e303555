"""The sections every config shares, strict parsing, and durations.

A config is a locked `ml_collections.ConfigDict` made by a `configs/*.py` file's
`get_config(arg)`. Nothing here is optional reading for the command line: an
unknown key, argument or value is an error that names the nearest valid one.
"""

import ast
import importlib.util
import json
import math
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from t2i_jax.errors import UserError, nearest, unknown

# Keys that take a duration: steps as an integer, or a text; see `steps_of`.
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
# Numbers that are not any number: key, lowest, highest.
RANGES = (
  ("seed", 0, 2**32 - 1),
  ("data.workers", 0, math.inf),
  ("data.memory_limit_mb", 0, math.inf),
  ("data.prefetch", 1, math.inf),
  ("train.accumulate", 1, math.inf),
  ("ema.decay", 0, 1),
  ("checkpoint.keep_last", 1, math.inf),
  ("sample.count", 1, math.inf),
  ("sample.seed", 0, 2**32 - 1),
  ("evaluate.batches", 1, math.inf),
  ("evaluate.pictures", 0, math.inf),
)
# Sections of paths by names that are the user's.
PATHS = ("components", "evaluate.networks")
UNITS = ("steps", "epochs", "examples", "%")
MULTIPLES = {"k": 1e3, "M": 1e6, "B": 1e9}


def shared_sections() -> ConfigDict:
  """The sections that every system's config has, with their defaults, unlocked."""
  return ConfigDict(
    {
      # Every draw of a run is a function of this and the step.
      "seed": 0,
      "data": {
        "name": "scenes",
        "options": {},  # The data set's own, see its class.
        "latents": "",  # Folder of `precompute latents`, trained on in place of pictures.
        "workers": 0,  # Processes that decode, for sets that memory does not hold.
        "memory_limit_mb": 2048,  # Sets up to this size are kept decoded in memory.
        "prefetch": 2,  # Batches moved to the devices ahead of time.
      },
      "train": {
        "duration": "1000 steps",
        "batch_size": 32,  # Global: all devices and hosts together.
        "accumulate": 1,  # Microbatches a batch is cut into.
      },
      "optimizer": {
        "name": "adamw",
        "learning_rate": 1e-4,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 1.0,  # Of the gradient's global norm; 0 for none.
        "schedule": "constant",
        "warmup": "0 steps",
        "final_fraction": 0.0,  # Of the learning rate, at the schedule's end.
        "multipliers": (),  # (regex of a parameter's path, factor) pairs.
      },
      # By player: any key of `optimizer` that is to differ for it.
      "players": {},
      "ema": {"decay": 0.9999, "warmup": True},
      "precision": {
        "compute": "auto",  # bfloat16 on TPU and GPU, float32 on the CPU.
        "frozen": "float32",  # Of components' parameters.
      },
      # Devices along each axis; -1 takes what is left.
      "mesh": {"slice": 1, "data": -1, "fsdp": 1, "sequence": 1, "tensor": 1},
      # (regex of a path, rule); the first that matches decides. See parallel/sharding.py.
      "sharding": {"rules": ((".*", "fsdp"),)},
      "checkpoint": {"every": "10%", "keep_last": 2, "keep_every": "0 steps"},
      "log": {"every": "10 steps"},
      # Pictures drawn during training, always from the same seed and prompts.
      "sample": {"every": "25%", "count": 16, "seed": 0, "prompts": (), "options": {}},
      # Held-out loss during training (0 for none), on these splits, or all held-out ones.
      "evaluate": {
        "every": "0 steps",
        "batches": 8,
        "splits": (),
        "pictures": 0,  # Drawn at the end to be judged by the data set's verifier, if it has one.
        "metrics": (),  # Of the same pictures; names of `evaluate --list-metrics`.
        "metrics_every": "0 steps",  # These and the verifier's score; 0 for at the end only.
        "networks": {},  # Of the metrics: {"inception": FILE, "feature-net": EXPORT, ...}.
      },
      # Exports that the system is built on: {"first_stage": PATH, ...}.
      "components": {},
      # Where parameters start: another run's checkpoint, or an export to fine-tune.
      "resume": "",
      "init_from": "",
    }
  )


def parse_arg(arg: str | None, **defaults: Any) -> ConfigDict:
  """A config file's argument, `size=tiny,dataset=emoji`, over its defaults.

  Values take the type of their default.

  Raises:
    UserError: for an unknown key, a repeated one, or a value of another type.
  """
  values = dict(defaults)
  seen = set()
  for part in filter(None, (arg or "").split(",")):
    key, equals, text = part.partition("=")
    if not equals:
      raise UserError(f"config argument '{part}' is not key=value; keys: {', '.join(defaults)}")
    if key not in defaults:
      raise unknown("config argument", key, defaults)
    if key in seen:
      raise UserError(f"config argument '{key}' is given twice")
    seen.add(key)
    values[key] = typed(f"config argument {key}", text, defaults[key])
  return ConfigDict(values)


def choose(what: str, name: str, choices: Mapping[str, Any]) -> Any:
  """`choices[name]`, or a UserError that names the nearest."""
  if name not in choices:
    raise unknown(what, name, choices)
  return choices[name]


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


def check_ranges(config: ConfigDict) -> None:
  """Raises UserError for a number that makes no sense, whatever the system."""
  for key, low, high in RANGES:
    section, _, last = key.rpartition(".")
    value = (config[section] if section else config)[last]
    if not low <= value <= high:
      limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
      raise UserError(f"config key {key}={value} is out of range; set {limit}")


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
    config[parents[0]][parents[1]][last] = _literal(text)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """`{"a.b": value}` of a nested config; empty sections have no entry."""
  flat = {}
  for key, value in config.items():
    if isinstance(value, ConfigDict | dict):
      flat.update(flatten(value, f"{prefix}{key}."))
    else:
      flat[f"{prefix}{key}"] = value
  return flat


def to_json(config: ConfigDict) -> str:
  """The config as indented JSON with sorted keys: what runs and exports store."""
  return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"


def from_json(text: str) -> ConfigDict:
  """What `to_json` wrote, lists back as tuples.

  Raises:
    ValueError: for text that is no JSON object.
  """
  content = json.loads(text)
  if not isinstance(content, dict):
    raise ValueError("no JSON object")
  return ConfigDict(_tuples(content))


def _tuples(value: Any) -> Any:
  if isinstance(value, list):
    return tuple(_tuples(v) for v in value)
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  return value


def typed(what: str, text: str, old: Any) -> Any:
  """`text` as a value of `old`'s type; None takes any literal."""
  if isinstance(old, str):
    return text
  if isinstance(old, tuple):
    return _typed_tuple(what, text, old)
  value = _literal(text)
  if isinstance(old, bool):
    if isinstance(value, bool):
      return value
  elif isinstance(old, float):
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
      return float(value)
  elif isinstance(old, int):
    if isinstance(value, int) and not isinstance(value, bool):
      return value
  elif old is None:
    return value
  raise UserError(f"{what}={text}: expected {type(old).__name__}, such as {old!r}")


def _literal(text: str) -> Any:
  """The Python literal that `text` spells, else `text` itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _typed_tuple(what: str, text: str, old: tuple) -> tuple:
  """`1,2`, `a, b`, `'one, with a comma'` or any literal, with elements like `old`'s."""
  value = _literal(text)
  if isinstance(value, list | tuple):
    parts = list(value)
  elif isinstance(value, str) and value != text:  # it was quoted
    parts = [value]
  else:
    parts = [part.strip() for part in text.split(",") if part.strip()]
  nested = any(isinstance(part, list | tuple) for part in parts)
  if nested or (old and isinstance(old[0], tuple)):
    return _tuples(parts)
  return tuple(typed(what, str(part), old[0] if old else "") for part in parts)


def parse_duration(value: int | float | str, key: str) -> tuple[float, str]:
  """A duration as (amount, unit).

  An integer is steps. A text is a number with an optional k, M or B and a unit:
  "2000 steps", "10 epochs", "1.5M examples", "5%" (of the run).

  Raises:
    UserError: for anything else.
  """
  if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
    return float(value), "steps"
  if isinstance(value, str):
    text = value.strip()
    number, unit = (text[:-1], "%") if text.endswith("%") else (text.split(" ") + [""])[:2]
    number = number.strip()
    factor = MULTIPLES.get(number[-1:], 1.0)
    unit = {"step": "steps", "epoch": "epochs", "example": "examples"}.get(unit, unit)
    try:
      amount = float(number[:-1] if factor != 1.0 else number) * factor
    except ValueError:
      amount = -1.0
    if unit in UNITS and 0 <= amount < math.inf and len(text.split(" ")) <= 2:
      return amount, unit
  raise UserError(
    f"{key}={value!r} is not a duration; write steps as an integer, or "
    "'2000 steps', '10 epochs', '1.5M examples' or '5%'"
  )


def steps_of(
  value: int | str, key: str, batch_size: int, epoch_size: int | None, total: int | None = None
) -> int:
  """A duration in steps, rounded to the nearest, at least 1 unless it is 0.

  Args:
    value, key: the duration and its config key, for messages.
    batch_size: examples a step.
    epoch_size: examples an epoch, None for a data set without end.
    total: steps of the run, for "%".

  Raises:
    UserError: for a unit that has no meaning here.
  """
  amount, unit = parse_duration(value, key)
  if amount == 0:
    return 0
  if unit == "%":
    if total is None:
      raise UserError(f"{key}={value!r}: the run's own length cannot be a percentage")
    if amount > 100:
      raise UserError(f"{key}={value!r} is more than the whole run")
    steps = amount / 100 * total
  elif unit == "epochs":
    if epoch_size is None:
      raise UserError(f"{key}={value!r}: this data set is made on the fly and has no epochs; "
                      "use steps or examples")
    steps = amount * epoch_size / batch_size
  elif unit == "examples":
    steps = amount / batch_size
  else:
    steps = amount
  if steps > 2**31 - 1:
    raise UserError(f"{key}={value!r} is {steps:.3g} steps; a run has at most 2147483647")
  return max(round(steps), 1)
