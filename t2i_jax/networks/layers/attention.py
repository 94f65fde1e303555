"""Multi-head attention, through the one function that picks a backend."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from t2i_jax.networks.layers import backends
from t2i_jax.networks.layers.stack import ATTENDED
from t2i_jax.parallel.sharding import logical

Array = jax.Array
xavier = nn.initializers.xavier_uniform()


def attend(
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None = None,
  bias: Array | None = None,
  scale: float | None = None,
) -> Array:
  """Scaled dot-product attention, by what the platform has for it (`backends`).

  Args:
    query: [B, T, H, D].
    key, value: [B, S, H, D].
    mask: bool, broadcastable to [B, H, T, S]; True where attention is allowed.
    bias: added to the scores, broadcastable to [B, H, T, S].
    scale: of the scores; 1 / sqrt(D) if None.

  Returns:
    [B, T, H, D]. The softmax is computed in float32 whatever the inputs are.
  """
  fused = backends.choose(query, key, mask, bias)
  if fused is not None:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return checkpoint_name(fused(query, key, value, mask, scale), ATTENDED)
  return checkpoint_name(backends.products(query, key, value, bias, mask, scale), ATTENDED)


class HeadNorm(nn.Module):
  """Root-mean-square norm of each head's units (Esser et al. 2024, section 5.3.2).

  Attributes:
    active: whether there is one; otherwise what is given is returned.
  """

  active: bool = True

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """Queries or keys [B, T, H, D] -> the same shape and type; computed in float32."""
    if not self.active:
      return x
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + 1e-6)
    return (y * scale).astype(x.dtype)


class MultiHeadAttention(nn.Module):
  """Self-attention, or cross-attention to `context` (Vaswani et al. 2017, 3.2).

  Attributes:
    heads: number of heads; must divide the width of `x` where no size is given.
    zero_output: start the output projection at zero, so that a residual
      branch begins as the identity.
    dtype: type of the computation.
    head_size: units of a head; the width of `x` over their number if None.
    input_bias, output_bias: whether the projections have biases.
    scale: of the scores; 1 / sqrt(units of a head) if None.
    kernel_init: of the projections.
  """

  heads: int
  zero_output: bool = False
  dtype: jnp.dtype = jnp.float32
  head_size: int | None = None
  input_bias: bool = True
  output_bias: bool = True
  scale: float | None = None
  kernel_init: nn.initializers.Initializer = xavier

  @nn.compact
  def __call__(
    self,
    x: Array,
    context: Array | None = None,
    mask: Array | None = None,
    bias: Array | None = None,
    prefix: Array | None = None,
  ) -> Array:
    """x [B, T, C], context [B, S, D], mask bool [B, S] -> [B, T, C].

    A mask of four axes is of pairs, broadcastable to [B, H, T, S], as is `bias`, which is added to
    the scores. Of a `prefix` [B, P, E], attended to before the context through projections of its
    own, the mask is [B, P], and all of the context counts.
    """
    width, size = x.shape[-1], self.head_size or x.shape[-1] // self.heads
    context = x if context is None else context
    split = lambda y: y.reshape(*y.shape[:2], self.heads, size)  # noqa: E731
    project = lambda name, y: split(  # noqa: E731
      nn.Dense(
        self.heads * size, self.input_bias, dtype=self.dtype, kernel_init=self.kernel_init,
        name=name,
      )(y)
    )
    query = logical(project("query", x), "batch", "length", "heads", None)
    key = logical(project("key", context), "batch", None, "heads", None)
    value = logical(project("value", context), "batch", None, "heads", None)
    if prefix is not None:
      key = jnp.concatenate([project("prefix_key", prefix), key], axis=1)
      value = jnp.concatenate([project("prefix_value", prefix), value], axis=1)
      if mask is not None:
        mask = jnp.concatenate([mask, jnp.ones(context.shape[:2], bool)], axis=1)
    if mask is not None and mask.ndim == 2:
      mask = mask[:, None, None, :]
    out = attend(query, key, value, mask, bias, self.scale)
    out = out.reshape(*x.shape[:2], self.heads * size)
    init = nn.initializers.zeros if self.zero_output else self.kernel_init
    return nn.Dense(
      width, self.output_bias, dtype=self.dtype, kernel_init=init, name="out"
    )(out)
