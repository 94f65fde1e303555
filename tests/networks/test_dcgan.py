import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.dcgan import Discriminator, Generator, TransposedConv


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def shapes(network, *args):
  return jax.eval_shape(lambda: network.init(jax.random.key(0), *args, train=True))


def test_published_generator_has_its_number_of_parameters():
  made = shapes(Generator(64, 64, 128), jnp.zeros((2, 100)), jnp.zeros((2, 1024)))
  assert count(made["params"]) == 4_756_736


@pytest.mark.parametrize("resolution", [16, 32, 64, 256])
def test_shapes_at_every_power_of_two(resolution):
  generator = Generator(resolution, 8, 4)
  discriminator = Discriminator(resolution, 8, 4)
  text = jnp.zeros((2, 5))
  made = shapes(generator, jnp.zeros((2, 3)), text)
  images = jax.eval_shape(
    lambda v: generator.apply(v, jnp.zeros((2, 3)), text, train=False), made
  )
  assert images.shape == (2, resolution, resolution, 3) and images.dtype == jnp.float32
  made = shapes(discriminator, jnp.zeros(images.shape), text)
  logits = jax.eval_shape(
    lambda v: discriminator.apply(v, jnp.zeros(images.shape), text, train=False), made
  )
  assert logits.shape == (2,)


def test_transposed_convolution_is_the_one_on_a_spread_out_input():
  x = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
  ours = TransposedConv(6)
  variables = jax.jit(ours.init)(jax.random.key(1), x)
  reference = nn.ConvTranspose(6, (4, 4), (2, 2), padding="SAME", use_bias=False)
  np.testing.assert_allclose(ours.apply(variables, x), reference.apply(variables, x), atol=1e-6)


def test_bfloat16_keeps_parameters_and_statistics_in_float32():
  network = Generator(16, 4, 4, dtype=jnp.bfloat16)
  noise, text = jnp.ones((2, 3)), jnp.ones((2, 5))
  variables = jax.eval_shape(lambda: network.init(jax.random.key(0), noise, text, train=True))
  images, new = jax.eval_shape(
    lambda v: network.apply(v, noise, text, train=True, mutable=["batch_stats"]), variables
  )
  assert {x.dtype for x in jax.tree.leaves((variables, new))} == {jnp.dtype("float32")}
  assert images.dtype == jnp.float32


def test_score_depends_on_picture_and_text():
  network = Discriminator(16, 4, 4)
  image = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  text = jax.random.normal(jax.random.key(1), (2, 5))
  variables = jax.jit(lambda: network.init(jax.random.key(2), image, text, train=True))()
  score = lambda image, text: network.apply(variables, image, text, train=False).sum()  # noqa: E731
  for gradient in jax.jit(jax.grad(score, (0, 1)))(image, text):
    assert np.all(np.abs(gradient).reshape(2, -1).sum(axis=1) > 0)
