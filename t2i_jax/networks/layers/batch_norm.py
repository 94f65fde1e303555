"""Batch normalisation over the global batch."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class BatchNorm(nn.Module):
  """Batch normalisation (Ioffe and Szegedy 2015) over all axes but the last.

  Under jit with a sharded batch the statistics are those of the whole batch.
  Variables are named as those of `flax.linen.BatchNorm`. Unlike there, nothing
  is reshaped between statistics and normalisation: XLA moves reshapes about
  depending on what else reads them, after which it no longer sees that two
  players of a step ran the same forward pass, and computes it twice.

  Attributes:
    momentum: of the running averages, by which the old value is weighted.
    epsilon: added to the variance, which is the biased one.
    scale_init: of the scale.
    dtype: type of the output; statistics and parameters are float32.
  """

  momentum: float = 0.9
  epsilon: float = 1e-5
  scale_init: nn.initializers.Initializer = nn.initializers.ones
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, train: bool) -> Array:
    """x [..., C] -> [..., C]; with `train`, by the batch's own statistics.

    The collection `batch_stats` is updated where it is mutable.
    """
    features = x.shape[-1:]
    scale = self.param("scale", self.scale_init, features)
    bias = self.param("bias", nn.initializers.zeros, features)
    running_mean = self.variable("batch_stats", "mean", jnp.zeros, features)
    running_variance = self.variable("batch_stats", "var", jnp.ones, features)
    x = x.astype(jnp.float32)
    if train:
      axes = tuple(range(x.ndim - 1))
      mean = jnp.mean(x, axes)
      variance = jnp.maximum(jnp.mean(jnp.square(x), axes) - jnp.square(mean), 0.0)
      if self.is_mutable_collection("batch_stats") and not self.is_initializing():
        for running, new in ((running_mean, mean), (running_variance, variance)):
          running.value = self.momentum * running.value + (1.0 - self.momentum) * new
    else:
      mean, variance = running_mean.value, running_variance.value
    factor = scale * jax.lax.rsqrt(variance + self.epsilon)
    return ((x - mean) * factor + bias).astype(self.dtype)
