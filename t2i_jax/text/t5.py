"""T5's encoder, versions 1.0 and 1.1 (Raffel et al. 2020, section 2.1; Shazeer 2020, section 2)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.networks.layers.attention import MultiHeadAttention
from t2i_jax.parallel.sharding import logical

Array = jax.Array
# feed_forward_proj of transformers: whether the MLP is gated, and its activation.
FEED_FORWARD = {
  "relu": (False, nn.relu),
  "gated-gelu": (True, lambda x: nn.gelu(x, approximate=True)),
  "gated-relu": (True, nn.relu),
  "gated-silu": (True, nn.silu),
}


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes, by transformers' names.

  Attributes:
    width: d_model.
    layers: num_layers.
    heads: num_heads.
    mlp: d_ff.
    head_size: d_kv; heads x head_size need not be the width.
    vocab_size: of the tokenizer, padded.
    feed_forward: feed_forward_proj; "relu" is version 1.0, "gated-gelu" 1.1.
    buckets, distance: relative_attention_num_buckets and _max_distance.
    epsilon: layer_norm_epsilon.
  """

  width: int
  layers: int
  heads: int
  mlp: int
  head_size: int = 64
  vocab_size: int = 32128
  feed_forward: str = "gated-gelu"
  buckets: int = 32
  distance: int = 128
  epsilon: float = 1e-6

  @classmethod
  def from_transformers(cls, given: Mapping[str, Any]) -> "Config":
    """Of a T5Config as a dict."""
    names = {"width": "d_model", "layers": "num_layers", "heads": "num_heads", "mlp": "d_ff",
             "head_size": "d_kv", "vocab_size": "vocab_size", "feed_forward": "feed_forward_proj",
             "buckets": "relative_attention_num_buckets",
             "distance": "relative_attention_max_distance", "epsilon": "layer_norm_epsilon"}
    defaults = {"feed_forward_proj": "relu", "d_model": 512, "num_layers": 6, "num_heads": 8,
                "d_ff": 2048}
    given = {**defaults, **given}
    config = cls(**{ours: given[theirs] for ours, theirs in names.items() if theirs in given})
    if config.feed_forward not in FEED_FORWARD:
      raise UserError(f"T5 with feed_forward_proj='{config.feed_forward}' is not known; one of "
                      f"{', '.join(FEED_FORWARD)}")
    return config


# Published sizes of version 1.1 (table in the release notes of google-research/text-to-text-
# transfer-transformer).
SIZES = {
  "S": Config(512, 8, 6, 1024),
  "B": Config(768, 12, 12, 2048),
  "L": Config(1024, 24, 16, 2816),
  "XL": Config(2048, 24, 32, 5120),
  "XXL": Config(4096, 24, 64, 10240),
}


def relative_buckets(length: int, buckets: int, distance: int) -> np.ndarray:
  """Buckets int [L, L] of the distances from query (row) to key (column).

  Half of them are of keys behind the query; of each half, one half is of exact distances and the
  other grows logarithmically up to `distance`.
  """
  offset = np.arange(length)[None] - np.arange(length)[:, None]
  half, size = buckets // 2, np.abs(offset)
  exact = half // 2
  # float32 as in the original, where a power of two must not fall below its bucket.
  with np.errstate(divide="ignore"):
    grown = np.log(size.astype(np.float32) / exact) / np.float32(math.log(distance / exact))
  grown = exact + (np.maximum(grown, 0) * (half - exact)).astype(np.int32)
  return half * (offset > 0) + np.where(size < exact, size, np.minimum(grown, half - 1))


class RMSNorm(nn.Module):
  """x over its root mean square, scaled; in float32 (Zhang and Sennrich 2019).

  Attributes:
    epsilon: added to the mean square.
    dtype: of the output.
  """

  epsilon: float = 1e-6
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """x [..., C] -> [..., C]."""
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x = x.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
    return (x.astype(self.dtype) * scale.astype(self.dtype)).astype(self.dtype)


class Layer(nn.Module):
  """Pre-norm attention without a scale, and an MLP, gated in version 1.1; no biases.

  Attributes:
    config: sizes.
    dtype: type of the computation.
  """

  config: Config
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, mask: Array | None, bias: Array) -> Array:
    """x [B, L, width] float32, mask bool [B, L], bias [1, H, L, L] -> [B, L, width] float32."""
    config = self.config
    dense = lambda features, name: nn.Dense(  # noqa: E731
      features, use_bias=False, dtype=self.dtype, name=name
    )
    y = RMSNorm(config.epsilon, self.dtype, name="norm_attention")(x)
    x = x + MultiHeadAttention(
      config.heads, dtype=self.dtype, head_size=config.head_size, input_bias=False,
      output_bias=False, scale=1.0, name="attention",
    )(y, mask=mask, bias=bias)  # fmt: skip
    y = RMSNorm(config.epsilon, self.dtype, name="norm_mlp")(x)
    gated, activation = FEED_FORWARD[config.feed_forward]
    if gated:
      y = activation(dense(config.mlp, "mlp_gate")(y)) * dense(config.mlp, "mlp_value")(y)
    else:
      y = activation(dense(config.mlp, "mlp_in")(y))
    # The sum of the branches is float32: beyond float16's and, at XXL, past bfloat16's precision.
    return x + dense(config.width, "mlp_out")(y)


class T5Encoder(nn.Module):
  """The encoder.

  Attributes:
    config: sizes.
    dtype: type of the computation. Norms, softmax and the residual stream are float32.
  """

  config: Config
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: Array, mask: Array | None = None) -> Array:
    """ids int [B, L], mask bool [B, L] -> [B, L, width], float32.

    Without a mask padding is attended to, as in SD3. A row without any token gives what its
    padding gives.
    """
    config, length = self.config, ids.shape[1]
    x = nn.Embed(
      config.vocab_size, config.width, embedding_init=nn.initializers.normal(1.0), name="tokens"
    )(ids)
    x = logical(x.astype(jnp.float32), "batch", "length", None)
    buckets = relative_buckets(length, config.buckets, config.distance)
    bias = nn.Embed(
      config.buckets, config.heads, embedding_init=nn.initializers.normal(config.width**-0.5),
      name="positions",
    )(buckets)  # fmt: skip
    # The type of the scores, which are float32 inside the attention.
    bias = bias.transpose(2, 0, 1)[None].astype(self.dtype)
    for i in range(config.layers):
      x = Layer(config, self.dtype, name=f"layers_{i}")(x, mask, bias)
    return RMSNorm(config.epsilon, jnp.float32, name="norm_out")(x)
