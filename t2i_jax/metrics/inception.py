"""The Inception network of the Frechet distance: TensorFlow's of 2015-12-05, 1008 classes.

Szegedy et al. 2016 (Rethinking the Inception Architecture), table 1 and figures 5 to 7, as Heusel
et al. 2017 use it. Torchvision's Inception v3 is another network: it has 1000 classes, and its
pooling differs in the two places that are marked below.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.parallel.sharding import logical

Array = jax.Array
SIDE, FEATURES, CLASSES = 299, 2048, 1008


def _average(x: Array) -> Array:
  # Means over what there is at the edges, not over zeros: as TensorFlow, unlike torchvision.
  return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _greatest(x: Array) -> Array:
  return nn.max_pool(x, (3, 3), (1, 1), "SAME")


def _halved(x: Array) -> Array:
  return nn.max_pool(x, (3, 3), (2, 2), "VALID")


class BasicConv(nn.Module):
  """A convolution, batch normalisation by stored statistics, and a ReLU.

  Attributes:
    channels, size, stride: of the convolution.
    padding: "SAME" or "VALID".
  """

  channels: int
  size: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, H, W, C] -> [B, H', W', channels]."""
    x = nn.Conv(
      self.channels, self.size, self.stride, self.padding, use_bias=False, name="conv"
    )(x)
    x = nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x)
    return logical(nn.relu(x), "batch", None, None, None)


class Inception(nn.Module):
  """Pictures to pooled features and logits; computed in float32.

  Attributes:
    divisor: of all widths; 1 is the published network, others are for tests.
  """

  divisor: int = 1

  @nn.compact
  def __call__(self, x: Array) -> dict[str, Array]:
    """[B, H, W, 3], H and W at least 75 (299 as published), about [-1, 1] -> `features` [B, 2048]
    and `logits` [B, 1008] without the last bias, as the Inception Score has them.
    """
    of = functools.partial(BasicConv, stride=2, padding="VALID")
    x = of(self._width(32), (3, 3), name="Conv2d_1a_3x3")(x)
    x = self._conv("Conv2d_2a_3x3", 32, 3, padding="VALID")(x)
    x = _halved(self._conv("Conv2d_2b_3x3", 64, 3)(x))
    x = self._conv("Conv2d_3b_1x1", 80, padding="VALID")(x)
    x = _halved(self._conv("Conv2d_4a_3x3", 192, 3, padding="VALID")(x))
    for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
      x = self._a(name, x, pooled)
    x = self._b("Mixed_6a", x)
    for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
      x = self._c(name, x, inner)
    x = self._d("Mixed_7a", x)
    x = self._e("Mixed_7b", x, _average)
    # The greatest of the neighbours here, a slip of the published graph that its scores depend on.
    x = self._e("Mixed_7c", x, _greatest)
    features = jnp.mean(x, axis=(1, 2))
    logits = nn.Dense(CLASSES, use_bias=False, name="fc")(features)
    return {"features": features, "logits": logits}

  def _width(self, channels: int) -> int:
    return channels // self.divisor

  def _conv(self, name: str, channels: int, size: int | tuple[int, int] = 1, **options):
    size = (size, size) if isinstance(size, int) else size
    return BasicConv(self._width(channels), size, name=name.replace(".", "_"), **options)

  def _row(self, name: str, x: Array, *layers) -> Array:
    """Convolutions one behind the other: (name, channels, size) each."""
    for branch, channels, size in layers:
      x = self._conv(f"{name}.{branch}", channels, size)(x)
    return x

  def _a(self, name: str, x: Array, pooled: int) -> Array:
    return jnp.concatenate([
      self._row(name, x, ("branch1x1", 64, 1)),
      self._row(name, x, ("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)),
      self._row(name, x, ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3),
                ("branch3x3dbl_3", 96, 3)),
      self._row(name, _average(x), ("branch_pool", pooled, 1)),
    ], axis=-1)

  def _b(self, name: str, x: Array) -> Array:
    double = self._row(name, x, ("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3))
    last = dict(stride=2, padding="VALID")
    return jnp.concatenate([
      self._conv(f"{name}.branch3x3", 384, 3, **last)(x),
      self._conv(f"{name}.branch3x3dbl_3", 96, 3, **last)(double),
      _halved(x),
    ], axis=-1)

  def _c(self, name: str, x: Array, inner: int) -> Array:
    wide, tall = (1, 7), (7, 1)
    return jnp.concatenate([
      self._row(name, x, ("branch1x1", 192, 1)),
      self._row(name, x, ("branch7x7_1", inner, 1), ("branch7x7_2", inner, wide),
                ("branch7x7_3", 192, tall)),
      self._row(name, x, ("branch7x7dbl_1", inner, 1), ("branch7x7dbl_2", inner, tall),
                ("branch7x7dbl_3", inner, wide), ("branch7x7dbl_4", inner, tall),
                ("branch7x7dbl_5", 192, wide)),
      self._row(name, _average(x), ("branch_pool", 192, 1)),
    ], axis=-1)

  def _d(self, name: str, x: Array) -> Array:
    three = self._row(name, x, ("branch3x3_1", 192, 1))
    seven = self._row(name, x, ("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)),
                      ("branch7x7x3_3", 192, (7, 1)))
    last = dict(stride=2, padding="VALID")
    return jnp.concatenate([
      self._conv(f"{name}.branch3x3_2", 320, 3, **last)(three),
      self._conv(f"{name}.branch7x7x3_4", 192, 3, **last)(seven),
      _halved(x),
    ], axis=-1)

  def _e(self, name: str, x: Array, pool) -> Array:
    three = self._row(name, x, ("branch3x3_1", 384, 1))
    double = self._row(name, x, ("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
    return jnp.concatenate([
      self._row(name, x, ("branch1x1", 320, 1)),
      self._row(name, three, ("branch3x3_2a", 384, (1, 3))),
      self._row(name, three, ("branch3x3_2b", 384, (3, 1))),
      self._row(name, double, ("branch3x3dbl_3a", 384, (1, 3))),
      self._row(name, double, ("branch3x3dbl_3b", 384, (3, 1))),
      self._row(name, pool(x), ("branch_pool", 192, 1)),
    ], axis=-1)
