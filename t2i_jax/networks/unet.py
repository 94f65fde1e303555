"""The U-Net of the diffusion line: residual blocks, self- and cross-attention, skips.

Ho et al. 2020, appendix B (blocks, group norm, attention); Dhariwal and Nichol
2021, section 3 (scale-shift from the embedding); Rombach et al. 2022, section
3.3 (cross-attention to the text).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.attention import MultiHeadAttention
from t2i_jax.networks.layers.embeddings import (
  coordinate_channels,
  sincos_2d,
  timestep_embedding,
)
from t2i_jax.networks.layers.group_norm import GroupNorm
from t2i_jax.parallel.sharding import logical

Array = jax.Array
zeros = nn.initializers.zeros


class ResBlock(nn.Module):
  """Two 3x3 convolutions with group norm, conditioned between them.

  Attributes:
    channels: of the output.
    groups: of the norms.
    scale_shift: condition by scale and shift after the second norm (AdaGN);
      otherwise by an added bias before it.
    dropout: before the second convolution.
    dtype: type of the computation.
  """

  channels: int
  groups: int = 32
  scale_shift: bool = True
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, embedding: Array, train: bool) -> Array:
    """x [B, H, W, C], embedding [B, E] -> [B, H, W, channels]."""
    conv = lambda name, init: nn.Conv(  # noqa: E731
      self.channels, (3, 3), dtype=self.dtype, kernel_init=init, name=name
    )
    norm = lambda name: GroupNorm(self.groups, dtype=self.dtype, name=name)  # noqa: E731
    h = conv("conv_in", nn.initializers.lecun_normal())(nn.silu(norm("norm_in")(x)))
    size = 2 * self.channels if self.scale_shift else self.channels
    condition = nn.Dense(size, dtype=self.dtype, name="condition")(nn.silu(embedding))
    condition = condition[:, None, None, :]
    if self.scale_shift:
      scale, shift = jnp.split(condition, 2, axis=-1)
      h = norm("norm_out")(h) * (1 + scale) + shift
    else:
      h = norm("norm_out")(h + condition)
    h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
    h = conv("conv_out", zeros)(h)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="skip")(x)
    return logical(x + h, "batch", None, None, None)


class SpatialAttention(nn.Module):
  """Self-attention over the pixels, cross-attention to the text, and an MLP.

  Attributes:
    head_channels: width of a head.
    groups: of the norm.
    positions: add fixed 2-D positions to the tokens.
    mlp_ratio: hidden width of the MLP over the channels; 0 for none.
    dtype: type of the computation.
  """

  head_channels: int
  groups: int = 32
  positions: bool = True
  mlp_ratio: float = 0.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, context: Array | None, mask: Array | None) -> Array:
    """x [B, H, W, C], context [B, L, D], mask bool [B, L] -> [B, H, W, C]."""
    batch, height, width, channels = x.shape
    heads = max(channels // self.head_channels, 1)
    attention = lambda name: MultiHeadAttention(  # noqa: E731
      heads, zero_output=True, dtype=self.dtype, name=name
    )
    tokens = GroupNorm(self.groups, dtype=self.dtype, name="norm")(x)
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


class UNet(nn.Module):
  """Predicts from a noised picture, its time and a text.

  Attributes:
    channels: of the first level.
    multipliers: channels of each level, as multiples.
    blocks: residual blocks a level on the way down; one more on the way up.
    attention_levels: levels (0 is the finest) that attend.
    head_channels: width of an attention head.
    groups: of the group norms; must divide every level's channels.
    patch: the picture is unshuffled into patch x patch pixels a position first,
      so that no level works at full resolution.
    coordinates: frequencies of the sine-cosine coordinate channels beside the
      input; 0 for none.
    positions: fixed 2-D positions in the attention.
    mlp_ratio: of the attention blocks' MLP; 0 for none.
    scale_shift, dropout: of the residual blocks.
    dtype: type of the computation; the last norm and convolution are float32.
  """

  channels: int = 128
  multipliers: tuple[int, ...] = (1, 2, 2, 2)
  blocks: int = 2
  attention_levels: tuple[int, ...] = (1,)
  head_channels: int = 64
  groups: int = 32
  patch: int = 1
  coordinates: int = 0
  positions: bool = True
  mlp_ratio: float = 0.0
  scale_shift: bool = True
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Array,
    t: Array,
    context: Array | None = None,
    mask: Array | None = None,
    pooled: Array | None = None,
    layout: Array | None = None,
    train: bool = False,
  ) -> Array:
    """Prediction from noised pictures.

    Args:
      x: [B, H, W, C]; H and W divide by patch * 2^(levels - 1).
      t: [B] times, in the process's own units.
      context: [B, L, D] text features for cross-attention.
      mask: bool [B, L].
      pooled: [B, P] text vector, added to the time embedding.
      layout: [B, S, S, F] features of a coarse grid, put beside the picture; S
        divides H / patch and W / patch.
      train: whether dropout is on (needs the `dropout` rng).

    Returns:
      float32 [B, H, W, C].
    """
    conv = lambda channels, name, **kw: nn.Conv(  # noqa: E731
      channels, (3, 3), dtype=self.dtype, name=name, **kw
    )
    embedding = self._embedding(t, pooled)
    context = None if context is None else context.astype(self.dtype)

    def level(h: Array, i: int, name: str) -> Array:
      channels = self.channels * self.multipliers[i]
      h = ResBlock(
        channels, self.groups, self.scale_shift, self.dropout, self.dtype, name=f"{name}_block"
      )(h, embedding, train)
      if i in self.attention_levels:
        h = self._attention(f"{name}_attention")(h, context, mask)
      return h

    out_channels = x.shape[-1]
    h = unshuffle(x.astype(self.dtype), self.patch)
    if self.coordinates:
      places = jnp.asarray(coordinate_channels(*h.shape[1:3], self.coordinates), self.dtype)
      h = jnp.concatenate([h, jnp.broadcast_to(places, (*h.shape[:3], places.shape[-1]))], -1)
    if layout is not None:
      h = jnp.concatenate([h, enlarged(layout.astype(self.dtype), *h.shape[1:3])], axis=-1)
    h = conv(self.channels, "conv_in")(h)
    skips = [h]
    for i in range(len(self.multipliers)):
      for j in range(self.blocks):
        h = level(h, i, f"down_{i}_{j}")
        skips.append(h)
      if i < len(self.multipliers) - 1:
        h = conv(h.shape[-1], f"down_{i}_sample", strides=2)(h)
        skips.append(h)
    h = self._middle(h, embedding, context, mask, train)
    for i in reversed(range(len(self.multipliers))):
      for j in range(self.blocks + 1):
        h = level(jnp.concatenate([h, skips.pop()], axis=-1), i, f"up_{i}_{j}")
      if i > 0:
        h = conv(h.shape[-1], f"up_{i}_sample")(enlarged(h, 2 * h.shape[1], 2 * h.shape[2]))
    # In float32 to the end: bfloat16 near 1 is coarser than a picture's 8 bits are fine.
    h = nn.silu(GroupNorm(self.groups, dtype=jnp.float32, name="norm_out")(h))
    h = nn.Conv(out_channels * self.patch**2, (3, 3), kernel_init=zeros, name="conv_out")(h)
    return shuffle(h, self.patch)

  def _embedding(self, t: Array, pooled: Array | None) -> Array:
    width = 4 * self.channels
    e = timestep_embedding(t, self.channels).astype(self.dtype)
    e = nn.Dense(width, dtype=self.dtype, name="time_in")(e)
    e = nn.Dense(width, dtype=self.dtype, name="time_out")(nn.silu(e))
    if pooled is not None:
      e = e + nn.Dense(width, dtype=self.dtype, name="pooled")(pooled.astype(self.dtype))
    return e

  def _attention(self, name: str) -> SpatialAttention:
    return SpatialAttention(
      self.head_channels, self.groups, self.positions, self.mlp_ratio, self.dtype, name=name
    )

  def _middle(self, h, embedding, context, mask, train):
    block = lambda name: ResBlock(  # noqa: E731
      h.shape[-1], self.groups, self.scale_shift, self.dropout, self.dtype, name=name
    )
    h = block("middle_block_0")(h, embedding, train)
    h = self._attention("middle_attention")(h, context, mask)
    return block("middle_block_1")(h, embedding, train)


def unshuffle(x: Array, patch: int) -> Array:
  """[B, H, W, C] -> [B, H/p, W/p, p*p*C], a patch's pixels in one position."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h // patch, w // patch, patch * patch * c)


def shuffle(x: Array, patch: int) -> Array:
  """The inverse of `unshuffle`."""
  b, h, w, c = x.shape
  c = c // patch**2
  x = x.reshape(b, h, w, patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * patch, w * patch, c)


def enlarged(x: Array, height: int, width: int) -> Array:
  """Every pixel repeated, [B, h, w, C] -> [B, height, width, C], which are multiples of h and w."""
  b, h, w, c = x.shape
  rows, columns = height // h, width // w
  x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, rows, w, columns, c))
  return x.reshape(b, height, width, c)
