import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.dcgan import Discriminator, Generator, transposed_conv


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


def test_transposed_convolution_and_its_gradients_are_those_that_jax_derives():
  x, g = jax.random.normal(jax.random.key(0), (2, 3, 5, 4)), np.ones((2, 6, 10, 7), "f4")
  kernel = jax.random.normal(jax.random.key(1), (4, 4, 7, 4))

  def reference(x, kernel):
    strided = lambda y: jax.lax.conv_general_dilated(  # noqa: E731
      y, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    (y,) = jax.linear_transpose(strided, g)(x)
    return y

  y, pull_back = jax.vjp(transposed_conv, x, kernel)
  expected, expected_pull_back = jax.vjp(reference, x, kernel)
  assert y.shape == g.shape
  np.testing.assert_allclose(y, expected, atol=1e-5)
  g = jax.random.normal(jax.random.key(2), g.shape)
  for ours, theirs in zip(pull_back(g), expected_pull_back(g), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


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
