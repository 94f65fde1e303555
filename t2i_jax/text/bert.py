"""BERT (Devlin et al. 2019), and the transformer of latent diffusion (Rombach et al. 2022, B.2)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError
from t2i_jax.networks.layers.attention import MultiHeadAttention
from t2i_jax.text.layers import EPSILON, PreNormLayer, gelu

Array = jax.Array
normal = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes, by transformers' names.

  Attributes:
    width: hidden_size.
    layers: num_hidden_layers.
    heads: num_attention_heads.
    mlp: intermediate_size.
    vocab_size: of the tokenizer.
    length: max_position_embeddings.
    segments: type_vocab_size.
    epsilon: layer_norm_eps.
  """

  width: int = 768
  layers: int = 12
  heads: int = 12
  mlp: int = 3072
  vocab_size: int = 30522
  length: int = 512
  segments: int = 2
  epsilon: float = 1e-12

  @classmethod
  def from_transformers(cls, given: Mapping[str, Any]) -> "Config":
    """Of a BertConfig as a dict."""
    if given.get("hidden_act", "gelu") != "gelu":
      raise UserError(f"BERT with hidden_act='{given['hidden_act']}' is not known; only 'gelu'")
    names = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
             "mlp": "intermediate_size", "vocab_size": "vocab_size",
             "length": "max_position_embeddings", "segments": "type_vocab_size",
             "epsilon": "layer_norm_eps"}
    return cls(**{ours: given[theirs] for ours, theirs in names.items() if theirs in given})


class BERT(nn.Module):
  """The bidirectional transformer, with norms behind its branches.

  Attributes:
    config: sizes.
    pool: whether the first token's vector passes a dense layer and tanh.
    dtype: type of the computation.
  """

  config: Config
  pool: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, ids: Array, mask: Array | None = None, segments: Array | None = None
  ) -> tuple[Array, Array | None]:
    """ids int [B, L], mask bool [B, L], segments int [B, L] -> [B, L, width], [B, width].

    Segments are 0 if not given.
    """
    config = self.config
    norm = lambda name: nn.LayerNorm(config.epsilon, dtype=self.dtype, name=name)  # noqa: E731
    x = nn.Embed(config.vocab_size, config.width, embedding_init=normal, name="tokens")(ids)
    x = x + self.param("positions", normal, (config.length, config.width))[: ids.shape[1]]
    table = self.param("segments", normal, (config.segments, config.width))
    x = norm("norm_in")(x + (table[0] if segments is None else table[segments]))
    for i in range(config.layers):
      x = _PostNormLayer(config, self.dtype, name=f"layers_{i}")(x, mask)
    if not self.pool:
      return x, None
    return x, jnp.tanh(nn.Dense(config.width, dtype=self.dtype, name="pooled")(x[:, 0]))


class _PostNormLayer(nn.Module):
  config: Config
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Array, mask: Array | None) -> Array:
    config = self.config
    y = MultiHeadAttention(config.heads, dtype=self.dtype, name="attention")(x, mask=mask)
    x = nn.LayerNorm(config.epsilon, dtype=self.dtype, name="norm_attention")(x + y)
    y = nn.Dense(config.width, dtype=self.dtype, name="mlp_out")(
      gelu(nn.Dense(config.mlp, dtype=self.dtype, name="mlp_in")(x))
    )
    return nn.LayerNorm(config.epsilon, dtype=self.dtype, name="norm_mlp")(x + y)


@dataclasses.dataclass(frozen=True)
class LDMConfig:
  """Sizes of latent diffusion's transformer; the defaults are the published model's.

  Attributes:
    width: d_model.
    layers: encoder_layers.
    heads: encoder_attention_heads.
    head_size: head_dim; heads x head_size need not be the width.
    mlp: encoder_ffn_dim.
    vocab_size, length: of BERT's tokenizer, and max_position_embeddings.
  """

  width: int = 1280
  layers: int = 32
  heads: int = 8
  head_size: int = 64
  mlp: int = 5120
  vocab_size: int = 30522
  length: int = 77

  @classmethod
  def from_diffusers(cls, given: Mapping[str, Any]) -> "LDMConfig":
    """Of diffusers' LDMBertConfig as a dict."""
    names = {"width": "d_model", "layers": "encoder_layers", "heads": "encoder_attention_heads",
             "head_size": "head_dim", "mlp": "encoder_ffn_dim", "vocab_size": "vocab_size",
             "length": "max_position_embeddings"}
    return cls(**{ours: given[theirs] for ours, theirs in names.items() if theirs in given})


class LDMTransformer(nn.Module):
  """A bidirectional pre-norm transformer over BERT's tokens, padding attended to.

  Attributes:
    config: sizes.
    dtype: type of the computation.
  """

  config: LDMConfig
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: Array, mask: Array | None = None) -> Array:
    """ids int [B, L], mask bool [B, L] or None, as it was trained -> [B, L, width]."""
    config = self.config
    x = nn.Embed(config.vocab_size, config.width, embedding_init=normal, name="tokens")(ids)
    x = x + self.param("positions", normal, (config.length, config.width))[: ids.shape[1]]
    x = x.astype(self.dtype)
    for i in range(config.layers):
      x = PreNormLayer(
        config.heads, config.mlp, head_size=config.head_size, input_bias=False, dtype=self.dtype,
        name=f"layers_{i}",
      )(x, mask)  # fmt: skip
    return nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm_out")(x)
