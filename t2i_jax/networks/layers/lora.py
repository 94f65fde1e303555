"""Low-rank adapters of any network's Dense and Conv layers (Hu et al. 2021, LoRA, section 4.1).

A layer's output gets `scale * (x down) up` added, `down` of few columns, so that a kernel W becomes
W + scale * down up; `scale` is alpha / rank. Networks know nothing of it: their variables hold one
collection more, `lora`, with `{"down", "up", "scale"}` at the path of each adapted layer, and
`adapters_on` intercepts the calls of these layers. So no changed copy of a kernel is made, and the
gradient of a frozen kernel is never computed.
"""

import re
import zlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

Array = jax.Array
LORA = "lora"
KERNEL = "kernel"
# Between plus and minus 1 / sqrt(inputs of a unit), as the paper's authors published it.
_init_down = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def kernels(params: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """Shapes of all kernels [..., in, out] in a tree, by the path of their layer."""
  flat = flatten_dict(dict(params), sep="/")
  return {
    path.removesuffix(f"/{KERNEL}"): tuple(leaf.shape) for path, leaf in flat.items()
    if path.endswith(f"/{KERNEL}") and len(leaf.shape) > 1
  }


def chosen(paths: Iterable[str], patterns: Iterable[str]) -> list[str]:
  """The paths that are to be adapted.

  Args:
    paths: of layers.
    patterns: regular expressions that are searched for in a path; the first that is found decides,
      and one that begins with "!" leaves the layer out.
  """
  found = []
  for path in paths:
    for pattern in patterns:
      if re.search(pattern.removeprefix("!"), path):
        if not pattern.startswith("!"):
          found.append(path)
        break
  return found


def init(rng: Array, params: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, Any]:
  """Fresh adapters, which change nothing: `up` is zero.

  Args:
    rng: of the draws.
    params: the tree that is adapted; shapes are enough.
    ranks: of each adapted layer, by its path.

  Returns:
    the tree of the adapted layers, of `down` [..., in, rank], with the kernel's first axes, and
    `up` [rank, out]; float32.
  """
  shapes, flat = kernels(params), {}
  for path, rank in ranks.items():
    *before, outputs = shapes[path]
    key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
    flat[f"{path}/down"] = _init_down(key, (*before, rank))
    flat[f"{path}/up"] = jnp.zeros((rank, outputs))
  return unflatten_dict(flat, sep="/")


def scaled(adapters: Mapping[str, Any], alphas: Mapping[str, Any]) -> dict[str, Any]:
  """The collection `lora` of adapters, of which `alphas` has `{"alpha"}` at the same paths."""
  flat = flatten_dict(dict(adapters), sep="/")
  for path, alpha in flatten_dict(dict(alphas), sep="/").items():
    layer = path.removesuffix("/alpha")
    flat[f"{layer}/scale"] = alpha / flat[f"{layer}/up"].shape[0]
  return unflatten_dict(flat, sep="/")


def merge(params: Mapping[str, Any], lora: Mapping[str, Any], factor: float = 1.0) -> Any:
  """Parameters whose kernels are W + factor * scale * down up, of the types that they have.

  Args:
    params: the tree that is adapted, of arrays of jax or numpy.
    lora: of `scaled`; its tree is part of theirs.
    factor: on all adapters; -1 takes out what was merged.
  """
  flat, lora = flatten_dict(dict(params), sep="/"), flatten_dict(dict(lora), sep="/")
  for name, scale in lora.items():
    if not name.endswith("/scale"):
      continue
    path = name.removesuffix("/scale")
    kernel = flat[f"{path}/{KERNEL}"]
    added = factor * scale * (lora[f"{path}/down"] @ lora[f"{path}/up"])
    flat[f"{path}/{KERNEL}"] = (kernel.astype("float32") + added).astype(kernel.dtype)
  return unflatten_dict(flat, sep="/")


def adapters_on(
  dropout: float = 0.0, rng: Array | None = None, used: set[str] | None = None
) -> AbstractContextManager[None]:
  """Within this context networks compute with the adapters that their variables hold.

  Args:
    dropout: probability of leaving out an input of the low-rank path, in training.
    rng: of the dropout.
    used: is filled with the paths, within their networks, of the layers whose adapters were traced.
  """
  return nn.intercept_methods(partial(_intercept, dropout, rng, used))


def _intercept(dropout, rng, used, call, args, kwargs, context):
  y = call(*args, **kwargs)
  module = context.module
  if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.Conv):
    return y
  if not module.has_variable(LORA, "down"):
    return y
  path = "/".join(module.path)
  if used is not None:
    used.add(path)
  # The type of the computation: that of the layer's own result.
  x = jnp.asarray(args[0] if args else kwargs["inputs"], y.dtype)
  if dropout:
    kept = jax.random.bernoulli(
      jax.random.fold_in(rng, zlib.crc32(path.encode())), 1.0 - dropout, x.shape
    )
    x = jnp.where(kept, x / (1.0 - dropout), 0).astype(y.dtype)
  down, up, scale = (module.get_variable(LORA, name) for name in ("down", "up", "scale"))
  return y + _reduced(module, x, down.astype(y.dtype)) @ (scale * up).astype(y.dtype)


def _reduced(module: nn.Dense | nn.Conv, x: Array, down: Array) -> Array:
  """x [..., in] in few channels, by the layer's own kind of product."""
  if isinstance(module, nn.Dense):
    return x @ down
  if module.feature_group_count != 1:
    raise ValueError(f"{module.name} is a convolution of groups, whose kernel is no one matrix")
  layer = module.clone(
    parent=None, name=None, features=down.shape[-1], use_bias=False, dtype=x.dtype
  )
  return layer.apply({"params": {KERNEL: down}}, x)
