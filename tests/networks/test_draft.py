import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_unet import filled, shapes_of

from t2i_jax.networks.draft import Draft, shrunk

NETWORK = Draft(side=4, channels=16, head_channels=8, layers=1)
APPLY = jax.jit(NETWORK.apply)
TEXT = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 12)), jnp.float32)
MASK = jnp.arange(5) < jnp.array([[3], [5]])


@pytest.fixture(scope="module")
def params():
  return filled(shapes_of(NETWORK, TEXT, MASK))


def test_shapes_and_what_is_masked_is_not_read(params):
  features, picture = APPLY(params, TEXT, MASK)
  assert features.shape == (2, 4, 4, 16) and picture.shape == (2, 4, 4, 3)
  changed = APPLY(params, TEXT.at[:, 3:].add(1.0), MASK)[1]
  np.testing.assert_allclose(changed[0], picture[0], atol=1e-5)
  assert np.abs(changed[1] - picture[1]).max() > 1e-2


def test_every_place_reads_for_itself(params):
  _, picture = APPLY(params, TEXT, MASK)
  cells = np.asarray(picture[1]).reshape(16, 3)
  apart = np.abs(cells[:, None] - cells).max(-1) + np.eye(16)
  assert apart.min() > 1e-4


def test_it_begins_as_grey():
  variables = jax.jit(NETWORK.init)(jax.random.key(0), TEXT, MASK)
  assert not np.any(APPLY(variables, TEXT, MASK)[1])


def test_picture_is_float32_whatever_is_computed_in(params):
  half = Draft(side=4, channels=16, head_channels=8, layers=1, dtype=jnp.bfloat16)
  features, picture = half.apply(params, TEXT, MASK)
  assert features.dtype == jnp.bfloat16 and picture.dtype == jnp.float32


def test_shrunk_takes_means_of_squares():
  x = np.random.default_rng(0).normal(size=(2, 6, 9, 3)).astype(np.float32)
  square = np.concatenate([x, x[:, :3]], axis=1)  # 9 x 9
  small = shrunk(jnp.asarray(square), 3)
  np.testing.assert_allclose(small[1, 2, 0], square[1, 6:9, :3].mean((0, 1)), atol=1e-6)
