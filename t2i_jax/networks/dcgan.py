"""The text-conditional DCGAN pair (Radford et al. 2016; Reed et al. 2016, section 4.1)."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.batch_norm import BatchNorm
from t2i_jax.parallel.sharding import logical

Array = jax.Array
normal = nn.initializers.normal(0.02)
SIDE = 4  # of the smallest feature map
SLOPE = 0.2  # of the leaky ReLUs


def widths(resolution: int, channels: int) -> tuple[int, ...]:
  """Channels of the maps of sides resolution / 2 ... 4: doubled each time, at most 8-fold."""
  levels = int(math.log2(resolution // SIDE))
  return tuple(channels * min(2**i, 8) for i in range(levels))


def batch_norm(dtype: jnp.dtype, name: str | None = None) -> BatchNorm:
  """With DCGAN's initial scales."""
  init = lambda key, shape: 1.0 + normal(key, shape)  # noqa: E731
  return BatchNorm(scale_init=init, dtype=dtype, name=name)


class TextProjection(nn.Module):
  """A sentence vector to a few units: linear, batch norm, leaky ReLU.

  Attributes:
    features: of the output.
    dtype: type of the computation.
  """

  features: int = 128
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, text: Array, train: bool) -> Array:
    """text [B, P] -> [B, features]."""
    x = nn.Dense(self.features, dtype=self.dtype, kernel_init=normal, name="linear")(text)
    return nn.leaky_relu(batch_norm(self.dtype, "norm")(x, train), SLOPE)


class TransposedConv(nn.Module):
  """A 4x4 transposed convolution of stride 2 without bias: [B, H, W, C] -> [B, 2H, 2W, F].

  Each output pixel sees 2x2 inputs, so the four phases of the output are one
  2x2 convolution to four times the channels: the same sums as on an input
  spread out with zeros, without the three quarters that multiply zeros.

  Attributes:
    features: F.
    dtype: type of the computation.
  """

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    b, h, w, c = x.shape
    # [row tap, column tap] of the window on the input spread out by two.
    kernel = self.param("kernel", normal, (4, 4, c, self.features)).astype(self.dtype)
    phases = kernel.reshape(2, 2, 2, 2, c, self.features)  # tap = 2 * input + phase
    phases = phases.transpose(0, 2, 4, 1, 3, 5).reshape(2, 2, c, 4 * self.features)
    y = jax.lax.conv_general_dilated(
      x.astype(self.dtype), phases, (1, 1), ((1, 1), (1, 1)),
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).reshape(b, h + 1, w + 1, 2, 2, self.features)
    rows = jnp.stack([y[:, :h, :, 0], y[:, 1:, :, 1]], axis=2)  # [B, H, 2, W + 1, 2, F]
    y = jnp.stack([rows[:, :, :, :w, 0], rows[:, :, :, 1:, 1]], axis=4)
    return y.reshape(b, 2 * h, 2 * w, self.features)


class Generator(nn.Module):
  """Noise and a sentence vector to a picture: transposed convolutions up from 4x4.

  Attributes:
    resolution: of the pictures, a power of two.
    channels: of the last hidden map, the widest is up to 8 times as wide.
    text_size: units of the text projection.
    dtype: type of the computation; the output is float32.
  """

  resolution: int = 64
  channels: int = 64
  text_size: int = 128
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, noise: Array, text: Array, train: bool) -> Array:
    """noise [B, Z], text [B, P] -> pictures [B, R, R, 3] in (-1, 1)."""
    text = TextProjection(self.text_size, self.dtype, name="text")(text, train)
    x = jnp.concatenate([text, noise.astype(text.dtype)], axis=-1)
    *rest, first = widths(self.resolution, self.channels)
    # A transposed 4x4 convolution of a 1x1 map is a linear map.
    x = nn.Dense(SIDE**2 * first, False, self.dtype, kernel_init=normal, name="conv_0")(x)
    x = x.reshape(-1, SIDE, SIDE, first)
    for i, features in enumerate([*reversed(rest), None]):
      x = nn.relu(batch_norm(self.dtype, f"norm_{i}")(x, train))
      x = TransposedConv(features or 3, self.dtype, name=f"conv_{i + 1}")(x)
      x = logical(x, "batch", None, None, None)
    return jnp.tanh(x.astype(jnp.float32))


class Discriminator(nn.Module):
  """Whether a picture is real and shows what the text says, as one logit.

  Strided convolutions down to 4x4; there the projected text is put beside every
  position, and a 1x1 and a 4x4 convolution give the score. The 1x1 convolution
  has no batch norm: a batch holds either matching or mismatching pairs, and
  its statistics would take away what tells them apart.

  Attributes:
    resolution, channels, text_size, dtype: as the generator's.
  """

  resolution: int = 64
  channels: int = 64
  text_size: int = 128
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    sizes = widths(self.resolution, self.channels)
    self.convs = [
      nn.Conv(
        features, (4, 4), 2, ((1, 1), (1, 1)), use_bias=False, dtype=self.dtype, kernel_init=normal
      )
      for features in sizes
    ]
    self.norms = [batch_norm(self.dtype) for _ in sizes[1:]]
    self.text = TextProjection(self.text_size, self.dtype)
    dense = lambda features: nn.Dense(features, dtype=self.dtype, kernel_init=normal)  # noqa: E731
    self.joint = dense(sizes[-1])
    self.score = dense(1)

  def __call__(self, image: Array, text: Array, train: bool) -> Array:
    """image [B, R, R, 3] in [-1, 1], text [B, P] -> float32 logits [B]."""
    return self.judge(self.features(image, train), self.project(text, train))

  def features(self, image: Array, train: bool) -> Array:
    """image [B, R, R, 3] -> [B, 4, 4, C]."""
    x = nn.leaky_relu(self.convs[0](image.astype(self.dtype)), SLOPE)
    for conv, norm in zip(self.convs[1:], self.norms, strict=True):
      x = nn.leaky_relu(norm(conv(x), train), SLOPE)
      x = logical(x, "batch", None, None, None)
    return x

  def project(self, text: Array, train: bool) -> Array:
    """text [B, P] -> [B, text_size]."""
    return self.text(text, train)

  def judge(self, features: Array, text: Array) -> Array:
    """features [B, 4, 4, C], projected text [B, text_size] -> float32 logits [B]."""
    text = jnp.broadcast_to(text[:, None, None], (*features.shape[:3], text.shape[-1]))
    x = nn.leaky_relu(self.joint(jnp.concatenate([features, text], axis=-1)), SLOPE)
    # A 4x4 convolution of a 4x4 map is a linear map.
    return self.score(x.reshape(len(x), -1))[:, 0].astype(jnp.float32)
