"""Variables, as trees: one group's taken out, several put together, all by path, and compared.

Variables are one dictionary `{collection: {group: tree}}`, as Linen lays them
out, with one more level for the group:

  {"params": {"text_encoder": ..., "denoiser": ...}, "batch_stats": {...}}
"""

import types
from collections.abc import Mapping
from typing import Any

import jax

Variables = Mapping[str, Mapping[str, Any]]
NO_VARIABLES: Variables = types.MappingProxyType({})


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


def flatten(variables: Mapping[str, Any]) -> dict[str, Any]:
  """`{"params/denoiser/conv_in/kernel": array}` of nested variables."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables)
  }


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `flatten`."""
  nested: dict[str, Any] = {}
  for key, value in flat.items():
    *parents, last = key.split("/")
    place = nested
    for parent in parents:
      place = place.setdefault(parent, {})
    place[last] = value
  return nested


def differences(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> str:
  """How given arrays, by path, differ from those that are wanted: "" where they do not.

  "2 are missing, such as a/kernel; 2 have no place, such as b/kernel".
  """
  missing, more = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
  wrong = [k for k in sorted(wanted.keys() & given.keys()) if wanted[k].shape != given[k].shape]
  parts = [
    f"{len(names)} {what}, such as {names[0]}"
    for names, what in ((missing, "are missing"), (more, "have no place")) if names
  ]
  if wrong:
    shapes = f"{list(given[wrong[0]].shape)} in place of {list(wanted[wrong[0]].shape)}"
    parts.append(f"{len(wrong)} have another shape, such as {wrong[0]}, {shapes}")
  return "; ".join(parts)
