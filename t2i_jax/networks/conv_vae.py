"""Convolutional encoder and decoder of a text-conditional VAE, and its prior.

The latent is one vector: what a caption leaves open, such as an exact place,
is shared by all pixels, and independent latents at each position could not
agree on it. Every residual block is conditioned on the text (FiLM, Perez et al.
2018), every level sees its coordinates (Liu et al. 2018), and the coarse levels
attend to the words.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.embeddings import coordinate_channels
from t2i_jax.networks.layers.group_norm import GroupNorm
from t2i_jax.networks.layers.resample import enlarged, shuffle, unshuffle
from t2i_jax.networks.layers.resblock import ResBlock
from t2i_jax.networks.layers.spatial import CompactAttention

Array = jax.Array
zeros = nn.initializers.zeros
# Log-variances stay within +-LIMIT, so that no exponential overflows.
LIMIT = 10.0
# A learned scale stays above half of the step between 8-bit values.
SCALE_FLOOR = 1.0 / 255.0


def with_coordinates(x: Array, frequencies: int) -> Array:
  """[B, H, W, C] -> [B, H, W, C + 4 * frequencies], where each position is."""
  places = jnp.asarray(coordinate_channels(*x.shape[1:3], frequencies), x.dtype)
  return jnp.concatenate([x, jnp.broadcast_to(places, (*x.shape[:3], places.shape[-1]))], axis=-1)


class MomentHead(nn.Module):
  """Mean and log-variance of a Gaussian, both zero at the start.

  Attributes:
    size: of the latent.
  """

  size: int

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array]:
    """x [B, C] -> mean, log-variance, float32 [B, size] each."""
    moments = nn.Dense(2 * self.size, kernel_init=zeros, name="moments")(x.astype(jnp.float32))
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, LIMIT * jnp.tanh(log_variance / LIMIT)


class Prior(nn.Module):
  """p(z | c): an MLP on the caption's vector.

  Attributes:
    size: of the latent.
    width, layers: of the MLP.
    dtype: type of the computation.
  """

  size: int
  width: int = 256
  layers: int = 2
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, text: Array) -> tuple[Array, Array]:
    """text [B, P] -> mean, log-variance, float32 [B, size] each."""
    x = text.astype(self.dtype)
    for i in range(self.layers):
      x = nn.silu(nn.Dense(self.width, dtype=self.dtype, name=f"dense_{i}")(x))
    return MomentHead(self.size, name="head")(x)


class Encoder(nn.Module):
  """q(z | x, c): residual blocks down to the coarsest level, then a linear map.

  Attributes:
    size: of the latent.
    channels: of the finest level.
    multipliers: channels of each level, as multiples.
    blocks: residual blocks a level.
    groups: of the group norms; must divide every level's channels.
    patch: the picture is unshuffled into patch x patch pixels a position first.
    coordinates: frequencies of the sine-cosine coordinate channels.
    dtype: type of the computation.
  """

  size: int
  channels: int = 64
  multipliers: tuple[int, ...] = (1, 2, 2)
  blocks: int = 1
  groups: int = 16
  patch: int = 2
  coordinates: int = 3
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image: Array, text: Array) -> tuple[Array, Array]:
    """image [B, H, W, 3], text [B, P] -> mean, log-variance, float32 [B, size] each."""
    conv = lambda features, name, **kw: nn.Conv(  # noqa: E731
      features, (3, 3), dtype=self.dtype, name=name, **kw
    )
    condition = nn.Dense(4 * self.channels, dtype=self.dtype, name="text")(text)
    x = with_coordinates(unshuffle(image.astype(self.dtype), self.patch), self.coordinates)
    x = conv(self.channels, "conv_in")(x)
    for i, multiplier in enumerate(self.multipliers):
      if i:
        x = conv(self.channels * multiplier, f"down_{i}", strides=2)(x)
      for j in range(self.blocks):
        x = ResBlock(
          self.channels * multiplier, self.groups, dtype=self.dtype, name=f"block_{i}_{j}"
        )(x, condition, False)
    x = nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
    return MomentHead(self.size, name="head")(x.reshape(len(x), -1))


class Decoder(nn.Module):
  """p(x | z, c): from the coarsest level up, the mean of every pixel.

  Attributes:
    side: of the coarsest level.
    channels, multipliers, blocks, groups, patch, coordinates, dtype: as the
      encoder's; level 0 is the finest.
    attention_levels: levels that attend to one another's positions and to the words.
    head_channels: width of an attention head.
    scale: of the likelihood around the mean; 0 learns one for all values (sigma-VAE,
      Rybkin et al. 2021, section 3).
  """

  side: int = 4
  channels: int = 64
  multipliers: tuple[int, ...] = (1, 2, 2)
  blocks: int = 1
  attention_levels: tuple[int, ...] = (1,)
  head_channels: int = 32
  groups: int = 16
  patch: int = 2
  coordinates: int = 3
  scale: float = 0.0
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, latent: Array, text: Array, context: Array | None, mask: Array | None
  ) -> tuple[Array, Array]:
    """Location and scale of every value from latents and captions.

    Args:
      latent: [B, Z].
      text: [B, P], the captions' vectors.
      context: [B, L, D] text features for cross-attention.
      mask: bool [B, L].

    Returns:
      mean: float32 [B, H, W, 3], H = W = side * 2^(levels - 1) * patch.
      log_scale: float32 scalar.
    """
    dense = lambda features, name: nn.Dense(features, dtype=self.dtype, name=name)  # noqa: E731
    width = 4 * self.channels
    given = jnp.concatenate([latent.astype(self.dtype), text.astype(self.dtype)], axis=-1)
    condition = dense(width, "condition_out")(nn.silu(dense(width, "condition_in")(given)))
    context = None if context is None else context.astype(self.dtype)
    levels = range(len(self.multipliers))
    widest = self.channels * self.multipliers[-1]
    x = dense(self.side**2 * widest, "start")(nn.silu(condition))
    x = x.reshape(-1, self.side, self.side, widest)
    for i in reversed(levels):
      features = self.channels * self.multipliers[i]
      if i != levels[-1]:
        x = enlarged(x, 2 * x.shape[1], 2 * x.shape[2])
      x = with_coordinates(x, self.coordinates)
      x = nn.Conv(features, (3, 3), dtype=self.dtype, name=f"up_{i}")(x)
      for j in range(self.blocks):
        x = ResBlock(features, self.groups, dtype=self.dtype, name=f"block_{i}_{j}")(
          x, condition, False
        )
        if i in self.attention_levels:
          x = CompactAttention(
            max(features // self.head_channels, 1), self.groups, dtype=self.dtype,
            name=f"attention_{i}_{j}",
          )(x, context, mask)
    x = nn.silu(GroupNorm(self.groups, dtype=self.dtype, name="norm_out")(x))
    x = nn.Conv(3 * self.patch**2, (3, 3), dtype=self.dtype, kernel_init=zeros, name="conv_out")(x)
    return shuffle(x.astype(jnp.float32), self.patch), self._log_scale()

  def _log_scale(self) -> Array:
    if self.scale:
      return jnp.log(jnp.float32(self.scale))
    # Times 10, so that it follows the falling error and not the optimizer's step
    # size; and a floor, as flat pictures have no finite optimum.
    log_scale = math.log(0.25) + 10.0 * self.param("log_scale", zeros, ())
    return jnp.logaddexp(log_scale, math.log(SCALE_FLOOR))
