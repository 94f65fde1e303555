"""VGG16's convolutions (Simonyan and Zisserman 2015, table 1, column D), for their features."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.parallel.sharding import logical

Array = jax.Array
# (channels, convolutions) of each block; before every block but the first the size is halved.
BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))


class VGG16(nn.Module):
  """The outputs of the five blocks, each after its last ReLU and before it is pooled.

  Attributes:
    blocks: (channels, convolutions) pairs; the published ones by default.
    dtype: type of the computation.
  """

  blocks: tuple[tuple[int, int], ...] = BLOCKS
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, ...]:
    """[B, H, W, 3], normalised as in its training -> [B, H / 2^i, W / 2^i, C_i] for i = 0..4."""
    x, features = x.astype(self.dtype), []
    for i, (channels, convolutions) in enumerate(self.blocks):
      if i:
        x = nn.max_pool(x, (2, 2), (2, 2))
      for j in range(convolutions):
        x = nn.relu(nn.Conv(channels, (3, 3), dtype=self.dtype, name=f"conv_{i}_{j}")(x))
        x = logical(x, "batch", None, None, None)
      features.append(x)
    return tuple(features)
