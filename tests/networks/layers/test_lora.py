import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.layers import lora
from t2i_jax.networks.unet import UNet

KEY = jax.random.key(0)


class Layers(nn.Module):
  """One Dense and convolutions of several kinds."""

  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(6, (3, 3), dtype=self.dtype, name="same")(x)
    x = nn.Conv(8, (3, 3), 2, padding=((1, 1), (0, 1)), dtype=self.dtype, name="halved")(x)
    x = nn.Conv(5, (1, 1), dtype=self.dtype, use_bias=False, name="point")(nn.silu(x))
    return nn.Dense(7, dtype=self.dtype, name="dense")(nn.silu(x))


def randomised(tree, seed):
  """Noise in place of every leaf, so that nothing is blind."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed), len(leaves))
  drawn = [0.3 * jax.random.normal(k, x.shape, jnp.float32)
           for k, x in zip(keys, leaves, strict=True)]
  return jax.tree.unflatten(structure, drawn)


def adapters_of(params, rank=2, alpha=3.0, seed=7):
  ranks = dict.fromkeys(lora.kernels(params), rank)
  tree = randomised(lora.init(KEY, params, ranks), seed)
  alphas = jax.tree.map(
    lambda layer: {"alpha": jnp.float32(alpha)}, tree, is_leaf=lambda x: "down" in x
  )
  return lora.scaled(tree, alphas)


def applied(network, params, adapters, *args, **options):
  with lora.adapters_on(**options):
    return network.apply({"params": params, "lora": adapters}, *args)


@pytest.fixture(scope="module")
def layers():
  x = jax.random.normal(KEY, (2, 8, 8, 3))
  params = randomised(Layers().init(KEY, x)["params"], 1)
  return x, params, adapters_of(params)


@pytest.fixture(scope="module")
def unet():
  """A small U-Net with every kind of layer, computed again in the backward pass."""
  network = UNet(
    channels=8, multipliers=(1, 2), blocks=1, attention="transformer", attention_levels=(0, 1),
    heads=2, groups=4, remat=True,
  )
  args = (
    jax.random.normal(KEY, (2, 4, 4, 3)), jnp.array([3.0, 40.0]), jax.random.normal(KEY, (2, 5, 6))
  )
  params = randomised(network.init(KEY, *args)["params"], 2)
  return network, args, params, adapters_of(params)


def assert_close(a, b, tolerance):
  a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
  assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_fresh_adapters_change_nothing(layers):
  x, params, _ = layers
  tree = lora.init(KEY, params, dict.fromkeys(lora.kernels(params), 2))
  alphas = {name: {"alpha": jnp.float32(2.0)} for name in tree}
  given = lora.scaled(tree, alphas)
  np.testing.assert_array_equal(
    applied(Layers(), params, given, x), Layers().apply({"params": params}, x)
  )
  limit = 1 / np.sqrt(3 * 3 * 3)
  down = np.asarray(tree["same"]["down"])
  assert down.shape == (3, 3, 3, 2) and tree["same"]["up"].shape == (2, 6)
  assert 0.8 * limit < np.abs(down).max() <= limit
  other = lora.init(jax.random.key(1), params, {"same": 2})["same"]["down"]
  assert np.any(down != np.asarray(other))


@pytest.mark.parametrize("jitted", [False, True])
def test_adapted_equals_merged(layers, jitted):
  x, params, adapters = layers
  run = lambda p, a, x: applied(Layers(), p, a, x)  # noqa: E731
  run = jax.jit(run) if jitted else run
  merged = Layers().apply({"params": lora.merge(params, adapters)}, x)
  assert_close(run(params, adapters, x), merged, 1e-6)
  assert np.abs(merged - Layers().apply({"params": params}, x)).max() > 0.1


def test_each_layer_is_adapted_by_its_own(layers):
  x, params, adapters = layers
  plain = Layers().apply({"params": params}, x)
  for name in params:
    given = {name: adapters[name]}
    merged = Layers().apply({"params": lora.merge(params, given)}, x)
    assert_close(applied(Layers(), params, given, x), merged, 1e-6)
    assert np.abs(merged - plain).max() > 1e-3


def test_the_scale_is_alpha_over_the_rank(layers):
  x, params, adapters = layers
  assert float(adapters["dense"]["scale"]) == 1.5
  given = {"dense": adapters["dense"]}
  once = applied(Layers(), params, given, x) - Layers().apply({"params": params}, x)
  twice = applied(Layers(), params, {"dense": {**adapters["dense"], "scale": 3.0}}, x)
  np.testing.assert_allclose(twice - once, Layers().apply({"params": params}, x) + once, atol=1e-4)


def test_merging_is_undone(layers):
  _, params, adapters = layers
  merged = lora.merge(params, adapters)
  back = lora.merge(merged, adapters, -1.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, params)
  kinds = jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), params)
  assert {x.dtype for x in jax.tree.leaves(lora.merge(kinds, adapters))} == {jnp.dtype("bfloat16")}


@pytest.mark.full
def test_a_network_that_is_computed_again_in_the_backward_pass(unet):
  network, args, params, adapters = unet
  used = set()
  with lora.adapters_on(used=used):
    jax.eval_shape(network.apply, {"params": params, "lora": adapters}, *args)
  assert used == set(lora.kernels(params))

  @jax.jit
  @jax.value_and_grad
  def adapted(factors):
    return jnp.sum(jnp.sin(applied(network, params, {**adapters, **factors}, *args)))

  @jax.jit
  @jax.value_and_grad
  def merged(factors):
    return jnp.sum(jnp.sin(
      network.apply({"params": lora.merge(params, {**adapters, **factors})}, *args)
    ))

  one, other = adapted(adapters), merged(adapters)
  np.testing.assert_allclose(one[0], other[0], rtol=2e-4)
  flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
  assert_close(flat(one[1]), flat(other[1]), 1e-5)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(one[1]))


def test_no_gradient_of_a_frozen_kernel_is_computed():
  network, x, width = nn.Dense(64), jnp.ones((256, 64)), 64
  params = network.init(KEY, x)["params"]
  adapters = lora.scaled(lora.init(KEY, {"d": params}, {"d": 2}), {"d": {"alpha": 2.0}})["d"]

  def loss(down):
    return jnp.sum(applied(network, params, {**adapters, "down": down}, x) ** 2)

  text = str(jax.make_jaxpr(jax.grad(loss))(adapters["down"]))
  products = [line for line in text.splitlines() if "dot_general" in line]
  assert not [line for line in products if f":f32[{width},{width}]" in line]


def test_low_precision_is_of_the_computation_only(layers):
  x, params, adapters = layers
  exact = applied(Layers(), params, adapters, x)
  network = Layers(jnp.bfloat16)
  found = applied(network, params, adapters, x)
  assert found.dtype == jnp.bfloat16
  assert_close(found, exact, 0.03)

  def loss(adapters):
    return jnp.sum(applied(network, params, adapters, x).astype(jnp.float32) ** 2)

  gradients = jax.grad(loss)(adapters)
  assert {g.dtype for g in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
  text = str(jax.make_jaxpr(loss)(adapters))
  products = [line for line in text.splitlines() if "dot_general" in line or "conv_general" in line]
  assert products and all("bf16" in line.partition("=")[0] for line in products)


def test_dropout_is_of_the_low_rank_input(layers):
  x, params, adapters = layers
  given = {"dense": adapters["dense"]}
  plain = Layers().apply({"params": params}, x)
  low = applied(Layers(), params, given, x) - plain
  draws = jax.vmap(
    lambda key: applied(Layers(), params, given, x, dropout=0.5, rng=key) - plain
  )(jax.random.split(KEY, 4000))
  assert np.abs(draws[0] - draws[1]).max() > 0.01
  assert_close(draws.mean(0), low, 0.1)


def test_the_first_pattern_that_is_found_decides():
  paths = ["unet/middle/attention/query", "unet/up/attention/query", "unet/up/attention/mlp_in"]
  patterns = ("!^unet/middle", "attention/(query|key)$")
  assert lora.chosen(paths, patterns) == paths[1:2]
  assert lora.chosen(paths, patterns[::-1]) == paths[:2]
  assert lora.chosen(paths, ()) == []


def test_a_convolution_of_groups_is_refused():
  network, x = nn.Conv(4, (3, 3), feature_group_count=2, name="grouped"), jnp.ones((1, 4, 4, 4))
  params = network.init(KEY, x)["params"]
  with pytest.raises(ValueError, match="convolution of groups"):
    applied(network, params, adapters_of({"a": params})["a"], x)
