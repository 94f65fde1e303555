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


def _strided(y: Array, kernel: Array) -> Array:
  """A 4x4 convolution of stride 2: [B, 2H, 2W, F], [4, 4, F, C] -> [B, H, W, C]."""
  return jax.lax.conv_general_dilated(
    y, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


@jax.custom_vjp
def transposed_conv(x: Array, kernel: Array) -> Array:
  """The transpose of a 4x4 convolution of stride 2: [B, H, W, C] -> [B, 2H, 2W, F].

  Its gradients are written as the convolution's own, which XLA's CPU backend
  computes some 30 times faster than those that it derives for the kernel.

  Args:
    x: [B, H, W, C].
    kernel: [4, 4, F, C], the convolution's from F to C channels.
  """
  return jax.lax.conv_transpose(
    x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
  )


def _transposed_conv_forward(x: Array, kernel: Array):
  return transposed_conv(x, kernel), (x, kernel)


def _transposed_conv_backward(residuals: tuple[Array, Array], gradient: Array):
  x, kernel = residuals
  out, pull_back = jax.vjp(lambda k: _strided(gradient, k), kernel)
  return out, *pull_back(x)


transposed_conv.defvjp(_transposed_conv_forward, _transposed_conv_backward)


class TransposedConv(nn.Module):
  """`transposed_conv` without bias.

  Attributes:
    features: F.
    dtype: type of the computation.
  """

  features: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """x [B, H, W, C] -> [B, 2H, 2W, F]."""
    kernel = self.param("kernel", normal, (4, 4, self.features, x.shape[-1]))
    return transposed_conv(x.astype(self.dtype), kernel.astype(self.dtype))


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
