"""A coarse picture from the text alone, which tells a denoiser what belongs where."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.attention import MultiHeadAttention
from t2i_jax.networks.layers.embeddings import sincos_2d

Array = jax.Array
zeros = nn.initializers.zeros


class Draft(nn.Module):
  """Positions of a small grid that read the text, and the mean picture that they make of it.

  A denoiser's first prediction, out of pure noise, is the mean of all pictures
  that the text allows. Here that mean is predicted with no noise about: what is
  learned from it (which word belongs to which place) costs many times fewer
  examples than it does through a noised picture. As the initial predictor of
  Whang et al. 2022 (Deblurring via Stochastic Refinement, section 3.2) and the
  conditional mean of Han et al. 2022 (CARD, section 3), but coarse, and handed
  on as features rather than as a mean to be refined.

  Attributes:
    side: of the grid.
    channels: of the features; must divide by 4 and by `head_channels`.
    head_channels: width of an attention head.
    layers: of attention to the text and MLP.
    dtype: type of the computation; the picture is float32.
  """

  side: int = 8
  channels: int = 64
  head_channels: int = 32
  layers: int = 2
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, context: Array, mask: Array | None) -> tuple[Array, Array]:
    """context [B, L, D], mask bool [B, L] -> features [B, S, S, channels], picture [B, S, S, 3]."""
    context = context.astype(self.dtype)
    dense = lambda size, name, **kw: nn.Dense(size, dtype=self.dtype, name=name, **kw)  # noqa: E731
    norm = lambda name: nn.LayerNorm(dtype=self.dtype, name=name)  # noqa: E731
    places = jnp.asarray(sincos_2d(self.side, self.side, self.channels), self.dtype)
    x = dense(self.channels, "places")(places)
    x = jnp.broadcast_to(x, (len(context), *x.shape))
    for i in range(self.layers):
      attention = MultiHeadAttention(
        max(self.channels // self.head_channels, 1), zero_output=True, dtype=self.dtype,
        name=f"attention_{i}",
      )
      x = x + attention(norm(f"norm_attention_{i}")(x), context, mask)
      y = nn.gelu(dense(2 * self.channels, f"mlp_in_{i}")(norm(f"norm_mlp_{i}")(x)))
      x = x + dense(self.channels, f"mlp_out_{i}", kernel_init=zeros)(y)
    x = norm("norm_out")(x)
    picture = nn.Dense(3, kernel_init=zeros, name="picture")(x.astype(jnp.float32))
    grid = (len(context), self.side, self.side, -1)
    return x.reshape(grid), picture.reshape(grid)


def shrunk(images: Array, side: int) -> Array:
  """The means of equal squares: [B, H, W, C] -> [B, side, side, C]; `side` divides H and W."""
  b, h, w, c = images.shape
  return images.reshape(b, side, h // side, side, w // side, c).mean((2, 4))
