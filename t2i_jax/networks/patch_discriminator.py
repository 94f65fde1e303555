"""The PatchGAN discriminator (Isola et al. 2017, section 3.2.2 and appendix 6.1.2)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.batch_norm import BatchNorm
from t2i_jax.parallel.sharding import logical

Array = jax.Array
normal = nn.initializers.normal(0.02)
SLOPE = 0.2  # of the leaky ReLUs


class PatchDiscriminator(nn.Module):
  """Whether each patch of a picture is real, by 4x4 convolutions alone.

  With 3 layers a patch has 70x70 pixels; the patches overlap, every 8 pixels one.

  Attributes:
    channels: of the first layer; doubled by each, at most 8-fold.
    layers: that halve the size.
    dtype: type of the computation; the last convolution is float32.
  """

  channels: int = 64
  layers: int = 3
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, image: Array, train: bool) -> Array:
    """image [B, H, W, 3] in [-1, 1] -> float32 logits [B, H / 2^layers - 2, W / 2^layers - 2].

    With `train`, norms take the statistics of the batch.
    """
    x = image.astype(self.dtype)
    for i in range(self.layers + 1):
      x = nn.Conv(
        self.channels * min(2**i, 8), (4, 4), 2 if i < self.layers else 1, ((1, 1), (1, 1)),
        use_bias=not i, dtype=self.dtype, kernel_init=normal, name=f"conv_{i}",
      )(x)  # fmt: skip
      if i:
        # Initial scales are drawn around 1, as DCGAN's.
        scale = lambda key, shape: 1.0 + normal(key, shape)  # noqa: E731
        x = BatchNorm(scale_init=scale, dtype=self.dtype, name=f"norm_{i}")(x, train)
      x = logical(nn.leaky_relu(x, SLOPE), "batch", None, None, None)
    return nn.Conv(
      1, (4, 4), padding=((1, 1), (1, 1)), dtype=jnp.float32, kernel_init=normal, name="score"
    )(x)[..., 0]
