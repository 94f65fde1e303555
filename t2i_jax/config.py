"""What a config is: the sections that all share, a config file's argument, and configs as JSON.

A config is a locked `ml_collections.ConfigDict` made by a `configs/*.py` file's
`get_config(arg)`, see `config_files`. An unknown argument or value is an error
that names the nearest valid one.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from t2i_jax.errors import UserError, unknown
from t2i_jax.values import as_tuples, typed

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


def check_ranges(config: ConfigDict) -> None:
  """Raises UserError for a number that makes no sense, whatever the system."""
  for key, low, high in RANGES:
    section, _, last = key.rpartition(".")
    value = (config[section] if section else config)[last]
    if not low <= value <= high:
      limit = f"at least {low}" if high == math.inf else f"{low} to {high}"
      raise UserError(f"config key {key}={value} is out of range; set {limit}")


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
  return ConfigDict(as_tuples(content))
