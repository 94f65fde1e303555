"""Floating-point operations of a program, counted over its jaxpr.

What counts: matrix products, convolutions and fused attention, a multiply and
an add being 2 operations; elementwise work, reductions and normalisations are
left out, as in published counts. The count is of the program as written, over
all devices: a scan counts its body times its length, what rematerialisation
computes a second time is not counted, and what the compiler would merge or
drop is.

Conventions:
  convolution  every product of a window, those with padding included, those
               with the zeros that input dilation inserts (transposed
               convolutions, gradients of strided ones) not
  attention    all query-key pairs, masked ones included; fused kernels like the
               matrix products they replace, without recomputation
  while_loop   its trip count is unknown: body and condition once
               (`fori_loop` with constant bounds is a scan)
  cond         its dearest branch; under `every(n, ...)` the mean over n calls;
               the default one of `platform_dependent`
  shard_map    its body on every device of the mapped axes
  pallas_call  its own cost estimate, else its body on every grid point
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from t2i_jax.parallel.chips import CHIPS

# Dense bfloat16 FLOP/s of one device, by the whole of its `device_kind`.
# Sources: `chips.py`; NVIDIA A100, H100 and H200 data sheets, SXM modules, without sparsity.
_PEAK = (
  (r"TPU v4", CHIPS["v4"].flops),
  (r"TPU v5 lite|TPU v5e", CHIPS["v5e"].flops),
  (r"TPU v5p?", CHIPS["v5p"].flops),
  (r"TPU v6 lite|TPU v6e", CHIPS["v6e"].flops),
  (r"NVIDIA A100.*", 312e12),
  (r"NVIDIA H100 80GB HBM3", 989e12),
  (r"NVIDIA H200", 989e12),
)


def peak_flops(device: jax.Device) -> float | None:
  """Peak dense bfloat16 FLOP/s of a device; None where it is not known."""
  for kind, peak in _PEAK:
    if re.fullmatch(kind, device.device_kind):
      return peak
  return None


def every(n: int, due: jax.Array, true_fn: Callable, false_fn: Callable, *operands: Any) -> Any:
  """`lax.cond(due, true_fn, false_fn, *operands)` for a `due` true once in n calls.

  Its name scope tells `count` the cadence. Under `vmap` keep `due` unbatched,
  or both branches run at every call.
  """
  with jax.named_scope(f"every_{n}"):
    return lax.cond(due, true_fn, false_fn, *operands)


def count(program: Any, *args: Any) -> float:
  """FLOPs of one call, by the conventions of this module.

  Args:
    program: a function, or a jaxpr (of `jax.make_jaxpr`, or `.jaxpr` of a
      traced `jax.jit`).
    args: the function's arguments; trees of arrays or ShapeDtypeStructs.
  """
  jaxpr = program if hasattr(program, "eqns") else jax.make_jaxpr(program)(*args)
  return float(sum(_equation(eqn) for eqn in jaxpr.eqns))


def _equation(eqn: Any) -> float:
  # jax marks what a gradient computes again of a checkpointed function.
  if "rematted_computation" in str(eqn.source_info.name_stack):
    return 0.0
  rule = _RULES.get(eqn.primitive.name)
  if rule is not None:
    return rule(eqn)
  # jit, checkpoint, custom_jvp, custom_vjp and other calls.
  return sum(count(jaxpr) for jaxpr in _jaxprs(eqn))


def _jaxprs(eqn: Any) -> list[Any]:
  """The jaxprs among an equation's parameters, or in tuples of them."""
  values = []
  for value in eqn.params.values():
    values += value if isinstance(value, tuple | list) else (value,)
  return [value for value in values if hasattr(value, "eqns")]


def _dot_general(eqn: Any) -> float:
  (contracted, _), _ = eqn.params["dimension_numbers"]
  lhs = eqn.invars[0].aval.shape
  return 2.0 * math.prod(lhs[axis] for axis in contracted) * eqn.outvars[0].aval.size


def _convolution(eqn: Any) -> float:
  params = eqn.params
  numbers = params["dimension_numbers"]
  kernel = eqn.invars[1].aval.shape
  out = eqn.outvars[0].aval.shape
  batch, features = (out[axis] for axis in numbers.out_spec[:2])
  # The kernel's input features are those of one group, and a batch group is
  # summed over no more than they are.
  products = batch * features * kernel[numbers.rhs_spec[1]]
  for axis, (out_axis, kernel_axis) in enumerate(
    zip(numbers.out_spec[2:], numbers.rhs_spec[2:], strict=True)
  ):
    start = np.arange(out[out_axis]) * params["window_strides"][axis] - params["padding"][axis][0]
    tap = np.arange(kernel[kernel_axis]) * params["rhs_dilation"][axis]
    on_input = (start[:, None] + tap[None, :]) % params["lhs_dilation"][axis] == 0
    products *= int(on_input.sum())
  return 2.0 * products


def _scan(eqn: Any) -> float:
  return eqn.params["length"] * count(eqn.params["jaxpr"])


def _cond(eqn: Any) -> float:
  branches = [count(branch) for branch in eqn.params["branches"]]
  if eqn.params.get("branches_platforms"):
    return branches[-1]
  # The scope is the innermost, but for the transformations around it, as in
  # `transpose(jvp(every_16))`.
  cadence = re.search(r"\bevery_(\d+)\)*$", str(eqn.source_info.name_stack))
  if cadence:
    not_due, due = branches
    n = int(cadence[1])
    return (due + (n - 1) * not_due) / n
  return max(branches)


def _shard_map(eqn: Any) -> float:
  shape = eqn.params["mesh"].shape
  copies = math.prod(shape[name] for name in eqn.params["newly_manual_axes"])
  return copies * count(eqn.params["jaxpr"])


def _pallas_call(eqn: Any) -> float:
  estimate = eqn.params["cost_estimate"]
  if estimate is not None:
    return float(estimate.flops)
  return math.prod(eqn.params["grid_mapping"].grid) * count(eqn.params["jaxpr"])


def _attention(eqn: Any) -> float:
  """Forward of cuDNN's attention: the products with keys and with values."""
  query, key, value = (v.aval.shape for v in eqn.invars[:3])
  heads_first = eqn.params["layout"] == 1  # [B, N, T, H], else [B, T, N, H]
  length = key[2] if heads_first else key[1]
  return 2.0 * math.prod(query[:3]) * length * (query[3] + value[3])


def _attention_gradient(eqn: Any) -> float:
  """Twice the forward: the kernel's second product with the keys is recomputation."""
  return 2 * _attention(eqn)


_RULES: dict[str, Callable[[Any], float]] = {
  "dot_general": _dot_general,
  "conv_general_dilated": _convolution,
  "scan": _scan,
  "cond": _cond,
  "shard_map": _shard_map,
  "pallas_call": _pallas_call,
  "dot_product_attention_fwd_wrapper": _attention,
  "dot_product_attention_bwd_wrapper": _attention_gradient,
}
