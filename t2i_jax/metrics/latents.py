"""What the latents of an autoencoder are like: their spread, and how much each of them carries."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
# A channel below so many nats a dimension is as good as its prior: nothing is in it. Burda et al.
# 2016, section 5.2, call a unit active above 0.01 by the variance of its mean.
IDLE = 0.01


def sums_of(moments: Array) -> Array:
  """What `statistics` needs of each picture, traced.

  Args:
    moments: [B, h, w, 2c], mean and log-variance of the latents' distribution.

  Returns:
    [B, 4, c], averages over positions of the means, their squares, the variances and the
    log-variances.
  """
  mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
  parts = (mean, jnp.square(mean), jnp.exp(log_variance), log_variance)
  return jnp.stack([jnp.mean(part, axis=(1, 2)) for part in parts], axis=1)


def divergences(sums: np.ndarray) -> np.ndarray:
  """KL to the standard normal distribution in nats a dimension, by picture and channel [N, c].

  Kingma and Welling 2014, appendix B.
  """
  _, squares, variances, log_variances = np.moveaxis(np.asarray(sums, np.float64), 1, 0)
  return 0.5 * (squares + variances - 1.0 - log_variances)


def statistics(sums: np.ndarray) -> Mapping[str, Any]:
  """Mean and standard deviation of draws from the latents' distributions, over all pictures.

  Args:
    sums: [N, 4, c] of `sums_of`.

  Returns:
    `mean` and `std`, over all latents; `channels`: lists [c] of `mean`, `std` and `kl`; `idle`,
    how many channels carry nothing.
  """
  means, squares, variances, _ = np.asarray(sums, np.float64).mean(axis=0)
  squares = squares + variances
  kl = divergences(sums).mean(axis=0)
  return {
    "mean": float(means.mean()),
    "std": float(np.sqrt(squares.mean() - means.mean() ** 2)),
    "channels": {
      "mean": means.tolist(), "std": np.sqrt(squares - means**2).tolist(), "kl": kl.tolist()
    },
    "idle": int((kl < IDLE).sum()),
  }  # fmt: skip
