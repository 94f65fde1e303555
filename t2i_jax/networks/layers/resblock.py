"""The residual block of convolutional networks, with or without a condition."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.group_norm import GroupNorm
from t2i_jax.networks.layers.resample import average_pool, enlarged
from t2i_jax.parallel.sharding import logical

Array = jax.Array


class ResBlock(nn.Module):
  """Two 3x3 convolutions with group norm, and a condition between them.

  Ho et al. 2020, appendix B; the scale and shift and the change of size inside
  are of Dhariwal and Nichol 2021, section 3.

  Attributes:
    channels: of the output.
    groups, epsilon: of the norms.
    scale_shift: condition by scale and shift after the second norm (AdaGN);
      otherwise by an added bias before it.
    resample: "none", or "down" and "up", which halve or double height and width
      before the first convolution.
    dropout: before the second convolution.
    zero_output: start the second convolution at zero, so that the block begins
      as the identity.
    dtype: type of the computation.
  """

  channels: int
  groups: int = 32
  epsilon: float = 1e-6
  scale_shift: bool = True
  resample: str = "none"
  dropout: float = 0.0
  zero_output: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, embedding: Array | None = None, train: bool = False) -> Array:
    """x [B, H, W, C], embedding [B, E] or None for no condition -> [B, H', W', channels]."""
    conv = lambda name, init: nn.Conv(  # noqa: E731
      self.channels, (3, 3), dtype=self.dtype, kernel_init=init, name=name
    )
    norm = lambda name: GroupNorm(self.groups, self.epsilon, self.dtype, name=name)  # noqa: E731
    lecun, zeros = nn.initializers.lecun_normal(), nn.initializers.zeros
    h = nn.silu(norm("norm_in")(x))
    h, x = self._resampled(h), self._resampled(x)
    h = conv("conv_in", lecun)(h)
    if embedding is None:
      h = norm("norm_out")(h)
    else:
      size = 2 * self.channels if self.scale_shift else self.channels
      condition = nn.Dense(size, dtype=self.dtype, name="condition")(nn.silu(embedding))
      condition = condition[:, None, None, :]
      if self.scale_shift:
        scale, shift = jnp.split(condition, 2, axis=-1)
        h = norm("norm_out")(h) * (1 + scale) + shift
      else:
        h = norm("norm_out")(h + condition)
    h = nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))
    h = conv("conv_out", zeros if self.zero_output else lecun)(h)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="skip")(x)
    return logical(x + h, "batch", None, None, None)

  def _resampled(self, x: Array) -> Array:
    if self.resample == "down":
      return average_pool(x)
    return enlarged(x, 2 * x.shape[1], 2 * x.shape[2]) if self.resample == "up" else x
