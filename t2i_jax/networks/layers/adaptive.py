"""Layer norms that a condition scales and shifts, and branches that it opens.

Peebles and Xie 2023, section 3.2, "adaLN-Zero": scale, shift and gate are a regression from the
embedded condition, zero at first, so that every block begins as the identity.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
EPSILON = 1e-6
zeros = nn.initializers.zeros


def plain_norm(x: Array, dtype: jnp.dtype = jnp.float32) -> Array:
  """x [..., C] to mean 0 and variance 1 over the channels, without parameters."""
  x = x.astype(jnp.float32)
  mean = jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
  return ((x - mean) * jax.lax.rsqrt(variance + EPSILON)).astype(dtype)


def modulated(x: Array, shift: Array, scale: Array) -> Array:
  """x [B, T, C], shift and scale [B, C] -> [B, T, C]."""
  return x * (1 + scale[:, None]) + shift[:, None]


class Modulation(nn.Module):
  """Vectors of a condition, zero at first.

  Attributes:
    width: of each.
    number: of vectors.
    dtype: type of the computation.
  """

  width: int
  number: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, condition: Array) -> list[Array]:
    """condition [B, E] -> `number` vectors [B, width]."""
    layer = nn.Dense(self.number * self.width, dtype=self.dtype, kernel_init=zeros, name="dense")
    return jnp.split(layer(nn.silu(condition)), self.number, axis=-1)


class TwoLayers(nn.Module):
  """A condition's embedding: a layer, an activation, a layer.

  Attributes:
    width: of both layers.
    gelu: GELU by tanh in place of SiLU.
    dtype: type of the computation.
  """

  width: int
  gelu: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """x [..., D] -> [..., width]."""
    dense = lambda name: nn.Dense(  # noqa: E731
      self.width, dtype=self.dtype, kernel_init=nn.initializers.normal(0.02), name=name
    )
    h = dense("in")(x.astype(self.dtype))
    return dense("out")(nn.gelu(h) if self.gelu else nn.silu(h))


class LastLayer(nn.Module):
  """Tokens to patches, float32: a modulated norm and a layer that is zero at first.

  Attributes:
    outputs: numbers of a patch.
  """

  outputs: int

  @nn.compact
  def __call__(self, x: Array, shift: Array, scale: Array) -> Array:
    """x [B, T, C], shift and scale [B, C] -> float32 [B, T, outputs]."""
    x = modulated(plain_norm(x), shift.astype(jnp.float32), scale.astype(jnp.float32))
    return nn.Dense(self.outputs, kernel_init=zeros, name="dense")(x)
