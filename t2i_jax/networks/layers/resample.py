"""How convolutional networks change height and width."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class Downsample(nn.Module):
  """Half the height and width, by a 3x3 convolution of stride 2.

  Attributes:
    channels: of the output.
    symmetric: a row and column of zeros on every side, as PyTorch's `padding=1` has it; otherwise
      only below and to the right, as TensorFlow's "SAME" does for even sizes.
    dtype: type of the computation.
  """

  channels: int
  symmetric: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, H, W, C] -> [B, H / 2, W / 2, channels]."""
    edge = (1, 1) if self.symmetric else (0, 1)
    return nn.Conv(
      self.channels, (3, 3), strides=2, padding=(edge, edge), dtype=self.dtype, name="conv"
    )(x)


class Upsample(nn.Module):
  """Twice the height and width: every pixel repeated, then a 3x3 convolution.

  Attributes:
    channels: of the output.
    dtype: type of the computation.
  """

  channels: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, H, W, C] -> [B, 2H, 2W, channels]."""
    x = enlarged(x, 2 * x.shape[1], 2 * x.shape[2])
    return nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv")(x)


def average_pool(x: Array) -> Array:
  """Means of squares of four pixels, [B, H, W, C] -> [B, H / 2, W / 2, C]."""
  b, h, w, c = x.shape
  return x.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def enlarged(x: Array, height: int, width: int) -> Array:
  """Every pixel repeated, [B, h, w, C] -> [B, height, width, C], which are multiples of h and w."""
  b, h, w, c = x.shape
  rows, columns = height // h, width // w
  x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, rows, w, columns, c))
  return x.reshape(b, height, width, c)


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
