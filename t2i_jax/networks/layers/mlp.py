"""The MLP of transformers."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.backends import platform
from t2i_jax.parallel.sharding import logical

Array = jax.Array
xavier = nn.initializers.xavier_uniform()


class Mlp(nn.Module):
  """A wide layer, GELU, and a layer back (Vaswani et al. 2017, section 3.3).

  Attributes:
    hidden: units of the wide layer.
    exact: GELU itself, rather than its approximation by tanh.
    kernel_init: of both layers.
    dtype: type of the computation.
  """

  hidden: int
  exact: bool = False
  kernel_init: nn.initializers.Initializer = xavier
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, T, C] -> [B, T, C]."""
    dense = lambda size, name: nn.Dense(  # noqa: E731
      size, dtype=self.dtype, kernel_init=self.kernel_init, name=name
    )
    # On a CPU a tenth of a transformer's step: XLA fuses less into a product of three axes. On
    # several devices it would mix the axes that they share.
    flat = platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1
    h = dense(self.hidden, "in")(x.reshape(-1, x.shape[-1]) if flat else x)
    if not flat:
      h = logical(h, "batch", "length", "mlp")
    h = dense(x.shape[-1], "out")(nn.gelu(h, approximate=not self.exact))
    return h.reshape(x.shape)
