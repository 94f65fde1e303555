"""The rules of an architecture, applied: public checkpoints into our trees, and ours into them.

Of the `rules`, the first whose template fits is the one.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.weights.rules import Layout, Rule
from t2i_jax.weights.stored import Stored

STORED = "stored"
LISTED = 8  # names of each kind that an error quotes


@dataclasses.dataclass(frozen=True)
class Place:
  """Where one of our arrays lies on the other side."""

  name: str
  layout: Layout
  part: tuple[int, int]
  plus: str = ""
  runs: int = 1


@dataclasses.dataclass(frozen=True)
class _Found:
  """One of our arrays on the other side: its place there, and its shape and type here."""

  name: str
  tensor: Stored
  extra: Stored | None
  place: Place
  shape: tuple[int, ...]
  dtype: np.dtype

  def raw(self) -> np.ndarray:
    """In our layout and their type."""
    array = _part(self.tensor.read(), self.place)
    if self.extra is not None:
      array = array + self.extra.read()
    return self.place.layout.ours(array)

  def checked(self, source: str) -> np.ndarray:
    array = self.raw()
    if not np.all(np.isfinite(array)):
      raise _not_finite(source, [self.name])
    return np.asarray(array, self.dtype, order="C")


class KeyMap:
  """The rules of one architecture.

  Attributes:
    rules: in the order in which they are tried.
    ignored: regular expressions of names on the other side that hold nothing learned, such as
      positions counted from 0; they may be there or not.
    prefixes: pairs (usual, other): how some files begin names that usually begin otherwise. The
      first pair under which a file holds most of what is expected is taken for the whole file.
  """

  def __init__(
    self,
    rules: Sequence[Rule],
    ignored: Sequence[str] = (),
    prefixes: Sequence[tuple[str, str]] = (),
  ):
    self.rules, self.prefixes = tuple(rules), (("", ""), *prefixes)
    self._ignored = [re.compile(pattern) for pattern in ignored]
    self._templates = [(re.compile(_pattern(rule.ours)), rule) for rule in self.rules]

  def place(self, path: str) -> Place:
    """Where the array at `path` of our tree lies; LookupError without a rule for it."""
    for pattern, rule in self._templates:
      if match := pattern.fullmatch(path):
        named = match.groupdict()
        return Place(
          rule.theirs.format(**named), rule.layout, rule.part, rule.plus.format(**named), rule.runs
        )
    raise LookupError(f"no rule for '{path}'")

  def load(
    self,
    tensors: Mapping[str, Stored],
    abstract: Any,
    *,
    source: str,
    dtype: Any = None,
    put: Callable[[str, np.ndarray], Any] = lambda path, array: array,
    ignored: Sequence[str] = (),
  ) -> Any:
    """Our tree with the numbers of a checkpoint, one tensor at a time.

    Args:
      tensors: of `open_weights`.
      abstract: the tree that is wanted, of arrays or `jax.ShapeDtypeStruct`s.
      source: the file, for errors.
      dtype: of the arrays; the abstract ones' own if None; `STORED` for that of the file.
      put: is given each path and its array on the host, and returns what the tree shall hold, such
        as the array on its devices.
      ignored: further regular expressions, of what is there and not wanted this time.

    Returns:
      a tree like `abstract`.

    Raises:
      UserError: tensors are missing, of another shape, unexpected, or hold what is no number; the
        names are listed.
    """
    bad, arrays = [], []
    for path, found in self._found(tensors, abstract, source, dtype, ignored).items():
      array = found.raw()
      if not np.all(np.isfinite(array)):
        bad.append(found.name)
      arrays.append(put(path, np.asarray(array, found.dtype, order="C")))
      del array
    if bad:
      raise _not_finite(source, bad)
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(abstract), arrays)

  def stored(
    self,
    tensors: Mapping[str, Stored],
    abstract: Any,
    *,
    source: str,
    dtype: Any = None,
    ignored: Sequence[str] = (),
  ) -> Any:
    """Like `load`, but a tree of `Stored`s in our layout, whose numbers are read when asked for.

    Raises:
      UserError: as `load`; of numbers that are none, when they are read.
    """

    found = self._found(tensors, abstract, source, dtype, ignored)
    structure = jax.tree_util.tree_structure(abstract)
    return jax.tree_util.tree_unflatten(structure, [
      Stored(one.shape, one.dtype, partial(one.checked, source)) for one in found.values()
    ])

  def save(self, tree: Any, dtype: Any = None) -> dict[str, tuple]:
    """The other side's tensors of our tree, for `write_safetensors`, which asks for one at a time.

    Args:
      tree: of arrays.
      dtype: of the tensors; the arrays' own if None.
    """
    grouped: dict[str, dict[int, tuple[Any, Place]]] = {}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    places = [self.place(_path(path)) for path, _ in leaves]
    for place, (_, leaf) in zip(places, leaves, strict=True):
      grouped.setdefault(place.name, {})[place.part[0]] = (leaf, place)
    tensors = {}
    for name, parts in grouped.items():
      ordered = [parts[i] for i in sorted(parts)]
      shapes = [_their_shape(leaf.shape, place.layout) for leaf, place in ordered]
      shape = (sum(s[0] for s in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]
      kind = np.dtype(dtype or ordered[0][0].dtype)
      tensors[name] = (shape, kind, _joined(ordered, kind))
    for place in places:
      if place.plus:
        shape, kind, _ = tensors[place.name]
        tensors[place.plus] = (shape, kind, lambda s=shape, k=kind: np.zeros(s, k))
    return tensors

  def _found(
    self, tensors: Mapping[str, Stored], abstract: Any, source: str, dtype: Any,
    ignored: Sequence[str],
  ) -> dict[str, "_Found"]:
    """Where each of our arrays is, by its path; raises as `load` for what does not fit."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract)
    wanted = {_path(path): leaf for path, leaf in leaves}
    places = {path: self.place(path) for path in wanted}
    names, added = self._names(tensors, places)
    self._check(tensors, wanted, places, names, added, source, ignored)
    found = {}
    for path, leaf in wanted.items():
      tensor, extra = tensors[names[path]], tensors.get(added.get(path, ""))
      kind = tensor.dtype if dtype is STORED else np.dtype(dtype or leaf.dtype)
      found[path] = _Found(names[path], tensor, extra, places[path], tuple(leaf.shape), kind)
    return found

  def _names(
    self, tensors: Mapping[str, Stored], places: Mapping[str, Place]
  ) -> tuple[dict[str, str], dict[str, str]]:
    """The other side's name for each of our paths, as this file begins them, and what is added."""
    variants = [
      tuple(
        {path: _begun(name(place), *prefix) for path, place in places.items() if name(place)}
        for name in (lambda place: place.name, lambda place: place.plus)
      )
      for prefix in self.prefixes
    ]
    return max(variants, key=lambda names: sum(name in tensors for name in names[0].values()))

  def _check(self, tensors, wanted, places, names, added, source, ignored) -> None:
    ignored = [*self._ignored, *map(re.compile, ignored)]
    used = {*names.values(), *added.values()}
    missing = sorted(used - set(tensors))
    unexpected = sorted(
      name for name in set(tensors) - used if not any(p.search(name) for p in ignored)
    )
    shapes = []
    for path, leaf in wanted.items():
      if names[path] not in tensors:
        continue
      index, number = places[path].part
      expected = _their_shape(leaf.shape, places[path].layout)
      if number > 1:
        expected = (expected[0] * number, *expected[1:])
      for name in filter(tensors.get, (names[path], added.get(path, ""))):
        found = tensors[name].shape
        if found != expected and index == 0:
          shapes.append(f"{name} is {list(found)}, not {list(expected)}")
    problems = [
      f"{kind} {_listed(found)}"
      for kind, found in (("missing", missing), ("of another shape", shapes),
                          ("unexpected", unexpected)) if found
    ]  # fmt: skip
    if problems:
      raise UserError(f"{source} does not hold this model: {'; '.join(problems)}. Give weights of "
                      "this architecture and size, or the size of these weights")


def _pattern(template: str) -> str:
  """A regular expression of a template, a group for each name in braces."""
  parts, seen = [], set()
  for text, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", template):
    parts.append(re.escape(text))
    if name:
      parts.append(f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)")
      seen.add(name)
  return "".join(parts)


def _begun(name: str, usual: str, other: str) -> str:
  return other + name.removeprefix(usual) if name.startswith(usual) else name


def _path(path: tuple) -> str:
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _their_shape(shape: tuple[int, ...], layout: Layout) -> tuple[int, ...]:
  """Without making the array: a view of one number."""
  return layout.theirs(np.broadcast_to(np.zeros((), np.int8), shape)).shape


def _not_finite(source: str, names: Sequence[str]) -> UserError:
  return UserError(f"{source} holds NaN or infinity in {_listed(names)}; take another copy of it")


def _part(array: np.ndarray, place: Place) -> np.ndarray:
  index, number = place.part
  if number == 1:
    return array
  rest = array.shape[1:]
  return array.reshape(place.runs, number, -1, *rest)[:, index].reshape(-1, *rest)


def _joined(ordered: list[tuple[Any, Place]], dtype: np.dtype) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    parts = [place.layout.theirs(np.asarray(leaf)) for leaf, place in ordered]
    if len(parts) == 1:
      return np.asarray(parts[0], dtype)
    rest = parts[0].shape[1:]
    runs = [part.reshape(ordered[0][1].runs, -1, *rest) for part in parts]
    return np.asarray(np.concatenate(runs, axis=1).reshape(-1, *rest), dtype)

  return read


def _listed(names: Sequence[str]) -> str:
  more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
  return f"({len(names)}) {', '.join(names[:LISTED])}{more}"
