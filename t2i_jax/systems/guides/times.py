"""How well guides do at which times."""

import jax
import jax.numpy as jnp

Array = jax.Array
QUARTERS = 4


def by_quarter(name: str, values: Array, u: Array) -> dict[str, Array]:
  """Means of values [B] over each quarter of the times u [B], from picture to noise."""
  quarter = jnp.minimum((QUARTERS * u).astype(jnp.int32), QUARTERS - 1)
  means = {}
  for i in range(QUARTERS):
    rows = quarter == i
    mean = jnp.sum(values * rows) / jnp.maximum(jnp.sum(rows), 1)
    means[f"{name}/time_{i + 1}_of_{QUARTERS}"] = mean
  return means
