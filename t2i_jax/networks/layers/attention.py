"""Multi-head attention, through the one function that picks a backend."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.parallel.sharding import logical

Array = jax.Array
xavier = nn.initializers.xavier_uniform()


def attend(query: Array, key: Array, value: Array, mask: Array | None = None) -> Array:
  """Scaled dot-product attention.

  Args:
    query: [B, T, H, D].
    key, value: [B, S, H, D].
    mask: bool, broadcastable to [B, H, T, S]; True where attention is allowed.

  Returns:
    [B, T, H, D]. The softmax is computed in float32 whatever the inputs are.
  """
  return jax.nn.dot_product_attention(query, key, value, mask=mask)


class MultiHeadAttention(nn.Module):
  """Self-attention, or cross-attention to `context` (Vaswani et al. 2017, 3.2).

  Attributes:
    heads: number of heads; must divide the width of `x`.
    zero_output: start the output projection at zero, so that a residual
      branch begins as the identity.
    dtype: type of the computation.
  """

  heads: int
  zero_output: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, context: Array | None = None, mask: Array | None = None
  ) -> Array:
    """x [B, T, C], context [B, S, D], mask bool [B, S] -> [B, T, C]."""
    width = x.shape[-1]
    context = x if context is None else context
    split = lambda y: y.reshape(*y.shape[:2], self.heads, width // self.heads)  # noqa: E731
    project = lambda name, y: split(  # noqa: E731
      nn.Dense(width, dtype=self.dtype, kernel_init=xavier, name=name)(y)
    )
    query = logical(project("query", x), "batch", "length", "heads", None)
    key = logical(project("key", context), "batch", None, "heads", None)
    value = logical(project("value", context), "batch", None, "heads", None)
    if mask is not None:
      mask = mask[:, None, None, :]
    out = attend(query, key, value, mask).reshape(x.shape)
    init = nn.initializers.zeros if self.zero_output else xavier
    return nn.Dense(width, dtype=self.dtype, kernel_init=init, name="out")(out)
