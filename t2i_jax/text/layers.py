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
  def __call__(self, x: Array, mask: Array | None = None) -> Array:
    """x [B, L, width], mask bool [B, L] or broadcastable to [B, H, L, L] -> [B, L, width]."""
    y = nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm_attention")(x)
    x = x + MultiHeadAttention(
      self.heads, dtype=self.dtype, head_size=self.head_size, input_bias=self.input_bias,
      name="attention",
    )(y, mask=mask)  # fmt: skip
    y = nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm_mlp")(x)
    y = ACTIVATIONS[self.activation](nn.Dense(self.mlp, dtype=self.dtype, name="mlp_in")(y))
    return x + nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(y)
