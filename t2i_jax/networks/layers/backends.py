"""Which program computes an attention, by the platform that it is compiled for.

The same numbers, up to rounding: XLA's products and softmax anywhere; on a TPU the blocks of a
Pallas kernel, and on a GPU those of cuDNN, where the scores of all pairs would be large.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from t2i_jax.parallel.mesh import batch_axes

Array = jax.Array
# Queries from which a TPU's kernel is faster than XLA: what maxdiffusion takes as its least.
LONG = 4096
BLOCK = 512  # queries and keys a step of that kernel
GPUS = ("gpu", "cuda")


def platform() -> str:
  """What is compiled for: "cpu", "gpu" or "tpu", also where there is none and a mesh names it."""
  device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
  return device.platform if device is not None else jax.default_backend()


def choose(
  query: Array, key: Array, mask: Array | None, bias: Array | None
) -> Callable[..., Array] | None:
  """The fused attention for these arrays, called with (query, key, value, mask, scale).

  None where XLA's is to be taken: short sequences, biases, masks of pairs of tokens, and what a
  kernel does not take.
  """
  where = platform()
  if bias is not None or not (mask is None or mask.shape[1:3] == (1, 1)):
    return None
  if where == "tpu" and query.shape[1] >= LONG and _divides(query):
    return tpu_attention
  half = query.dtype in (jnp.bfloat16, jnp.float16)
  size = query.shape[-1]
  if where in GPUS and half and mask is None and size % 8 == 0 and size <= 128 and _recent():
    return gpu_attention
  return None


def products(
  query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None,
  scale: float | None,
) -> Array:
  """XLA's products and softmax, for what `choose` has no kernel for; arguments as of `attend`."""
  plain = cpu_attention if platform() == "cpu" else jax.nn.dot_product_attention
  return plain(query, key, value, bias, mask, scale=scale)


def cpu_attention(
  query: Array, key: Array, value: Array, bias: Array | None, mask: Array | None,
  scale: float | None,
) -> Array:
  """`jax.nn.dot_product_attention`, with products that XLA for CPUs computes faster.

  Those over heads that come before the tokens: of 8 x 6 heads of 64 channels and 256 tokens, 58 in
  place of 88 ms forward and backward, on two cores.
  """
  scale = query.shape[-1] ** -0.5 if scale is None else scale
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  exact = jnp.promote_types(query.dtype, jnp.float32)
  scores = jnp.einsum("bhtd,bhsd->bhts", query, key, preferred_element_type=exact) * scale
  if bias is not None:
    scores = (scores + bias).astype(scores.dtype)
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.asarray(-0.7 * jnp.finfo(exact).max, exact))
  weights = jax.nn.softmax(scores).astype(key.dtype)
  return jnp.swapaxes(jnp.einsum("bhts,bhsd->bhtd", weights, value), 1, 2)


def gpu_attention(
  query: Array, key: Array, value: Array, mask: Array | None, scale: float
) -> Array:
  """cuDNN's flash attention; see `choose`."""
  return jax.nn.dot_product_attention(query, key, value, scale=scale, implementation="cudnn")


def tpu_attention(
  query: Array, key: Array, value: Array, mask: Array | None, scale: float
) -> Array:
  """Splash attention, a Pallas kernel; on a mesh, each device's own examples, heads and queries.

  Args:
    query: [B, T, H, D].
    key, value: [B, S, H, D].
    mask: bool [B or 1, 1, 1, S], the keys that count, or None for all.
    scale: of the scores.
  """
  keys = jnp.ones((1, key.shape[1]), bool) if mask is None else mask[:, 0, 0]
  keys = jnp.broadcast_to(keys, key.shape[:2])
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return _splash(query * scale, key, value, keys)
  shared = PartitionSpec(batch_axes, None, "tensor", None)
  own = PartitionSpec(batch_axes, "sequence", "tensor", None)
  return jax.shard_map(
    _splash, in_specs=(own, shared, shared, PartitionSpec(batch_axes, None)), out_specs=own,
    check_vma=False,
  )(query * scale, key, value, keys)


def _splash(query: Array, key: Array, value: Array, keys: Array) -> Array:
  """Of scaled queries [B, T, H, D]; keys bool [B, S] are those that count."""
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  length, size = query.shape[1], query.shape[-1]
  # Whole blocks, and whole lanes of a TPU in a head: 64 channels would be padded there anyway.
  query, key, value = (
    jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, -size % 128)))
    for x in (query, key, value)
  )
  keys = jnp.pad(keys, ((0, 0), (0, key.shape[1] - keys.shape[1])))
  full = masks.FullMask((query.shape[1], key.shape[1]))
  blocks = splash.BlockSizes(
    block_q=BLOCK, block_kv=BLOCK, block_kv_compute=BLOCK, block_q_dkv=BLOCK, block_kv_dkv=BLOCK,
    block_kv_dkv_compute=BLOCK, block_q_dq=BLOCK, block_kv_dq=BLOCK,
  )  # fmt: skip
  kernel = splash.make_splash_mha(
    masks.MultiHeadMask([full] * query.shape[2]), block_sizes=blocks, head_shards=1,
    q_seq_shards=1, interpret=platform() != "tpu",
  )  # fmt: skip
  # A query reads the keys of its own segment: the second is of those that do not count.
  segments = splash.SegmentIds(
    jnp.ones(query.shape[:2], jnp.int32), jnp.where(keys, 1, 0).astype(jnp.int32)
  )
  heads_first = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
  out = jax.vmap(kernel)(*heads_first, segments)
  return out.transpose(0, 2, 1, 3)[:, :length, :, :size]


def _divides(query: Array) -> bool:
  """Whether examples, queries and heads divide over the mesh that each has its axis of."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return True
  if any(kind != AxisType.Auto for kind in mesh.axis_types):
    return False
  parts = 1
  for axis in batch_axes:
    parts *= mesh.shape[axis]
  batch, length, heads, _ = query.shape
  return not (
    batch % parts or length % mesh.shape["sequence"] or heads % mesh.shape["tensor"]
  )


def _recent() -> bool:
  """Whether this GPU is of a generation that cuDNN has flash attention for (Ampere on)."""
  return float(jax.devices()[0].compute_capability) >= 8.0
