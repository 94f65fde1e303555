"""Key maps of networks whose equal blocks are stacked: one array of ours holds a tensor a block.

What else transformers' files hold, and ours do not: fixed positions, which are computed, and copies
of one tensor under several names.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from t2i_jax.errors import UserError
from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.rules import Layout, Rule, linear
from t2i_jax.weights.stored import Stored

# How far half precision may have moved a constant between -1 and 1.
ROUNDING = 1e-2


def patch_layout(patch: int) -> Layout:
  """Of a convolution over patches [out, in, p, p], and a Dense on pixels [p * p * in, out]."""
  return Layout(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    lambda x: x.reshape(patch, patch, -1, x.shape[-1]).transpose(3, 2, 0, 1),
  )


def number_of(tensors: Mapping[str, Any], prefix: str) -> int:
  """How many blocks there are whose names begin with `prefix` and a number."""
  numbers = [name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)]
  return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)


def shapes_of(
  tensors: Mapping[str, Stored], names: Sequence[str], what: str
) -> list[tuple[int, ...]]:
  """Of tensors without which there is no `what`; UserError, naming those that are missing."""
  missing = [name for name in names if name not in tensors]
  if missing:
    raise UserError(f"these weights hold no whole {what}: {', '.join(missing)} missing")
  return [tuple(tensors[name].shape) for name in names]


def fused(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
  """Of queries, keys and values that one Linear gives, one behind the other."""
  rules = []
  for index, name in enumerate(("query", "key", "value")):
    rules.append(Rule(f"{ours}/{name}/kernel", f"{theirs}.weight", linear, (index, 3)))
    if bias:
      rules.append(Rule(f"{ours}/{name}/bias", f"{theirs}.bias", part=(index, 3)))
  return rules


@dataclasses.dataclass(frozen=True)
class _Block:
  """One block's row of a stacked array, made when it is asked for."""

  of: Any
  index: int

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.of.shape[1:])

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(self.of.dtype)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    return np.asarray(self.of[self.index], dtype)


class StackedKeyMap(KeyMap):
  """The rules of one block hold for every row of a stack: `blocks/...` is `blocks_{i}/...` in them.

  Networks whose blocks are not stacked are read and written by the same rules.

  Attributes:
    stacks: paths of the subtrees of ours that are stacks, and the number of the first block of
      each.
    constants: tensors of theirs that nothing trains, by name; written, and checked where they are.
    copies: of one of their names, others under which the same tensor is held.
  """

  def __init__(
    self,
    rules: Sequence[Rule],
    stacks: Mapping[str, int],
    constants: Mapping[str, Callable[[], np.ndarray]] | None = None,
    copies: Callable[[str], Sequence[str]] = lambda name: (),
    ignored: Sequence[str] = (),
    prefixes: Sequence[tuple[str, str]] = (),
  ):
    super().__init__(rules, ignored, prefixes)
    self.stacks, self.constants, self.copies = dict(stacks), dict(constants or {}), copies

  def load(
    self, tensors: Mapping[str, Stored], abstract: Any, *, source: str, dtype: Any = None,
    put: Callable[[str, np.ndarray], Any] = lambda path, array: array,
    ignored: Sequence[str] = (),
  ) -> Any:
    """See `KeyMap.load`."""
    found = self.stored(tensors, abstract, source=source, dtype=dtype, ignored=ignored)
    leaves = jax.tree_util.tree_leaves_with_path(found)
    arrays = [
      put(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.read())
      for path, leaf in leaves
    ]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), arrays)

  def stored(
    self, tensors: Mapping[str, Stored], abstract: Any, *, source: str, dtype: Any = None,
    ignored: Sequence[str] = (),
  ) -> Any:
    """See `KeyMap.stored`."""
    others = self._check_others(tensors, source)
    apart = flatten_dict(super().stored(
      tensors, self._apart(abstract), source=source, dtype=dtype, ignored=(*ignored, *others)
    ), sep="/")  # fmt: skip
    flat = {}
    for path, leaf in flatten_dict(abstract, sep="/").items():
      stack = self._stack(path)
      if stack is None:
        flat[path] = apart[path]
        continue
      rows = [apart[_row(path, stack, self.stacks[stack] + i)] for i in range(leaf.shape[0])]
      flat[path] = Stored(tuple(leaf.shape), rows[0].dtype, partial(_stacked, rows))
    return unflatten_dict(flat, sep="/")

  def save(self, tree: Any, dtype: Any = None) -> dict[str, tuple]:
    """See `KeyMap.save`."""
    tensors = super().save(self._apart(tree), dtype)
    for name in list(tensors):
      tensors.update(dict.fromkeys(self.copies(name), tensors[name]))
    kind = np.dtype(dtype or np.float32)
    for name, make in self.constants.items():
      array = make()
      tensors[name] = (array.shape, kind, lambda array=array: array.astype(kind))
    return tensors

  def _stack(self, path: str) -> str | None:
    parents = itertools.accumulate(path.split("/"), "{}/{}".format)
    return next((parent for parent in parents if parent in self.stacks), None)

  def _apart(self, tree: Any) -> Any:
    """The tree with the blocks of every stack under names of their own."""
    flat = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
      stack = self._stack(path)
      if stack is None:
        flat[path] = leaf
        continue
      for i in range(leaf.shape[0]):
        flat[_row(path, stack, self.stacks[stack] + i)] = _Block(leaf, i)
    return unflatten_dict(flat, sep="/")

  def _check_others(self, tensors: Mapping[str, Stored], source: str) -> list[str]:
    """Patterns of the constants and copies; UserError where they are not what they should be."""
    known = []
    for usual, other in self.prefixes:
      for name, make in self.constants.items():
        name = other + name.removeprefix(usual) if name.startswith(usual) else name
        known.append(name)
        if name not in tensors:
          continue
        found, wanted = tensors[name].read(), make()
        if found.shape != wanted.shape or not np.allclose(found, wanted, atol=ROUNDING):
          raise UserError(f"{source} has other positions ({name}) than this model of "
                          f"{list(wanted.shape)}; give it the grid of these weights")
    for name in tensors:
      for copy in self.copies(name):
        known.append(copy)
        if copy in tensors and not np.array_equal(tensors[copy].read(), tensors[name].read()):
          raise UserError(f"{source} holds two versions of one tensor ({name} and {copy}), and "
                          "this model has one; take the weights as they were published")
    return [rf"^{_escaped(name)}$" for name in known]


def _row(path: str, stack: str, number: int) -> str:
  return f"{stack}_{number}{path.removeprefix(stack)}"


def _stacked(rows: Sequence[Stored]) -> np.ndarray:
  return np.stack([row.read() for row in rows])


def _escaped(name: str) -> str:
  return name.replace(".", r"\.")
