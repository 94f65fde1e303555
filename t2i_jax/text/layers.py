"""What public text encoders share: activations by transformers' names, and the pre-norm layer."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.attention import MultiHeadAttention

Array = jax.Array
EPSILON = 1e-5


def quick_gelu(x: Array) -> Array:
  """The sigmoid approximation of GELU that OpenAI's models were trained with."""
  return x * nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
  """GELU itself, not its approximation by tanh."""
  return nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "quick_gelu": quick_gelu,
  "gelu": gelu,
  "gelu_new": lambda x: nn.gelu(x, approximate=True),
  "relu": nn.relu,
}


class AdaptiveNorm(nn.LayerNorm):
  """A layer norm that an embedding, if there is one, scales and shifts; at first by nothing."""

  epsilon: float = EPSILON

  @nn.compact
  def __call__(self, x: Array, embedding: Array | None = None) -> Array:
    """x [B, ..., C], embedding [B, E] -> the shape of x."""
    y = super().__call__(x)
    if embedding is None:
      return y
    modulation = nn.Dense(
      2 * x.shape[-1], dtype=self.dtype, kernel_init=nn.initializers.zeros, name="modulation"
    )(embedding)
    scale, shift = jnp.split(modulation.reshape(len(y), *(1,) * (y.ndim - 2), -1), 2, axis=-1)
    return y * (1 + scale) + shift


class PreNormLayer(nn.Module):
  """Attention and an MLP, each behind a norm (Xiong et al. 2020).

  Attributes:
    heads, mlp: heads of the attention, units of the MLP.
    activation: key of `ACTIVATIONS`.
    head_size: units of a head; the width over their number if None.
    input_bias: whether queries, keys and values have biases.
    dtype: type of the computation.
  """

  heads: int
  mlp: int
  activation: str = "gelu"
  head_size: int | None = None
  input_bias: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, mask: Array | None = None, embedding: Array | None = None
  ) -> Array:
    """x [B, L, width], mask bool [B, L] or broadcastable to [B, H, L, L] -> [B, L, width].

    An `embedding` [B, E], such as of a time, scales and shifts what the norms give.
    """
    norm = lambda name: AdaptiveNorm(dtype=self.dtype, name=name)  # noqa: E731
    y = norm("norm_attention")(x, embedding)
    x = x + MultiHeadAttention(
      self.heads, dtype=self.dtype, head_size=self.head_size, input_bias=self.input_bias,
      name="attention",
    )(y, mask=mask)  # fmt: skip
    y = norm("norm_mlp")(x, embedding)
    y = ACTIVATIONS[self.activation](nn.Dense(self.mlp, dtype=self.dtype, name="mlp_in")(y))
    return x + nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(y)
