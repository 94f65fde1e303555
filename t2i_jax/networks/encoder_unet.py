"""The U-Net's way down as a classifier of noised pictures.

Dhariwal and Nichol 2021, section 4 (a classifier is the downsampling trunk of
the U-Net with an attention pool at its coarsest level) and appendix H (sizes).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.attention import attend
from t2i_jax.networks.layers.group_norm import GroupNorm
from t2i_jax.networks.layers.resample import unshuffle
from t2i_jax.networks.unet import Trunk

Array = jax.Array
POOLS = ("attention", "adaptive", "spatial")
SPATIAL_WIDTH = 2048  # of the hidden layer behind the "spatial" pool


class AttentionPool(nn.Module):
  """A picture's positions read by their mean, as in CLIP's ResNets (Radford et al. 2021, 2.4).

  Attributes:
    heads: of the attention; must divide the channels.
    out_channels: of the output.
  """

  heads: int
  out_channels: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """float32 [B, H, W, C] -> [B, out_channels]; H and W are those of initialisation."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height * width, channels)
    x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True), x], axis=1)
    init = nn.initializers.normal(channels**-0.5)
    x = x + self.param("positions", init, (height * width + 1, channels))
    split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # noqa: E731
    # Only the mean asks: what the other positions would hear is not read.
    query = split(nn.Dense(channels, name="query")(x[:, :1]))
    key, value = (split(nn.Dense(channels, name=name)(x)) for name in ("key", "value"))
    pooled = attend(query, key, value).reshape(batch, channels)
    return nn.Dense(self.out_channels, name="out")(pooled)


class EncoderUNet(Trunk):
  """Logits from a noised picture and its time.

  Attributes (beside those of `Trunk`):
    out_channels: logits.
    pool: "attention"; "adaptive", the mean over positions of the coarsest level; or "spatial", the
      means over positions of all levels, and a hidden layer.
    patch: the picture is unshuffled into patch x patch pixels a position first,
      so that no level works at full resolution.
  """

  out_channels: int = 1000
  pool: str = "attention"
  patch: int = 1

  @nn.compact
  def __call__(self, x: Array, t: Array, train: bool = False) -> Array:
    """Logits of noised pictures.

    Args:
      x: [B, H, W, C]; H and W divide by patch * 2^(levels - 1).
      t: [B] times, in the units of the process's `embedded`.
      train: whether dropout is on (needs the `dropout` rng).

    Returns:
      float32 [B, out_channels].
    """
    if self.pool not in POOLS:
      raise ValueError(f"pool={self.pool} is none of {', '.join(POOLS)}")
    embedding = self.embedded(t)
    h = unshuffle(x.astype(self.dtype), self.patch)
    h = nn.Conv(self.width(0), (3, 3), dtype=self.dtype, name="conv_in")(h)
    h, levels = self.down(h, embedding, None, None, train)
    h = self.middle(h, embedding, None, None, train)
    # What is read of the features is computed in float32, like the U-Net's output.
    if self.pool == "spatial":
      means = [jnp.mean(level.astype(jnp.float32), axis=(1, 2)) for level in (*levels, h)]
      hidden = nn.relu(nn.Dense(SPATIAL_WIDTH, name="hidden")(jnp.concatenate(means, axis=-1)))
      return nn.Dense(self.out_channels, name="out")(hidden)
    h = nn.silu(GroupNorm(self.groups, self.epsilon, jnp.float32, name="norm_out")(h))
    if self.pool == "adaptive":
      out = nn.Dense(self.out_channels, kernel_init=nn.initializers.zeros, name="out")
      return out(jnp.mean(h, axis=(1, 2)))
    heads = self.heads or max(h.shape[-1] // self.head_channels, 1)
    return AttentionPool(heads, self.out_channels, name="pool_out")(h)
