"""A small transformer text encoder, trained with the model that it feeds."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.attention import MultiHeadAttention

Array = jax.Array


class TransformerEncoder(nn.Module):
  """Pre-norm bidirectional transformer over token ids (Vaswani et al. 2017; Xiong et al. 2020).

  Attributes:
    vocab_size, length: of the tokenizer; ids are [B, length].
    width, layers, heads: of the network.
    pool: how the caption's one vector is made. "mean": masked mean of the
      features. "flatten": a projection of all features in order, which keeps
      what was said where; right for short captions.
    dtype: type of the computation.
  """

  vocab_size: int
  length: int
  width: int = 128
  layers: int = 2
  heads: int = 4
  pool: Literal["mean", "flatten"] = "mean"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: Array, mask: Array) -> tuple[Array, Array]:
    """ids int [B, L], mask bool [B, L] -> features [B, L, width], pooled [B, width]."""
    # With 0.02, small networks trained on captions of two objects never learned which of the two
    # is where (docs/learning.md).
    init = nn.initializers.normal(1.0)
    x = nn.Embed(self.vocab_size, self.width, embedding_init=init, name="tokens")(ids)
    x = x + self.param("positions", init, (self.length, self.width))[: ids.shape[1]]
    x = x.astype(self.dtype)
    # Branches that start at zero learn it some hundreds of steps sooner than random ones.
    zeros = nn.initializers.zeros
    for i in range(self.layers):
      y = nn.LayerNorm(dtype=self.dtype, name=f"norm_attention_{i}")(x)
      x = x + MultiHeadAttention(
        self.heads, zero_output=True, dtype=self.dtype, name=f"attention_{i}"
      )(y, mask=mask)
      y = nn.LayerNorm(dtype=self.dtype, name=f"norm_mlp_{i}")(x)
      y = nn.gelu(nn.Dense(4 * self.width, dtype=self.dtype, name=f"mlp_in_{i}")(y))
      x = x + nn.Dense(self.width, dtype=self.dtype, kernel_init=zeros, name=f"mlp_out_{i}")(y)
    x = nn.LayerNorm(dtype=self.dtype, name="norm_out")(x)
    weights = mask[..., None].astype(x.dtype)
    if self.pool == "flatten":
      pooled = (x * weights).reshape(x.shape[0], -1)
    else:
      pooled = jnp.sum(x * weights, axis=1) / jnp.maximum(jnp.sum(weights, axis=1), 1.0)
    return x, nn.Dense(self.width, dtype=self.dtype, name="pooled")(pooled)
