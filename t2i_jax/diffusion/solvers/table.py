"""What a solver is, a table of coefficients, and the one loop that runs them all.

Nearly every published method makes the next point a linear combination of the
last points, of the network's predictions there, and of fresh noise, with
coefficients that only the grid decides. They are computed on the host in
float64; the loop on the device reads one row of them at a step.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.diffusion.grid import Grid
from t2i_jax.diffusion.guidance import shifted_noise
from t2i_jax.diffusion.parameterization import Prediction
from t2i_jax.errors import UserError

Array = jax.Array
# Columns of coefficients: of the two states, of fresh noise, of the noise that was predicted last,
# and from FIRST on of the evaluations, the newest first.
BASE, POINT, DRAWN, PREDICTED, FIRST = 0, 1, 2, 3, 4


class Row(NamedTuple):
  """Where the network is evaluated: scalars, float32 in the loop."""

  time: Array
  alpha: Array
  sigma: Array


class Evaluation(NamedTuple):
  """What is known of x_0 at a point.

  Attributes:
    x_0, noise: the prediction [B, ...], its two ends on one line through the point.
    variance: learned share of the larger variance's logarithm [B, ...], see `variance`.
    gradient: of a guide's log-probability at the point, times the guide's scale [B, ...].
  """

  x_0: Array
  noise: Array
  variance: Array | None = None
  gradient: Array | None = None


# (x [B, ...], where it is, memory) -> what the network says of it, new memory.
Predict = Callable[[Array, Row, Any], tuple[Evaluation, Any]]


@partial(
  jax.tree_util.register_dataclass,
  data_fields=("rows", "point", "base", "shift", "log_range"),
  meta_fields=("of_noise", "draws", "reads_noise"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Table:
  """A solver on a grid: K evaluations, each followed by an update of two states.

    base'  = c_b base + c_p point + c_d drawn + c_n noise_0 + sum over j of c_j m_j
    point' = the same with coefficients of its own

  from the same old states; the network is evaluated at `point`, m_0 is what it
  said, m_1 what it said at the evaluation before. Of x_0 and the noise each is
  near the point, and loses the other in it, at one end of the process: noise_0
  is for slopes that are taken close to the picture.

  Attributes:
    rows: where it is evaluated, float64 [K] each.
    point: coefficients of point', [K, FIRST + history], by the columns above.
    base: of base', or None for solvers whose update reads only the point.
    of_noise: whether m is the predicted noise, not the predicted x_0.
    draws: whether any update adds noise.
    reads_noise: whether any has a coefficient of noise_0.
    shift: [K], the variance by which a guide's gradient shifts the mean (Dhariwal and Nichol
      2021, algorithm 1), or None for solvers that see it in the prediction (algorithm 2).
    log_range: [K, 2], logarithms of the smaller and the larger variance between which the
      network's own lies, or None. With it DRAWN and `shift` are in units of that variance.
  """

  rows: Row
  point: np.ndarray
  base: np.ndarray | None = None
  of_noise: bool = False
  draws: bool = False
  reads_noise: bool = False
  shift: np.ndarray | None = None
  log_range: np.ndarray | None = None

  @property
  def evaluations(self) -> int:
    """K."""
    return len(self.point)

  @property
  def history(self) -> int:
    """How many evaluations an update reads, the newest included."""
    return self.point.shape[1] - FIRST


def rows_of(grid: Grid, points: np.ndarray | None = None) -> Row:
  """Rows at points of a grid; without `points` at all but the last."""
  points = np.arange(grid.steps) if points is None else points
  return Row(grid.times[points], grid.alpha[points], grid.sigma[points])


def start_noise(keys: Array, shape: tuple[int, ...]) -> Array:
  """Standard normal noise [B, *shape], row i from key i alone; see `Grid.deviation`."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(_split(keys)[0])


def step_noise(keys: Array, index: Array, shape: tuple[int, ...]) -> Array:
  """The noise [B, *shape] that `solve` adds at evaluation `index`, row i from key i alone."""
  return _normal(_split(keys)[1], index, shape)


def solve(
  table: Table, predict: Predict, x: Array, keys: Array, memory: Any = ()
) -> Array:
  """Walks x [B, ...] from the grid's first point to its last.

  One `lax.scan`; key i of `keys` [B] alone decides the noise of picture i.

  Args:
    table: of a solver on a grid.
    predict: (point, row, memory) -> (Evaluation, memory).
    x: at the first point: `grid.deviation` times `start_noise`, or a noised picture.
    keys: those given to `start_noise`.
    memory: what `predict` is to be given first, a pytree of arrays.
  """
  step_keys = _split(keys)[1]
  single = lambda array: None if array is None else jnp.asarray(array, jnp.float32)  # noqa: E731
  inputs = (
    jnp.arange(table.evaluations), Row(*map(single, table.rows)), single(table.point),
    single(table.base), single(table.shift), single(table.log_range),
  )

  def body(state, inputs):
    point, base, history, memory = state
    index, row, to_point, to_base, shift, log_range = inputs
    evaluation, memory = predict(point, row, memory)
    if table.shift is None and evaluation.gradient is not None:
      prediction = Prediction(evaluation.x_0, evaluation.noise)
      shifted = shifted_noise(prediction, evaluation.gradient, row.alpha, row.sigma)
      evaluation = evaluation._replace(x_0=shifted.x_0, noise=shifted.noise)
    history = (evaluation.noise if table.of_noise else evaluation.x_0, *history)
    variance = _learned_variance(log_range, evaluation)
    drawn = None
    if table.draws:
      drawn = jnp.sqrt(variance) * _normal(step_keys, index, point.shape[1:])
    terms = (base, point, drawn, evaluation.noise if table.reads_noise else None, *history)
    new = _combined(to_point, terms)
    if shift is not None and evaluation.gradient is not None:
      new = new + shift * variance * evaluation.gradient
    new_base = None if base is None else _combined(to_base, terms).astype(x.dtype)
    return (new.astype(x.dtype), new_base, history[: table.history - 1], memory), None

  blank = (jnp.zeros_like(x),) * (table.history - 1)
  state = (x, None if table.base is None else x, blank, memory)
  (x, *_), _ = jax.lax.scan(body, state, inputs)
  return x


def _learned_variance(log_range: Array | None, evaluation: Evaluation) -> Array:
  """The network's variance, broadcasting against x; 1 for tables that have their own."""
  if log_range is None:
    return jnp.float32(1.0)
  if evaluation.variance is None:
    raise UserError("the solver's variance 'learned' needs a network that predicts it; use "
                    "'small' or 'large'")
  small, large = log_range
  return jnp.exp(small + evaluation.variance * (large - small))


def _combined(coefficients: Array, terms: tuple[Array | None, ...]) -> Array:
  """The sum of coefficients times terms, of those that there are."""
  return sum(coefficients[i] * term for i, term in enumerate(terms) if term is not None)


def _normal(step_keys: Array, index: Array, shape: tuple[int, ...]) -> Array:
  fresh = jax.vmap(lambda key: jax.random.fold_in(key, index))(step_keys)
  return jax.vmap(lambda key: jax.random.normal(key, shape))(fresh)


def _split(keys: Array) -> tuple[Array, Array]:
  pairs = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
  return pairs[:, 0], pairs[:, 1]
