"""Which times are trained."""

import jax
import jax.numpy as jnp

from t2i_jax.errors import unknown

Array = jax.Array


def uniform(rng: Array, rows: int, steps: int) -> Array:
  """Independent integer times [rows], uniform over 0...steps-1 (Ho et al. 2020, algorithm 1)."""
  return jax.random.randint(rng, (rows,), 0, steps)


def stratified(rng: Array, rows: int, steps: int) -> Array:
  """One draw spread evenly over the batch: uniform for each row, less noise in the loss.

  Kingma et al. 2021, appendix I.1. Rows are permuted, so that no row of the
  batch always has the same share of the times.
  """
  offset_key, order_key = jax.random.split(rng)
  u = (jax.random.uniform(offset_key) + jnp.arange(rows) / rows) % 1.0
  return jax.random.permutation(order_key, (u * steps).astype(jnp.int32))


def shifted(t: Array, shift: float, steps: int) -> Array:
  """Integer times moved towards noise (shift > 1) or towards the picture (< 1).

  Esser et al. 2024, equation 23, on t / steps. Pictures whose content shows
  through much noise (few, large, flat objects) leave only the noisiest times
  for the text to decide anything; a shift gives those more of the training.
  """
  u = (t.astype(jnp.float32) + 0.5) / steps
  u = shift * u / (1.0 + (shift - 1.0) * u)
  return jnp.clip((u * steps).astype(jnp.int32), 0, steps - 1)


DENSITIES = {"uniform": uniform, "stratified": stratified}


def make_density(name: str):
  """The density of a name: (rng, rows, steps) -> int times [rows]; UserError for another."""
  if name not in DENSITIES:
    raise unknown("timestep density", name, DENSITIES)
  return DENSITIES[name]
