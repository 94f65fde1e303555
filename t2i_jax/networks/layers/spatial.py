"""Attention over the positions of a picture, and to a text, in the forms that U-Nets use."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.attention import MultiHeadAttention
from t2i_jax.networks.layers.embeddings import sincos_2d
from t2i_jax.networks.layers.group_norm import GroupNorm
from t2i_jax.networks.layers.stack import run_blocks

Array = jax.Array
zeros = nn.initializers.zeros
# Name of a transformer's blocks: one of them is `block_0` and so on, their stack is `block`.
BLOCK = "block"


class AttentionBlock(nn.Module):
  """Self-attention as a residual branch; a text's tokens are attended to beside the pixels.

  Ho et al. 2020, appendix B; several heads: Dhariwal and Nichol 2021, section
  3; keys and values of the text before those of the pixels: Nichol et al. 2022
  (GLIDE), section 2.1 and the released models.

  Attributes:
    heads: of the attention; must divide the channels.
    groups, epsilon: of the norm.
    zero_output: start the output projection at zero.
    dtype: type of the computation.
  """

  heads: int = 1
  groups: int = 32
  epsilon: float = 1e-6
  zero_output: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, context: Array | None = None, mask: Array | None = None
  ) -> Array:
    """x [B, H, W, C], context [B, L, D], mask bool [B, L] -> [B, H, W, C]."""
    batch, height, width, channels = x.shape
    tokens = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm")(x)
    tokens = tokens.reshape(batch, height * width, channels)
    attention = MultiHeadAttention(
      self.heads, zero_output=self.zero_output, dtype=self.dtype, name="attention"
    )
    h = attention(tokens, prefix=context, mask=mask)
    return x + h.reshape(x.shape)


class CompactAttention(nn.Module):
  """Self-attention over the pixels, cross-attention to the text, and an MLP, with positions.

  Attributes:
    heads: of both attentions.
    groups, epsilon: of the group norm.
    positions: add fixed 2-D positions to the tokens.
    mlp_ratio: hidden width of the MLP over the channels; 0 for none.
    dtype: type of the computation.
  """

  heads: int
  groups: int = 32
  epsilon: float = 1e-6
  positions: bool = True
  mlp_ratio: float = 0.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, context: Array | None = None, mask: Array | None = None
  ) -> Array:
    """x [B, H, W, C], context [B, L, D], mask bool [B, L] -> [B, H, W, C]."""
    batch, height, width, channels = x.shape
    attention = lambda name: MultiHeadAttention(  # noqa: E731
      self.heads, zero_output=True, dtype=self.dtype, name=name
    )
    tokens = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm")(x)
    tokens = tokens.reshape(batch, height * width, channels)
    if self.positions:
      tokens = tokens + jnp.asarray(sincos_2d(height, width, channels), self.dtype)
    h = x.reshape(tokens.shape)
    h = h + attention("self_attention")(tokens)
    if context is not None:
      y = nn.LayerNorm(dtype=self.dtype, name="norm_cross")(h)
      if self.positions:
        y = y + jnp.asarray(sincos_2d(height, width, channels), self.dtype)
      h = h + attention("cross_attention")(y, context, mask)
    if self.mlp_ratio:
      y = nn.LayerNorm(dtype=self.dtype, name="norm_mlp")(h)
      hidden = int(self.mlp_ratio * channels)
      y = nn.gelu(nn.Dense(hidden, dtype=self.dtype, name="mlp_in")(y))
      h = h + nn.Dense(channels, dtype=self.dtype, kernel_init=zeros, name="mlp_out")(y)
    return h.reshape(x.shape)


class TransformerBlock(nn.Module):
  """Self-attention, cross-attention and a gated MLP (Rombach et al. 2022, appendix E.2.1).

  Attributes:
    heads: of both attentions.
    dtype: type of the computation.
  """

  heads: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, each: None, context: Array | None = None, mask: Array | None = None
  ) -> Array:
    """x [B, T, C], context [B, L, D], mask bool [B, L] -> [B, T, C]; see `stack.run_blocks`."""
    channels = x.shape[-1]
    norm = lambda name: nn.LayerNorm(1e-5, dtype=self.dtype, name=name)  # noqa: E731
    attention = lambda name: MultiHeadAttention(  # noqa: E731
      self.heads, input_bias=False, dtype=self.dtype, name=name
    )
    dense = lambda size, name: nn.Dense(size, dtype=self.dtype, name=name)  # noqa: E731
    x = x + attention("self_attention")(norm("norm_self")(x))
    # Without a text it is self-attention once more, as in the models that have none.
    x = x + attention("cross_attention")(norm("norm_cross")(x), context, mask)
    hidden, gate = jnp.split(dense(8 * channels, "mlp_in")(norm("norm_mlp")(x)), 2, axis=-1)
    return x + dense(channels, "mlp_out")(hidden * nn.gelu(gate, approximate=False))


class SpatialTransformer(nn.Module):
  """A picture's positions as tokens of a small transformer (Rombach et al. 2022, appendix E.2.1).

  Attributes:
    heads: of the attentions; must divide the channels.
    depth: transformer blocks.
    groups: of the norm.
    remat: compute each block again in the backward pass rather than keep what is in it.
    scan: several blocks are one program and stacked parameters; see `stack.run_blocks`.
    dtype: type of the computation.
  """

  heads: int
  depth: int = 1
  groups: int = 32
  remat: bool = False
  scan: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, context: Array | None = None, mask: Array | None = None
  ) -> Array:
    """x [B, H, W, C], context [B, L, D], mask bool [B, L] -> [B, H, W, C]."""
    batch, height, width, channels = x.shape
    make = lambda name: TransformerBlock(self.heads, self.dtype, name=name)  # noqa: E731
    h = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
    h = h.reshape(batch, height * width, channels)
    h = nn.Dense(channels, dtype=self.dtype, name="project_in")(h)
    h, _ = run_blocks(
      make, BLOCK, self.depth, h, (context, mask), remat="full" if self.remat else "none",
      scan=self.scan and self.depth > 1,
    )
    h = nn.Dense(channels, dtype=self.dtype, kernel_init=zeros, name="project_out")(h)
    return x + h.reshape(x.shape)
