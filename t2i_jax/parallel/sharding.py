"""How parameters, activations and batches lie on the mesh.

Parameters: ordered (regex, rule) pairs from the config; the first regex found
in a leaf's path decides, and a leaf that none matches is replicated. A rule
is a chain of small named operations joined by `+`, applied left to right:

  replicate     whole on every device; stands alone
  fsdp          the largest free axis that divides over `fsdp`, for arrays of
                at least `FSDP_MIN_SIZE` elements (ZeRO stage 3,
                https://arxiv.org/abs/1910.02054 section 5)
  tensor(axis)  this axis over `tensor` (Megatron-LM,
                https://arxiv.org/abs/1909.08053 section 3)

An operation that does not fit a shape leaves it as it is: rules never fail on
a shape, so one rule covers a kernel, its bias, and the lower-rank statistics
that a factored optimizer keeps of it.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t2i_jax.errors import UserError, unknown
from t2i_jax.parallel.mesh import batch_axes

# Smaller arrays cost more to gather than they save.
FSDP_MIN_SIZE = 2**14

# One entry a dimension: the mesh axis it lies over, or None.
Spec = tuple[str | None, ...]
# (array shape, mesh sizes by axis, spec so far) -> spec
Rule = Callable[[Sequence[int], Mapping[str, int], Spec], Spec]
Rules = tuple[tuple[re.Pattern[str], Rule], ...]


def replicate() -> Rule:
  """Nothing is split."""
  return lambda shape, sizes, spec: spec


def fsdp() -> Rule:
  """The largest free axis that divides over `fsdp`; the last of equals."""

  def rule(shape, sizes, spec):
    parts = sizes["fsdp"]
    free = [
      axis for axis, size in enumerate(shape) if spec[axis] is None and size and size % parts == 0
    ]
    if parts == 1 or not free or math.prod(shape) < FSDP_MIN_SIZE:
      return spec
    largest = max(free, key=lambda axis: (shape[axis], axis))
    return _with(spec, largest, "fsdp")

  return rule


def tensor(axis: int) -> Rule:
  """Dimension `axis` (negative: from the end) over `tensor`."""

  def rule(shape, sizes, spec):
    parts = sizes["tensor"]
    if parts == 1 or not -len(shape) <= axis < len(shape):
      return spec
    at = axis % len(shape)
    if not shape[at] or shape[at] % parts or spec[at] is not None:
      return spec
    return _with(spec, at, "tensor")

  return rule


def _with(spec: Spec, axis: int, name: str) -> Spec:
  return (*spec[:axis], name, *spec[axis + 1 :])


_OPERATIONS = {"replicate": replicate, "fsdp": fsdp, "tensor": tensor}
_ARGUMENTS = {"replicate": 0, "fsdp": 0, "tensor": 1}


def parse_rules(pairs: Iterable[Sequence[str]]) -> Rules:
  """Rules from the config's ordered (regex, rule) pairs.

  Raises:
    UserError: naming the pair, the regex or the rule that is not valid.
  """
  rules = []
  for pair in pairs:
    if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(p, str) for p in pair):
      raise UserError(f"sharding rule {pair!r} is not a (regex, rule) pair of strings")
    regex, text = pair
    try:
      pattern = re.compile(regex)
    except re.error as error:
      raise UserError(f"sharding rule ('{regex}', '{text}'): bad regex: {error}") from None
    rules.append((pattern, _parse_rule(text)))
  return tuple(rules)


def _parse_rule(text: str) -> Rule:
  operations = []
  names = []
  for part in text.split("+"):
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*(-?\d+)?\s*\))?\s*", part)
    if not match or match[1] not in _OPERATIONS:
      raise unknown("sharding rule", part.strip(), ("replicate", "fsdp", "tensor(-1)"))
    name, argument = match.groups()
    if (argument is not None) != bool(_ARGUMENTS[name]):
      raise UserError(f"sharding rule '{text}': '{part}' is not replicate, fsdp or tensor(axis)")
    operations.append(_OPERATIONS[name](*([] if argument is None else [int(argument)])))
    names.append(name)
  if len(set(names)) < len(names) or ("replicate" in names and len(names) > 1):
    raise UserError(f"sharding rule '{text}': use each operation once, and replicate alone")

  def chain(shape, sizes, spec):
    for operation in operations:
      spec = operation(shape, sizes, spec)
    return spec

  return chain


def path_text(path: tuple) -> str:
  """A leaf's path as `generator/block_0/kernel`: keys, fields and indices."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, rules: Rules, mesh: Mesh) -> Any:
  """A tree of NamedSharding for `tree`, a tree of arrays or ShapeDtypeStructs.

  Paths of an optimizer's state end in the path of the parameter they belong
  to, so unanchored regexes cover both; `^` would not.
  """

  def one(path, leaf):
    text = path_text(path)
    spec: Spec = (None,) * len(leaf.shape)
    for pattern, rule in rules:
      if pattern.search(text):
        spec = rule(leaf.shape, mesh.shape, spec)
        break
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(one, tree)


# Activations: what a dimension is, and the mesh axes it lies over.
LOGICAL = {
  "batch": batch_axes,
  "length": ("sequence",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  "channels_tensor": ("tensor",),
}


def logical(x: jax.Array, *names: str | None) -> jax.Array:
  """Marks an activation's dimensions by logical name, inside jit.

  The identity where there is no mesh (`jax.set_mesh`), on one device, outside
  jit, and inside shard_map. A dimension named None, or one that does not
  divide over its axes, is left to the compiler.

  Args:
    x: array with one dimension a name.
    names: keys of `LOGICAL`, or None.
  """
  if len(names) != x.ndim:
    raise ValueError(f"logical: {len(names)} names {names} for shape {x.shape}")
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or not isinstance(x, jax.core.Tracer):
    return x
  auto = {
    name: mesh.shape[name]
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Auto
  }
  spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
  for axis, name in enumerate(names):
    if name is None:
      continue
    over = tuple(a for a in LOGICAL[name] if a in auto)
    if over and x.shape[axis] % math.prod(auto[a] for a in over) == 0:
      spec[axis] = over
  if all(s is PartitionSpec.UNCONSTRAINED for s in spec):
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def put(tree: Any, sharding: NamedSharding) -> Any:
  """Global arrays from each process's own part of a batch.

  Args:
    tree: numpy arrays; on several processes this process's rows, which are
      `mesh.host_rows` of the global batch, in that order. Other rows would be
      taken for them: nothing here can tell.
    sharding: of every leaf, such as `mesh.batch_sharding(mesh)`.
  """
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree
  )


def place(tree: Any, placed: Any) -> Any:
  """Global arrays from host arrays that every process holds whole.

  `jax.device_put` would compare what the processes hold, all of it.

  Args:
    tree: numpy arrays.
    placed: a sharding for each.
  """
  return jax.tree.map(
    lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]),
    tree, placed,
  )
