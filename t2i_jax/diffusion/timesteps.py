"""Which times are trained: densities over [0, 1), from the picture to noise."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError, unknown

Array = jax.Array
Density = Callable[[Array, int], Array]  # (rng, rows) -> float32 [rows] in [0, 1)


def uniform(rng: Array, rows: int) -> Array:
  """Independent uniform times (Ho et al. 2020, algorithm 1)."""
  return jax.random.uniform(rng, (rows,))


def stratified(rng: Array, rows: int) -> Array:
  """One draw spread evenly over the batch: uniform for each row, less noise in the loss.

  Kingma et al. 2021, appendix I.1. Rows are permuted, so that no row of the
  batch always has the same share of the times.
  """
  offset_key, order_key = jax.random.split(rng)
  u = (jax.random.uniform(offset_key) + jnp.arange(rows) / rows) % 1.0
  return jax.random.permutation(order_key, u)


def logit_normal(rng: Array, rows: int, spread: float = 1.0) -> Array:
  """More of the middle times: the sigmoid of a normal, spread evenly over the batch.

  Esser et al. 2024, section 3.1. `spread` is the normal's standard deviation;
  `shifted` by s moves its mean from 0 to log(s).
  """
  # The smallest and the largest that float32 tells from 0 and 1.
  u = jnp.clip(stratified(rng, rows), 1e-7, 1.0 - 1e-7)
  return jax.nn.sigmoid(spread * jax.scipy.special.ndtri(u))


DENSITIES: dict[str, Density] = {
  "uniform": uniform, "stratified": stratified, "logit_normal": logit_normal,
}


def make_density(name: str, spread: float = 1.0) -> Density:
  """The density of a name.

  Args:
    name: key of `DENSITIES`.
    spread: of "logit_normal".

  Raises:
    UserError: for another name, or a spread that is not positive.
  """
  if name not in DENSITIES:
    raise unknown("timestep density", name, DENSITIES)
  if spread <= 0:
    raise UserError(f"density_spread={spread} is not positive; Esser et al. 2024 use 1")
  return partial(logit_normal, spread=spread) if name == "logit_normal" else DENSITIES[name]
