"""The convolutional autoencoder of latent diffusion.

Rombach et al. 2022, appendix G, and Esser et al. 2021, table 7: residual blocks
without a time, convolutions that halve and double the size between levels, and
attention in the middle, with one head. The published downsampling factors 4, 8
and 16 have 3, 4 and 5 levels.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.group_norm import GroupNorm
from t2i_jax.networks.layers.resample import Downsample, Upsample
from t2i_jax.networks.layers.resblock import ResBlock
from t2i_jax.networks.layers.spatial import AttentionBlock

Array = jax.Array
EPSILON = 1e-6  # of every norm
LAST = "conv_out"  # the parameters of `last_layer` in a `Decoder`'s


def last_layer() -> nn.Conv:
  """The decoder's last convolution, [B, H, W, C] -> float32 [B, H, W, 3].

  It can be applied by itself, to what `Decoder` gives with `features`: an
  adaptive weight (Esser et al. 2021, equation 7) needs the gradients of this
  layer alone.
  """
  return nn.Conv(3, (3, 3), dtype=jnp.float32, name=LAST)


class Level(nn.Module):
  """What encoder and decoder share.

  Attributes:
    latent_channels: of the latents, c.
    channels: of the finest level.
    multipliers: channels of each level from the finest, as multiples; every
      level but the first halves the size.
    blocks: residual blocks a level of the encoder; the decoder has one more.
    attention_levels: levels (0 is the finest) that attend after every block;
      the middle always does, unless told.
    middle_attention: whether the middle attends.
    pointwise: whether a 1x1 convolution lies between the latents and each
      network, as in the published ones with 4 channels.
    groups: of the norms; must divide every level's channels.
    remat: compute blocks again in the backward pass rather than keep what is in them.
    dtype: type of the computation; the last norm and convolution are float32.
  """

  latent_channels: int = 4
  channels: int = 128
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  blocks: int = 2
  attention_levels: tuple[int, ...] = ()
  middle_attention: bool = True
  pointwise: bool = True
  groups: int = 32
  remat: bool = False
  dtype: jnp.dtype = jnp.float32

  def resblock(self, channels: int, name: str) -> ResBlock:
    """A residual block without condition; call it with x."""
    kind = nn.remat(ResBlock) if self.remat else ResBlock
    return kind(
      channels, self.groups, EPSILON, zero_output=False, dtype=self.dtype, name=name
    )

  def attending(self, name: str) -> AttentionBlock:
    """Self-attention with one head; call it with x."""
    kind = nn.remat(AttentionBlock) if self.remat else AttentionBlock
    return kind(1, self.groups, EPSILON, zero_output=False, dtype=self.dtype, name=name)

  def conv(self, channels: int, name: str, size: int = 3, dtype=None) -> nn.Conv:
    """A convolution that keeps the size."""
    return nn.Conv(channels, (size, size), dtype=dtype or self.dtype, name=name)

  def middle(self, h: Array) -> Array:
    """Two residual blocks with attention between them."""
    h = self.resblock(h.shape[-1], "middle_block_0")(h)
    if self.middle_attention:
      h = self.attending("middle_attention")(h)
    return self.resblock(h.shape[-1], "middle_block_1")(h)

  def block(self, h: Array, i: int, name: str) -> Array:
    """A residual block of level `i`, and its attention where the level attends."""
    h = self.resblock(self.channels * self.multipliers[i], f"{name}_block")(h)
    return self.attending(f"{name}_attention")(h) if i in self.attention_levels else h

  def normed(self, h: Array) -> Array:
    """The last norm, in float32, and its SiLU."""
    return nn.silu(GroupNorm(self.groups, EPSILON, jnp.float32, name="norm_out")(h))


class Encoder(Level):
  """Pictures to the moments of their latents' Gaussians."""

  @nn.compact
  def __call__(self, image: Array) -> Array:
    """[B, H, W, 3] in [-1, 1] -> mean and log-variance beside each other, float32 [B, h, w, 2c].

    H and W divide by 2^(levels - 1) = H / h.
    """
    h = self.conv(self.channels, "conv_in")(image.astype(self.dtype))
    for i in range(len(self.multipliers)):
      for j in range(self.blocks):
        h = self.block(h, i, f"down_{i}_{j}")
      if i < len(self.multipliers) - 1:
        h = Downsample(h.shape[-1], dtype=self.dtype, name=f"down_{i}_sample")(h)
    h = self.normed(self.middle(h))
    moments = self.conv(2 * self.latent_channels, LAST, dtype=jnp.float32)(h)
    if not self.pointwise:
      return moments
    return self.conv(2 * self.latent_channels, "pointwise", 1, jnp.float32)(moments)


class Decoder(Level):
  """Latents to pictures."""

  @nn.compact
  def __call__(self, latents: Array, features: bool = False) -> Array:
    """[B, h, w, c] -> float32 [B, H, W, 3], about [-1, 1].

    With `features`, float32 [B, H, W, channels]: what `last_layer` makes the picture of.
    """
    h = latents.astype(self.dtype)
    if self.pointwise:
      h = self.conv(self.latent_channels, "pointwise", 1)(h)
    levels = range(len(self.multipliers))
    h = self.middle(self.conv(self.channels * self.multipliers[-1], "conv_in")(h))
    for i in reversed(levels):
      for j in range(self.blocks + 1):
        h = self.block(h, i, f"up_{i}_{j}")
      if i:
        h = Upsample(h.shape[-1], self.dtype, name=f"up_{i}_sample")(h)
    h = self.normed(h)
    return h if features else last_layer()(h)
