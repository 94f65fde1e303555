"""The vision tower for noised pictures, and how pictures are prepared for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.text import clip

CONFIG = clip.VisionConfig(16, 2, 2, 32, projection=6, resolution=8, patch=4)
TIMED = clip.CLIPVision(CONFIG, time_width=8)
APPLY = jax.jit(TIMED.apply)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 8, 3)), jnp.float32)
TIMES = jnp.array([0, 10, 900])


@pytest.fixture(scope="module")
def variables():
  return jax.jit(TIMED.init)(jax.random.key(0), IMAGES, TIMES)


def without_times(params):
  """The parameters of a tower for clean pictures."""
  return {
    name: without_times(value) if isinstance(value, dict) else value
    for name, value in params.items() if not name.startswith(("modulation", "time_"))
  }  # fmt: skip


def test_untrained_times_leave_the_tower_as_it_is(variables):
  clean = {"params": without_times(variables["params"])}
  shapes = jax.eval_shape(TIMED.init, jax.random.key(0), IMAGES)
  assert jax.tree.map(lambda x: x.shape, clean) == jax.tree.map(lambda x: x.shape, shapes)
  pooled = APPLY(variables, IMAGES, TIMES)[1]
  np.testing.assert_allclose(pooled, APPLY(clean, IMAGES)[1], atol=1e-5)


def test_trained_times_change_every_norm(variables):
  def moved(path, leaf):
    return leaf + 0.1 if "modulation" in jax.tree_util.keystr(path) else leaf

  for name in ("norm_in", "norm_out", "layers_0", "layers_1"):
    params = dict(variables["params"])
    params[name] = jax.tree_util.tree_map_with_path(moved, params[name])
    change = APPLY({"params": params}, IMAGES, TIMES)[1] - APPLY(variables, IMAGES, TIMES)[1]
    assert np.all(np.abs(change).max(axis=1) > 1e-6), name


def test_the_time_reaches_the_modulation_of_its_own_picture(variables):
  random = np.random.default_rng(1)
  params = jax.tree.map(
    lambda x: x + 0.1 * random.normal(size=x.shape).astype("f4"), variables["params"]
  )
  run = lambda times: APPLY({"params": params}, IMAGES, times)[1]  # noqa: E731
  change = np.abs(run(TIMES.at[1].add(50)) - run(TIMES)).max(axis=1)
  assert change[1] > 1e-3 and change[0] == change[2] == 0


def test_every_layer_can_be_read(variables):
  (sequence, _), state = TIMED.apply(variables, IMAGES, TIMES, mutable="intermediates")
  layers = state["intermediates"]["layers"]
  assert [x.shape for x in layers] == [(3, 5, 16)] * 2
  np.testing.assert_array_equal(layers[-1], sequence)


def test_pictures_are_normalised_and_brought_to_size():
  grey = jnp.zeros((1, 8, 8, 3))
  expected = (0.5 - np.array(clip.MEAN)) / np.array(clip.DEVIATION)
  np.testing.assert_allclose(clip.prepared(grey, 8)[0, 0, 0], expected, rtol=1e-6)
  np.testing.assert_allclose(clip.prepared(grey, 4)[0, 3, 3], expected, rtol=1e-5)
  assert clip.prepared(grey, 16).shape == (1, 16, 16, 3)
