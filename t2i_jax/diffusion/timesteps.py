"""Which times are trained: densities over [0, 1), from the picture to noise.

`Process.time` makes times of them. All but "uniform" spread one draw evenly over the batch.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2i_jax.diffusion.continuous import VarianceExploding
from t2i_jax.diffusion.process import Process
from t2i_jax.errors import UserError, unknown

Array = jax.Array
Density = Callable[[Array, int], Array]  # (rng, rows) -> float32 [rows] in [0, 1)
BELOW_ONE = 1.0 - 2.0**-24  # the largest float32 below 1
LARGEST_MODE = 2.0 / (math.pi - 2.0)  # beyond it times would not grow with u


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


def logit_normal(rng: Array, rows: int, mean: float = 0.0, spread: float = 1.0) -> Array:
  """More of the middle times: the sigmoid of a normal (Esser et al. 2024, section 3.1).

  `continuous.shifted` by s moves the normal's mean by log(s).
  """
  return jnp.minimum(jax.nn.sigmoid(_normal(rng, rows, mean, spread)), BELOW_ONE)


def mode(rng: Array, rows: int, scale: float = 1.29) -> Array:
  """More of the middle times, or of the ends, and none left out (Esser et al. 2024, section 3.1).

  `scale` is their s: positive for the middle, 0 is uniform; 1.29 was theirs.
  """
  u = stratified(rng, rows)
  moved = 1.0 - u - scale * (jnp.cos(0.5 * jnp.pi * u) ** 2 - 1.0 + u)
  return jnp.clip(moved, 0.0, BELOW_ONE)


def log_normal(
  rng: Array, rows: int, process: VarianceExploding, mean: float = -1.2, spread: float = 1.2
) -> Array:
  """Times at which log(sigma) is normal (Karras et al. 2022, table 1), cut off at its ends."""
  low, high = math.log(process.sigma_min), math.log(process.sigma_max)
  return jnp.clip((_normal(rng, rows, mean, spread) - low) / (high - low), 0.0, BELOW_ONE)


DENSITIES = ("uniform", "stratified", "logit_normal", "mode", "log_normal")


def make_density(
  name: str, spread: float | None = None, *, mean: float | None = None,
  scale: float = 1.29, process: Process | None = None,
) -> Density:
  """The density of a name.

  Args:
    name: one of `DENSITIES`.
    spread, mean: of the normal of "logit_normal" and "log_normal"; None is as published.
    scale: of "mode".
    process: whose times they are, for "log_normal".

  Raises:
    UserError: for another name, or an option out of its range, whichever density is named.
  """
  if name not in DENSITIES:
    raise unknown("timestep density", name, DENSITIES)
  if spread is not None and spread <= 0:
    raise UserError(f"density_spread={spread} is not positive; Esser et al. 2024 use 1")
  if not -1.0 <= scale <= LARGEST_MODE:
    raise UserError(f"the density's mode scale {scale} is outside -1 to {LARGEST_MODE:.2f}")
  given = {"spread": spread, "mean": mean}
  given = {key: value for key, value in given.items() if value is not None}
  if name == "logit_normal":
    return partial(logit_normal, **given)
  if name == "mode":
    return partial(mode, scale=scale)
  if name == "log_normal":
    if not isinstance(process, VarianceExploding):
      raise UserError("the timestep density 'log_normal' is of sigma, of the schedule 'edm'; use "
                      "'logit_normal' with other schedules")
    return partial(log_normal, process=process, **given)
  return {"uniform": uniform, "stratified": stratified}[name]


class Importance(NamedTuple):
  """What importance sampling remembers of the losses at each of T times.

  Nichol and Dhariwal 2021, section 3.3: times are drawn with the root of the
  mean square of their last losses. Pure data, that a system keeps in a
  collection.

  Attributes:
    losses: the last n of each time, float32 [T, n].
    count: how many have been seen, int32 [T], at most n.
  """

  losses: Array
  count: Array


def new_importance(steps: int, size: int = 10) -> Importance:
  """Nothing seen yet. `size` is the paper's 10."""
  return Importance(jnp.zeros((steps, size)), jnp.zeros(steps, jnp.int32))


def importance_probabilities(state: Importance, uniform: float = 1e-3) -> Array:
  """Of each time, [T]: uniform until each has been seen n times; then a share of it stays so."""
  size = jnp.sqrt(jnp.mean(jnp.square(state.losses), axis=1))
  warm = jnp.all(state.count == state.losses.shape[1]) & (jnp.sum(size) > 0)
  size = jnp.where(warm, size, 1.0)
  steps = len(size)
  return (1.0 - uniform) * size / jnp.sum(size) + uniform / steps


def draw_importance(rng: Array, rows: int, state: Importance) -> tuple[Array, Array]:
  """Times int32 [rows], and the weights [rows] that leave the mean of a loss as it was."""
  probabilities = importance_probabilities(state)
  cumulative = jnp.cumsum(probabilities)
  u = stratified(rng, rows) * cumulative[-1]
  t = jnp.minimum(jnp.searchsorted(cumulative, u, side="right"), len(cumulative) - 1)
  return t.astype(jnp.int32), 1.0 / (len(cumulative) * probabilities[t])


def update_importance(state: Importance, t: Array, losses: Array) -> Importance:
  """The state after losses [B], unweighted, at times [B]; a time may occur more than once."""
  size = state.losses.shape[1]

  def add(state: Importance, seen: tuple[Array, Array]) -> tuple[Importance, None]:
    t, loss = seen
    row, count = state.losses[t], state.count[t]
    # The oldest goes; a row that is not full has its zeros in front.
    row = jnp.append(row[1:], loss)
    return Importance(
      state.losses.at[t].set(row), state.count.at[t].set(jnp.minimum(count + 1, size))
    ), None

  return jax.lax.scan(add, state, (t, jax.lax.stop_gradient(losses)))[0]


def _normal(rng: Array, rows: int, mean: float, spread: float) -> Array:
  """Normal draws spread evenly over the batch, [rows]."""
  # The smallest and the largest that float32 tells from 0 and 1.
  u = jnp.clip(stratified(rng, rows), 1e-7, 1.0 - 1e-7)
  return mean + spread * jax.scipy.special.ndtri(u)
