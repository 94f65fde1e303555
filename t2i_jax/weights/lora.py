"""Files of low-rank adapters, under the names that other programs give them.

Read are the names of diffusers and peft (`unet.down_blocks.0...attn1.to_q.lora_A.weight`), those of
older diffusers (`...attn1.processor.to_q_lora.down.weight`, `...to_q.lora.down.weight`) and those
of kohya's scripts (`lora_unet_down_blocks_0..._attn1_to_q.lora_down.weight`), which name a U-Net's
layers as diffusers or as its authors do. Written is the first layout. What such a file calls alpha
stands beside the numbers (kohya) or in its header (diffusers); without one it is the rank.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.weights.key_map import LISTED, KeyMap
from t2i_jax.weights.rules import Layout
from t2i_jax.weights.stored import open_weights

METADATA = "lora_adapter_metadata"  # of the header, as diffusers writes it
# How names end: (which of the numbers, what stands before).
_ENDINGS = (
  ("down", r"(.+)\.lora_A(?:\.\w+)?\.weight"), ("up", r"(.+)\.lora_B(?:\.\w+)?\.weight"),
  ("down", r"(.+?)(?:\.lora|\.lora_linear_layer|_lora)\.down\.weight"),
  ("up", r"(.+?)(?:\.lora|\.lora_linear_layer|_lora)\.up\.weight"),
  ("down", r"(.+)\.lora_down\.weight"), ("up", r"(.+)\.lora_up\.weight"),
  ("alpha", r"(.+?)(?:\.lora|\.lora_linear_layer|_lora)?\.alpha"),
)
# What names begin with besides, and what stands for the component's name.
_BEGINNINGS = (
  (r"^base_model\.model\.", ""), (r"^lora_unet_", "unet_"), (r"^lora_te1?_", "text_encoder_"),
  (r"^lora_te2_", "text_encoder_2_"), (r"^transformer\.", "unet."), (r"\.processor\.", "."),
)


@dataclasses.dataclass(frozen=True)
class Part:
  """A network of the system that is adapted, and how files name its layers.

  Attributes:
    ours: how its layers' paths begin, "/" at the end.
    theirs: the component in diffusers' names, such as "unet".
    maps: of its names; the first is what is written.
  """

  ours: str
  theirs: str
  maps: tuple[KeyMap, ...]


@dataclasses.dataclass(frozen=True)
class Adapter:
  """Of one layer; `down` [..., in, rank] and `up` [rank, out] as in `networks.layers.lora`."""

  down: np.ndarray
  up: np.ndarray
  alpha: float


Shapes = Mapping[str, tuple[int, ...]]


def load(path: str | Path, shapes: Shapes, parts: Sequence[Part]) -> dict[str, Adapter]:
  """The adapters in a file by the path of their layer, float32.

  Args:
    path: of the file, or the folder that holds it.
    shapes: of all kernels of the system that is adapted, by the path of their layer.
    parts: the networks that may be adapted.

  Raises:
    UserError: names that are of no layer, adapters that are not whole, numbers of another shape or
      that are none; the names are listed.
  """
  tensors = open_weights(_file(Path(path)))
  known = _names(shapes, parts)
  found: dict[str, dict[str, str]] = {}
  unknown, twice = [], []
  for name in sorted(tensors):
    layer, which = _read(name, known, parts)
    if layer is None:
      unknown.append(name)
    elif which in found.setdefault(layer, {}):
      twice.append(name)
    else:
      found[layer][which] = name
  half = [names.get("down", names.get("up", names.get("alpha")))
          for names in found.values() if not {"down", "up"} <= set(names)]
  _refuse(path, **{"of no layer of it": unknown, "of one layer": twice, "without their half": half})
  if not found:
    raise UserError(f"{path} holds no adapters")
  alphas = _Alphas(_metadata(_file(Path(path))), path)
  return _adapters(path, tensors, found, shapes, alphas, parts)


def save(
  adapters: Mapping[str, Adapter], shapes: Shapes, parts: Sequence[Part], dtype: Any = np.float32
) -> tuple[dict[str, tuple], dict[str, str]]:
  """Tensors and header in diffusers' layout, for `write_safetensors`; arguments as of `load`.

  Raises:
    UserError: for a layer that has no name there.
  """
  tensors: dict[str, tuple] = {}
  about: dict[str, dict[str, Adapter]] = {}
  for path, adapter in adapters.items():
    part, name, layout = _place(path, shapes, parts)
    # `up` is a kernel of size 1.
    up = adapter.up.reshape((1,) * (len(shapes[path]) - 2) + adapter.up.shape)
    for which, kernel in (("A", adapter.down), ("B", up)):
      array = np.asarray(layout.theirs(kernel), dtype, order="C")
      tensors[f"{part.theirs}.{name}.lora_{which}.weight"] = (
        array.shape, array.dtype, lambda array=array: array
      )
    about.setdefault(part.theirs, {})[name] = adapter
  header = {f"{of}.{k}": v for of, named in about.items() for k, v in _peft_config(named).items()}
  return tensors, {"format": "pt", METADATA: json.dumps(header, indent=2, sort_keys=True)}


def _names(shapes: Shapes, parts: Sequence[Part]) -> dict[str, str]:
  """Our path by every name that files may have for it, with "_" for "."."""
  known = {}
  for path in shapes:
    for part in parts:
      if not path.startswith(part.ours):
        continue
      for names in part.maps:
        try:
          place = names.place(f"{path.removeprefix(part.ours)}/kernel")
        except LookupError:
          continue
        if place.part[1] > 1:  # of fused projections no one is adapted by itself
          continue
        name = place.name.removesuffix(".weight")
        # Older processors knew the last projection by its list; towers stand for whole models.
        others = name.replace(".to_out.0", ".to_out"), name.removeprefix("text_model.")
        for known_as in {name, *others}:
          known.setdefault(f"{part.theirs}_{known_as}".replace(".", "_"), path)
  return known


def _read(
  name: str, known: Mapping[str, str], parts: Sequence[Part]
) -> tuple[str | None, str]:
  """The layer that a tensor is of, and which of its numbers it holds."""
  for which, pattern in _ENDINGS:
    match = re.fullmatch(pattern, name)
    if match is None:
      continue
    stem = match[1]
    for pattern, replacement in _BEGINNINGS:
      stem = re.sub(pattern, replacement, stem)
    stem = stem.replace(".", "_")
    # A file of one network alone does not name it.
    for candidate in (stem, *(f"{part.theirs}_{stem}" for part in parts)):
      if candidate in known:
        return known[candidate], which
  return None, ""


def _adapters(path, tensors, found, shapes, alphas, parts) -> dict[str, Adapter]:
  adapters, wrong, bad = {}, [], []
  for layer in sorted(found):
    names, shape = found[layer], shapes[layer]
    down, up = (_ours(tensors[names[which]].read(), len(shape)) for which in ("down", "up"))
    up = None if up is None or set(up.shape[:-2]) - {1} else up.reshape(up.shape[-2:])
    fits = down is not None and up is not None and (
      (*down.shape[:-1], up.shape[1]) == shape and down.shape[-1] == up.shape[0]
    )
    if not fits:
      given = " and ".join(str(list(tensors[names[which]].shape)) for which in ("down", "up"))
      wrong.append(f"{names['down']} ({given} for a kernel of {list(shape)})")
      continue
    rank = up.shape[0]
    if "alpha" in names:
      alpha = float(np.asarray(tensors[names["alpha"]].read(), np.float64).reshape(()))
    else:
      part, name, _ = _place(layer, shapes, parts)
      alpha = alphas.of(part.theirs, name, rank)
    if not all(np.all(np.isfinite(x)) for x in (down, up, alpha)):
      bad.append(names["down"])
    adapters[layer] = Adapter(down, up, alpha)
  _refuse(path, **{"of another shape": wrong, "with NaN or infinity": bad})
  return adapters


def _ours(array: np.ndarray, axes: int) -> np.ndarray | None:
  """[out, in, ...] of PyTorch as [..., in, out] with so many axes; None where that cannot be."""
  array = np.asarray(array, np.float32)
  array = np.moveaxis(array, (0, 1), (-1, -2)) if array.ndim > 1 else array
  if array.ndim > axes and set(array.shape[: array.ndim - axes]) == {1}:
    array = array.reshape(array.shape[array.ndim - axes :])
  if array.ndim == 2 < axes:
    array = array.reshape((1,) * (axes - 2) + array.shape)
  return np.ascontiguousarray(array) if array.ndim == axes else None


def _place(path: str, shapes: Shapes, parts: Sequence[Part]) -> tuple[Part, str, Layout]:
  """The part that a layer is of, its name there without the component, and its layout."""
  for part in parts:
    if path.startswith(part.ours):
      try:
        place = part.maps[0].place(f"{path.removeprefix(part.ours)}/kernel")
      except LookupError:
        break
      return part, place.name.removesuffix(".weight"), place.layout
  raise UserError(f"the layer {path} has no name in diffusers' files; leave it out of "
                  "model.targets when you train adapters for them")


def _peft_config(named: Mapping[str, Adapter]) -> dict[str, Any]:
  """What peft is told of one network's adapters: what most have, and who has otherwise."""
  ranks = {name: int(adapter.up.shape[0]) for name, adapter in named.items()}
  alphas = {name: _number(adapter.alpha) for name, adapter in named.items()}
  most = lambda values: Counter(values.values()).most_common(1)[0][0]  # noqa: E731
  others = lambda values: {  # noqa: E731
    name: value for name, value in values.items() if value != most(values)
  }
  return {
    "r": most(ranks), "lora_alpha": most(alphas), "rank_pattern": others(ranks),
    "alpha_pattern": others(alphas), "target_modules": sorted(named), "use_dora": False,
    "lora_bias": False, "use_rslora": False,
  }  # fmt: skip


def _number(value: float) -> int | float:
  return int(value) if float(value).is_integer() else float(value)


class _Alphas:
  """What is said of a file's alphas, outside its tensors."""

  def __init__(self, header: Mapping[str, Any], path: Any):
    self._header, self._path = header, path

  def of(self, component: str, name: str, rank: int) -> float:
    """Of one layer; its rank where nothing is said."""
    # A header of one network alone has no component before its keys.
    begins = f"{component}." if f"{component}.lora_alpha" in self._header else ""
    try:
      alpha = float(self._header.get(f"{begins}lora_alpha", rank))
      for pattern, value in self._header.get(f"{begins}alpha_pattern", {}).items():
        if name == pattern or name.endswith(f".{pattern}"):
          alpha = float(value)
      # Kalajdzievski 2023: alpha over the root of the rank.
      return alpha * rank**0.5 if self._header.get(f"{begins}use_rslora") else alpha
    except (TypeError, ValueError, AttributeError) as error:
      raise UserError(f"{self._path}: what is said of its alphas cannot be read ({error}); take "
                      "another copy of it") from error


def _metadata(path: Path) -> dict[str, Any]:
  """What peft is told of a file: beside it, or in its header; empty if nothing."""
  beside = path.with_name("adapter_config.json")
  given = "{}"
  if path.stem == "adapter_model" and beside.is_file():
    given = beside.read_text(encoding="utf-8")
  elif path.suffix == ".safetensors":
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
      given = (file.metadata() or {}).get(METADATA, "{}")
  try:
    header = json.loads(given)
    if not isinstance(header, dict):
      raise ValueError("no object")
  except ValueError as error:
    raise UserError(f"{path}: what is said of its ranks and alphas is no JSON object ({error}); "
                    "take another copy of it") from error
  return header


def _file(path: Path) -> Path:
  """The file of a folder, by the names that diffusers and peft give it."""
  if not path.is_dir():
    return path
  names = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors",
           "pytorch_lora_weights.bin", "adapter_model.bin")  # fmt: skip
  for name in names:
    if (path / name).is_file():
      return path / name
  raise UserError(f"no adapters in the folder '{path}': none of {', '.join(names)}")


def _refuse(path: Any, **problems: list[str]) -> None:
  """Raises UserError that lists the names of each kind, if there are any."""
  texts = []
  for kind, names in problems.items():
    if names:
      more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
      texts.append(f"{kind} ({len(names)}) {', '.join(names[:LISTED])}{more}")
  if texts:
    raise UserError(f"{path} does not hold adapters for this base: {'; '.join(texts)}. Name the "
                    "base that they were trained on, and adapters of low rank alone")
