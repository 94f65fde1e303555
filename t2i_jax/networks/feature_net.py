"""A small convolutional classifier, for the features that it learns.

Where no public network is at hand, its features take the place of VGG's in a
perceptual distance (Zhang et al. 2018) and of Inception's in a Frechet distance.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from t2i_jax.networks.layers.group_norm import GroupNorm
from t2i_jax.parallel.sharding import logical

Array = jax.Array


@struct.dataclass
class Features:
  """What `FeatureNet` makes of pictures.

  Attributes:
    levels: [B, H_i, W_i, C_i] of each level, not negative.
    vector: float32 [B, F], what the attributes are read of.
    logits: float32 [B, classes] of each attribute.
  """

  levels: tuple[Array, ...]
  vector: Array
  logits: tuple[Array, ...]


class FeatureNet(nn.Module):
  """Convolutions with group norm; pooled to a grid, so that it knows where things are.

  Attributes:
    classes: of each attribute.
    channels: of each level; every level but the first halves the size.
    groups: of the norms; must divide the channels.
    grid: the last level is averaged to grid x grid positions, whose features lie beside
      each other before the linear layers.
    width: F, units of `Features.vector`.
    dtype: type of the computation.
  """

  classes: tuple[int, ...]
  channels: tuple[int, ...] = (16, 32, 64, 64)
  groups: int = 8
  grid: int = 4
  width: int = 128
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image: Array) -> Features:
    """Of [B, H, W, 3] in [-1, 1]; the last level's sides divide by `grid`."""
    x, levels = image.astype(self.dtype), []
    for i, channels in enumerate(self.channels):
      x = nn.Conv(channels, (3, 3), 2 if i else 1, dtype=self.dtype, name=f"conv_{i}")(x)
      x = nn.relu(GroupNorm(self.groups, dtype=self.dtype, name=f"norm_{i}")(x))
      x = logical(x, "batch", None, None, None)
      levels.append(x)
    batch, height, width, channels = x.shape
    cell = (batch, self.grid, height // self.grid, self.grid, width // self.grid, channels)
    x = jnp.mean(x.reshape(cell), axis=(2, 4)).reshape(batch, -1)
    vector = nn.relu(nn.Dense(self.width, dtype=self.dtype, name="vector")(x))
    vector = vector.astype(jnp.float32)
    logits = tuple(
      nn.Dense(classes, name=f"head_{i}")(vector) for i, classes in enumerate(self.classes)
    )
    return Features(tuple(levels), vector, logits)
