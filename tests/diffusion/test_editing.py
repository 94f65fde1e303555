import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion import solvers
from t2i_jax.diffusion.editing import inpainted, noised
from t2i_jax.diffusion.grid import make_grid, start_index
from t2i_jax.diffusion.parameterization import Prediction, noise_of
from t2i_jax.diffusion.schedules import make_process

LINEAR, FLOW = make_process("linear"), make_process("flow")
MASK = jnp.asarray(np.arange(64) < 32, jnp.float32)


def exact(x, row, deviation=0.3):
  """Of data N(0, deviation^2)."""
  x_0 = row.alpha * deviation**2 * x / (row.alpha**2 * deviation**2 + row.sigma**2)
  return Prediction(x_0, noise_of(x, x_0, row.alpha, row.sigma))


def drawn(name, process, predict, start=None, steps=20, strength=1.0):
  solver = solvers.make_solver(name)
  grid = make_grid(process, steps, convention=solver.convention).after(
    start_index(steps, strength)
  )
  keys = jax.random.split(jax.random.key(0), 4)
  noise = solvers.start_noise(keys, (64,))
  x = grid.deviation * noise if start is None else noised(
    start, noise, grid.alpha[0], grid.sigma[0]
  )
  return solvers.solve(solver(grid), predict, x, keys), grid


def test_a_known_part_replaces_x_0_on_the_line_through_x_t():
  x_t = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64)), jnp.float32)
  row = solvers.Row(0.0, jnp.float32(0.6), jnp.float32(0.8))
  prediction, known = exact(x_t, row), jnp.full((1, 64), 0.5)
  given = inpainted(prediction, x_t, row.alpha, row.sigma, known, MASK)
  np.testing.assert_array_equal(given.x_0[:, :32], 0.5)
  np.testing.assert_allclose(given.x_0[:, 32:], prediction.x_0[:, 32:])
  np.testing.assert_allclose(0.6 * given.x_0 + 0.8 * given.noise, x_t, atol=1e-6)


@pytest.mark.parametrize("name, process", [
  ("ddpm", LINEAR), ("ddim", LINEAR), ("dpmpp_2m", LINEAR), ("heun", LINEAR), ("plms", LINEAR),
  ("unipc", FLOW), ("flow_euler", FLOW),
])
def test_every_solver_paints_around_what_is_known(name, process):
  known = jnp.linspace(-1, 1, 64)[None]

  def predict(x, row, memory):
    edited = inpainted(exact(x, row), x, row.alpha, row.sigma, known, MASK)
    return solvers.Evaluation(*edited), memory

  x, _ = drawn(name, process, predict)
  np.testing.assert_allclose(x[:, :32], np.tile(known[:, :32], (4, 1)), atol=5e-3)
  assert np.std(x[:, 32:]) > 0.15


@pytest.mark.parametrize("process", [LINEAR, FLOW])
def test_image_to_image_keeps_more_of_the_picture_the_less_strength(process):
  picture = jnp.asarray(np.random.default_rng(1).normal(size=(4, 64)) * 0.3, jnp.float32)
  predict = lambda x, row, memory: (solvers.Evaluation(*exact(x, row)), memory)  # noqa: E731
  kept = []
  for strength in (0.1, 0.5, 1.0):
    x, grid = drawn("ddim", process, predict, picture, strength=strength)
    assert grid.steps == 20 * strength
    kept.append(np.corrcoef(np.ravel(x), np.ravel(picture))[0, 1])
    np.testing.assert_allclose(x.std(), 0.3, atol=0.09)
  assert kept[0] > 0.6 and kept[0] > kept[1] + 0.2 and kept[1] > kept[2] and abs(kept[2]) < 0.2
