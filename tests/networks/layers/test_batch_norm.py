import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.networks.layers.batch_norm import BatchNorm

X = jax.random.normal(jax.random.key(0), (3, 4, 5, 6)) * 2.0 + 1.0


def test_is_linens_batch_norm():
  ours, theirs = BatchNorm(), nn.BatchNorm(momentum=0.9)
  variables = ours.init(jax.random.key(0), X, train=True)
  reference = theirs.init(jax.random.key(0), X, use_running_average=False)
  assert jax.tree.structure(variables) == jax.tree.structure(reference)
  variables = jax.tree.map(lambda v: v + 0.5, variables)
  y, new = ours.apply(variables, X, train=True, mutable=["batch_stats"])
  expected, expected_new = theirs.apply(
    variables, X, use_running_average=False, mutable=["batch_stats"]
  )
  np.testing.assert_allclose(y, expected, atol=1e-5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), new, expected_new)
  y = ours.apply(variables, X, train=False)
  np.testing.assert_allclose(y, theirs.apply(variables, X, use_running_average=True), atol=1e-5)


def test_initialisation_leaves_the_statistics_alone():
  stats = BatchNorm().init(jax.random.key(0), X, train=True)["batch_stats"]
  assert not np.any(stats["mean"]) and np.all(np.asarray(stats["var"]) == 1)


def test_a_second_identical_pass_is_merged_with_a_differentiated_one():
  """What linen's batch norm prevents; see the layer's docstring."""
  kernel = jnp.ones((3, 3, 6, 6))

  def pass_(variables, x):
    y = nn.relu(BatchNorm().apply(variables, x @ kernel[0, 0], train=True, mutable=[])[0])
    return jax.lax.conv_general_dilated(
      y, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  def once(variables, x):
    return jax.grad(lambda v: jnp.sum(pass_(v, x) ** 2))(variables)

  def twice(variables, x):
    return jnp.sum(jnp.tanh(pass_(variables, x))), once(variables, x)

  variables = BatchNorm().init(jax.random.key(0), X, train=True)
  convolutions = [
    jax.jit(f).lower(variables, X).compile().as_text().count(" convolution(") for f in (once, twice)
  ]
  assert convolutions[0] == convolutions[1] > 0


def test_bfloat16_output_has_float32_statistics():
  norm = BatchNorm(dtype=jnp.bfloat16)
  y, variables = norm.init_with_output(jax.random.key(0), X, train=True)
  assert y.dtype == jnp.bfloat16
  assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
