import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.networks.vgg import VGG16


def test_it_has_the_convolutions_of_vgg16():
  shapes = jax.eval_shape(VGG16().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 14_714_688
  found = jax.eval_shape(VGG16().apply, shapes, jnp.zeros((2, 64, 64, 3)))
  widths = (64, 128, 256, 512, 512)
  assert [x.shape for x in found] == [(2, 64 >> i, 64 >> i, c) for i, c in enumerate(widths)]


def test_features_are_the_last_of_each_block_before_pooling():
  network = VGG16(((2, 1), (3, 1)))
  image = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
  variables = network.init(jax.random.key(1), image)
  first, second = network.apply(variables, image)
  assert np.min(first) == 0 and np.max(first) > 0
  alone = VGG16(((2, 1),)).apply({"params": {"conv_0_0": variables["params"]["conv_0_0"]}}, image)
  np.testing.assert_array_equal(first, alone[0])
  # Of each square of four pixels the second block sees the largest value of each channel.
  pooled = first.reshape(1, 4, 2, 4, 2, 2).max((2, 4))
  conv = nn.Conv(3, (3, 3)).apply({"params": variables["params"]["conv_1_0"]}, pooled)
  np.testing.assert_allclose(second, nn.relu(conv), rtol=1e-5)
