"""Fidelity and variety told apart, by balls around features to their nearest neighbours.

Improved precision and recall: Kynkaanniemi et al. 2019, equation 1. Density and coverage: Naeem et
al. 2020, equations 4 and 5. Distances are computed on the device, some rows at a time.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
_ROWS = 1024


def precision_recall(
  fake: np.ndarray, real: np.ndarray, nearest: int = 3
) -> tuple[float, float]:
  """The fractions of fakes inside the real ones' balls, and of real ones inside the fakes'.

  Args:
    fake, real: features [N, F] and [M, F].
    nearest: a ball reaches to its centre's k-th neighbour among its own kind.
  """
  fake, real = _centred(fake, real)
  inside = _inside(fake, real, _radii(real, nearest))
  covered = _inside(real, fake, _radii(fake, nearest))
  return float(np.mean(inside > 0)), float(np.mean(covered > 0))


def density_coverage(
  fake: np.ndarray, real: np.ndarray, nearest: int = 5
) -> tuple[float, float]:
  """How many real balls a fake is in, over k; and the fraction of real balls with a fake in them.

  Arguments as of `precision_recall`. Density is about 1 for equal distributions, and may be more.
  """
  fake, real = _centred(fake, real)
  radii = _radii(real, nearest)
  inside = _inside(fake, real, radii, closed=False)
  fakes = jnp.asarray(fake)
  closest = np.concatenate([np.asarray(_smallest(part, fakes)) for part in _parts(real)])
  closest = closest[: len(real)]
  return float(inside.mean() / nearest), float(np.mean(closest < radii))


def _centred(fake: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Around the real ones' mean: the squares that distances are differences of become small."""
  mean = np.asarray(real, np.float64).mean(axis=0)
  return tuple(np.asarray(x - mean, np.float32) for x in (fake, real))


def _parts(rows: np.ndarray):
  """Equally many rows at a time, the last part filled up with copies of its last row."""
  for start in range(0, len(rows), _ROWS):
    part = rows[start : start + _ROWS]
    yield np.pad(part, ((0, _ROWS - len(part)), (0, 0)), mode="edge") if start else part


def _radii(rows: np.ndarray, nearest: int) -> np.ndarray:
  """Squared distances [N] to the k-th other row."""
  all_rows = jnp.asarray(rows)
  found = [
    np.asarray(_kth(part, all_rows, i * _ROWS, nearest)) for i, part in enumerate(_parts(rows))
  ]
  return np.concatenate(found)[: len(rows)]


def _inside(
  points: np.ndarray, centres: np.ndarray, radii: np.ndarray, closed: bool = True
) -> np.ndarray:
  """In how many balls each point is, int [N]; their surfaces included where they are closed."""
  balls = jnp.asarray(centres), jnp.asarray(radii)
  found = [np.asarray(_count(part, *balls, closed)) for part in _parts(points)]
  return np.concatenate(found)[: len(points)]


def _distances(a: Array, b: Array) -> Array:
  """Squared, [N, M]."""
  product = jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)
  return jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1) - 2 * product


@functools.partial(jax.jit, static_argnums=3)
def _kth(part: Array, rows: Array, start: int, nearest: int) -> Array:
  distances = _distances(part, rows)
  # A row is no neighbour of itself, nor at the rounding's distance from itself.
  itself = start + jnp.arange(len(part))
  distances = jnp.where(jnp.arange(len(rows)) == itself[:, None], jnp.inf, distances)
  return -jax.lax.top_k(-distances, nearest)[0][:, -1]


@functools.partial(jax.jit, static_argnums=3)
def _count(part: Array, centres: Array, radii: Array, closed: bool) -> Array:
  distances = _distances(part, centres)
  return jnp.sum(distances <= radii if closed else distances < radii, axis=1)


@jax.jit
def _smallest(part: Array, rows: Array) -> Array:
  return jnp.min(_distances(part, rows), axis=1)
