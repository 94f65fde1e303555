"""Numerical methods that draw a sample by walking the process back."""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.diffusion.parameterization import Prediction, noise_of
from t2i_jax.diffusion.process import CLEAN, DiscreteProcess
from t2i_jax.errors import UserError, unknown

Array = jax.Array
Predict = Callable[[Array, Array], Prediction]  # (x_t [B, ...], t scalar) -> x_0 and noise


class Solver(Protocol):
  """One method. `carry` holds what it remembers between steps (multistep methods)."""

  def init(self, x: Array) -> Any:
    """The first carry."""

  def step(
    self, predict: Predict, process: DiscreteProcess, x: Array, carry: Any,
    t: Array, s: Array, keys: Array,
  ) -> tuple[Array, Any]:
    """x at time t -> x at time s; `keys` [B] is fresh at every step."""


class Ancestral:
  """Draws from the learned reverse process (Ho et al. 2020, algorithm 2).

  Attributes:
    variance: "small" (the posterior's) or "large" (the process's own), their
      section 3.2.
  """

  def __init__(self, variance: Literal["small", "large"] = "small"):
    if variance not in ("small", "large"):
      raise unknown("ancestral variance", variance, ("small", "large"))
    self.variance = variance

  def init(self, x):
    return ()

  def step(self, predict, process, x, carry, t, s, keys):
    mean, small, large = process.posterior(x, predict(x, t).x_0, t, s)
    deviation = jnp.sqrt(small if self.variance == "small" else large)
    noise = noise_like(keys, x)
    return mean + jnp.where(s == CLEAN, 0.0, deviation) * noise, carry


class DDIM:
  """Song et al. 2021a, equation 12.

  Attributes:
    eta: 0 is deterministic; 1 has the ancestral sampler's variance.
  """

  def __init__(self, eta: float = 0.0):
    if not 0.0 <= eta <= 1.0:
      raise UserError(f"ddim eta={eta} is outside 0 to 1")
    self.eta = eta

  def init(self, x):
    return ()

  def step(self, predict, process, x, carry, t, s, keys):
    x_0, noise = predict(x, t)
    _, variance, _ = process.posterior(x, x_0, t, s)
    # sqrt(sigma_s^2 - eta^2 variance), in a form in which nothing cancels.
    left = 1.0 - self.eta**2 + self.eta**2 * process.snr(t) / process.snr(s)
    x = process.alpha(s) * x_0 + process.sigma(s) * jnp.sqrt(left) * noise
    if self.eta > 0:
      x = x + self.eta * jnp.sqrt(variance) * noise_like(keys, x)
    return x, carry


def make_solver(name: str, eta: float = 0.0, variance: str = "small") -> Solver:
  """The solver of a name; UserError for another."""
  # Both are checked, whichever is asked for: a mistyped option is not without effect by design.
  solvers = {"ddpm": Ancestral(variance), "ddim": DDIM(eta)}
  if name not in solvers:
    raise unknown("solver", name, solvers)
  return solvers[name]


def spaced_times(process_steps: int, steps: int) -> np.ndarray:
  """int [steps + 1]: from T - 1 down to `CLEAN`, evenly, both ends always visited.

  ("Trailing" spacing: it starts from pure noise, which Lin et al. 2024, section
  3.3, show to matter.)

  Raises:
    UserError: for fewer than 1 or more than T steps.
  """
  if not 1 <= steps <= process_steps:
    raise UserError(f"steps={steps} is outside 1 to {process_steps}, the process's own steps")
  return np.round(np.linspace(process_steps, 0, steps + 1)).astype(np.int32) - 1


def solve(
  solver: Solver, process: DiscreteProcess, predict: Predict, keys: Array,
  shape: tuple[int, ...], steps: int,
) -> Array:
  """Samples [B, *shape]: noise walked back to the clean end in `steps` steps.

  One `lax.scan`; key i of `keys` [B] alone decides the noise of picture i.
  """
  start_keys, step_keys = _split(keys)
  x = jax.vmap(lambda key: jax.random.normal(key, shape))(start_keys)
  times = jnp.asarray(spaced_times(process.steps, steps))

  def body(state, inputs):
    x, carry = state
    i, t, s = inputs
    fresh = jax.vmap(lambda key: jax.random.fold_in(key, i))(step_keys)
    return solver.step(predict, process, x, carry, t, s, fresh), None

  inputs = (jnp.arange(steps), times[:-1], times[1:])
  (x, _), _ = jax.lax.scan(body, (x, solver.init(x)), inputs)
  return x


def thresholded(prediction: Prediction, x_t: Array, alpha: Array, sigma: Array) -> Prediction:
  """Static thresholding: x_0 clipped to [-1, 1], and the noise that goes with it."""
  x_0 = jnp.clip(prediction.x_0, -1.0, 1.0)
  return Prediction(x_0, noise_of(x_t, x_0, alpha, sigma))


def noise_like(keys: Array, x: Array) -> Array:
  """Standard normal noise of x's shape [B, ...], row i from key i."""
  return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)


def _split(keys: Array) -> tuple[Array, Array]:
  pairs = jax.vmap(lambda key: jax.random.split(key, 2))(keys)
  return pairs[:, 0], pairs[:, 1]
