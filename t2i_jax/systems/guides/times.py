"""The times at which guides are trained, and how well they do at which of them."""

import jax
import jax.numpy as jnp

Array = jax.Array
QUARTERS = 4


def spread_times(rng: Array, rows: int) -> Array:
  """Uniform in [0, 1), one a row, as evenly as they can lie (Kingma et al. 2021, appendix I.1)."""
  return (jax.random.uniform(rng) + jnp.arange(rows) / rows) % 1.0


def by_quarter(name: str, values: Array, u: Array) -> dict[str, Array]:
  """Means of values [B] over each quarter of the times u [B], from picture to noise."""
  quarter = jnp.minimum((QUARTERS * u).astype(jnp.int32), QUARTERS - 1)
  means = {}
  for i in range(QUARTERS):
    rows = quarter == i
    mean = jnp.sum(values * rows) / jnp.maximum(jnp.sum(rows), 1)
    means[f"{name}/time_{i + 1}_of_{QUARTERS}"] = mean
  return means
