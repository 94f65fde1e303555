import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.dit import DiT
from t2i_jax.networks.layers import backends
from t2i_jax.networks.layers.attention import attend
from t2i_jax.networks.layers.embeddings import patch_positions, sincos_2d
from t2i_jax.networks.layers.stack import REMATS, run_blocks
from t2i_jax.networks.mmdit import MMDiT, places
from t2i_jax.networks.u_vit import UViT
from t2i_jax.parallel import sharding
from t2i_jax.parallel.mesh import make_mesh


def shapes_of(network, side, channels, text=None, pooled=0):
  """Shapes of a network's parameters; nothing is compiled."""
  given = {"context": jnp.zeros((1, *text))} if text else {}
  if pooled:
    given["pooled"] = jnp.zeros((1, pooled))
  if getattr(network, "classes", 0):
    given["label"] = jnp.zeros(1, jnp.int32)
  x = jnp.zeros((1, side, side, channels))
  return jax.eval_shape(lambda: network.init(jax.random.key(0), x, jnp.zeros(1), **given))


def count(shapes):
  return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
  "width, depth, heads, expected",
  [(384, 12, 6, 32_963_360), (768, 12, 12, 130_512_416), (1024, 24, 16, 458_102_816),
   (1152, 28, 16, 675_129_632)],
)  # fmt: skip
def test_published_dits_have_their_parameters(width, depth, heads, expected):
  """S, B, L and XL with patches of 2, at 256 px, of 1,000 labels and the one for none.

  The authors count the fixed positions, which here are no parameters.
  """
  network = DiT(2, width, depth, heads, classes=1000, out_channels=8)
  assert count(shapes_of(network, 32, 4)) + 16 * 16 * width == expected


def test_pixart_has_its_parameters():
  # Of diffusers' PixArtTransformer2DModel without conditions on sizes.
  network = DiT(modulation="single", out_channels=8)
  assert count(shapes_of(network, 64, 4, (120, 4096))) == 610_856_096


@pytest.mark.parametrize(
  "options, text, expected",
  [
    (dict(depth=12), (77, 768), 44_692_644),
    (dict(depth=16), (77, 768), 58_345_636),
    (dict(width=1024, depth=20, heads=16, classes=1000, convolution=False), None, 286_763_024),
    # As it was published, the convolution being the default of its configuration.
    (dict(width=1024, depth=20, heads=16, classes=1000), None, 286_763_172),
    (dict(width=1152, depth=28, heads=16, classes=1000, convolution=False), None, 500_832_016),
  ],
)
def test_published_u_vits_have_their_parameters(options, text, expected):
  """S/2 and its deep form on text, L/2 and H/2 on labels, learned positions counted."""
  assert count(shapes_of(UViT(**options), 32, 4, text)) == expected


@pytest.mark.parametrize(
  "options, expected",
  [
    (dict(), 2_028_328_000),
    (dict(width=2432, depth=38, heads=38, norm=True), 8_056_627_520),
    # 3.5's medium model, as diffusers counts it.
    (dict(norm=True, dual=13, largest=384), 2_243_171_520),
  ],
)
def test_published_mmdits_have_their_parameters(options, expected):
  assert count(shapes_of(MMDiT(**options), 128, 16, (333, 4096), 2048)) == expected


def given(name):
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)  # noqa: E731
  inputs = dict(x=draw(2, 4, 6, 3), t=jnp.array([3.0, 700.0]), context=draw(2, 3, 6))
  return inputs if name == "u_vit" else {**inputs, "pooled": draw(2, 5)}


NETWORKS = {
  "dit": DiT(2, 8, 2, 2, out_channels=6),
  "single": DiT(2, 8, 2, 2, modulation="single"),
  "u_vit": UViT(2, 8, 4, 2),
  "mmdit": MMDiT(2, 8, 4, 2, norm=True, dual=1, grid=4, largest=4),
}


def filled(shapes, seed=1):
  """Parameters in general position, none at its initial zero; drawing them compiles nothing."""
  random = np.random.default_rng(seed)
  draw = lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
  return jax.tree.map(draw, shapes)


def apart(tree):
  """A stack's rows under names of their own."""
  flat = {}
  for name, leaf in tree.items():
    if "blocks" not in name:
      flat[name] = leaf
      continue
    start = 1 if name == "blocks" and "dual_blocks" in tree else 0
    rows = jax.tree.leaves(leaf)[0].shape[0]
    for i in range(rows):
      flat[f"{name}_{start + i}"] = jax.tree.map(lambda x: x[i], leaf)  # noqa: B023
  return flat


@functools.cache
def params_of(name):
  network = NETWORKS[name]
  return filled(jax.eval_shape(lambda: network.init(jax.random.key(0), **given(name))))["params"]


def assert_same(one, two):
  largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one))
  assert jax.tree.structure(one) == jax.tree.structure(two)
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["u_vit", "mmdit"])
def test_a_scan_computes_what_its_blocks_do_one_by_one(name):
  params, inputs = params_of(name), given(name)
  network, one_by_one = NETWORKS[name], NETWORKS[name].clone(scan=False)
  shapes = jax.eval_shape(lambda: one_by_one.init(jax.random.key(0), **inputs))["params"]
  assert jax.tree.structure(shapes) == jax.tree.structure(apart(params))
  together = jax.jit(lambda params: network.apply({"params": params}, **inputs))(params)
  alone = jax.jit(lambda params: one_by_one.apply({"params": params}, **inputs))(apart(params))
  np.testing.assert_allclose(together, alone, atol=1e-5 * np.abs(alone).max())


class Block(nn.Module):
  """A small block with what policies tell apart: products with weights, and attention."""

  @nn.compact
  def __call__(self, x, each, scale):
    h = nn.Dense(8, name="in")(jnp.sin(x * scale))
    h = h + attend(*3 * [h.reshape(*h.shape[:2], 2, 4)]).reshape(h.shape)
    return x + nn.Dense(x.shape[-1], name="out")(jnp.tanh(h) + each)


class Blocks(nn.Module):
  remat: str = "none"
  scan: bool = True

  @nn.compact
  def __call__(self, x, each):
    x, kept = run_blocks(
      lambda name: Block(name=name), "blocks", 3, x, (jnp.float32(2.0),), each, keep=True,
      remat=self.remat, scan=self.scan,
    )  # fmt: skip
    return x, kept


RANDOM = np.random.default_rng(0)
TOKENS, EACH = (jnp.asarray(RANDOM.normal(size=size), jnp.float32) for size in ((2, 5, 8), (3, 8)))
STACKED = filled(jax.eval_shape(Blocks().init, jax.random.key(0), TOKENS, EACH))["params"]


def loss(network, params):
  x, kept = network.apply({"params": params}, TOKENS, EACH)
  return jnp.sum(jnp.square(x)) + jnp.sum(kept)


@functools.cache
def differentiated(remat="none", scan=True):
  """A stack's loss and gradients."""
  params = STACKED if scan else apart(STACKED)
  return jax.jit(jax.value_and_grad(lambda params: loss(Blocks(remat, scan), params)))(params)


def test_stacked_blocks_have_the_gradients_of_blocks_one_by_one():
  value, gradients = differentiated()
  one_by_one, apart_gradients = differentiated(scan=False)
  np.testing.assert_allclose(value, one_by_one, rtol=1e-5)
  assert_same(apart(gradients), apart_gradients)


@pytest.mark.parametrize(
  "remat, scan", [*((policy, True) for policy in REMATS[1:]), ("dots", False)]
)
def test_recomputing_changes_no_gradient(remat, scan):
  value, gradients = differentiated(scan=scan)
  again, again_gradients = differentiated(remat, scan)
  np.testing.assert_allclose(value, again, rtol=1e-5)
  assert_same(gradients, again_gradients)


def test_policies_recompute_less_the_more_they_keep():
  def products(remat):
    program = jax.make_jaxpr(jax.grad(lambda params: loss(Blocks(remat), params)))(STACKED)
    return str(program).count("dot_general[")

  none, full, dots, attention = map(products, ("none", "full", "dots", "attention"))
  assert none < dots < full and none < attention < full


def test_there_may_be_no_block():
  x, kept = run_blocks(None, "blocks", 0, TOKENS)
  assert x is TOKENS and kept is None


def test_a_mesh_changes_no_prediction():
  """Examples, tokens and heads on devices of their own: what one device predicts."""
  params, inputs = params_of("mmdit"), given("mmdit")
  apply = jax.jit(lambda params: NETWORKS["mmdit"].apply({"params": params}, **inputs))
  alone = apply(params)
  mesh = make_mesh({"data": 2, "sequence": 2, "tensor": 2})
  rules = sharding.parse_rules([("(query|key|value)/kernel", "tensor(-1)"), ("out", "tensor(-2)")])
  with jax.set_mesh(mesh):
    placed = jax.device_put(params, sharding.shardings(params, rules, mesh))
    np.testing.assert_allclose(apply(placed), alone, atol=1e-5 * np.abs(alone).max())


@pytest.mark.parametrize("name", NETWORKS)
def test_everything_that_is_given_matters(name):
  params = params_of(name)
  network = NETWORKS[name]
  inputs = given(name)
  run = jax.jit(lambda inputs, mask: network.apply({"params": params}, mask=mask, **inputs))
  mask = jnp.array([[True, True, False]] * 2)
  base = run(inputs, mask)
  assert base.shape == (2, 4, 6, network.out_channels or 3) and base.dtype == jnp.float32
  for key in inputs:
    moved = {**inputs, key: inputs[key].at[0].add(1.0)}
    change = np.abs(run(moved, mask) - base).max(axis=(1, 2, 3))
    assert change[0] > 1e-4 and change[1] < 1e-5, key
  unread = {**inputs, "context": inputs["context"].at[:, 2].add(9.0)}
  np.testing.assert_allclose(run(unread, mask), base, atol=1e-5)


def test_branches_and_the_output_are_closed_at_first(name="mmdit"):
  # Peebles and Xie 2023, section 3.2: blocks begin as the identity, and the output at zero.
  params = jax.jit(lambda: NETWORKS[name].init(jax.random.key(0), **given(name)))()["params"]
  flat = {"/".join(key.key for key in path): leaf
          for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}  # fmt: skip
  closed = {key for key in flat if "modulation" in key or key.startswith("out/")}
  assert len(closed) >= 6
  for key, leaf in flat.items():
    assert key not in closed or not np.any(leaf), key
  assert np.any(flat["patches/kernel"])


def test_positions():
  # Columns come first, as in the published weights; `sincos_2d` has rows first.
  ours = patch_positions(np.arange(3), np.arange(5), 8).reshape(3, 5, 8)
  other = sincos_2d(3, 5, 8).reshape(3, 5, 8)
  np.testing.assert_array_equal(ours[..., :4], other[..., 4:])
  np.testing.assert_array_equal(ours[..., 4:], other[..., :4])
  # Stable Diffusion 3 at 1024 px: 64 tokens a side, in the middle of 192 that run from 0 to 64.
  np.testing.assert_allclose(places(64, 64, 192), np.arange(192)[64:128] / 3)


def test_the_tpu_s_kernel_computes_attention():
  """In its interpreter here; keys that do not count and whole blocks' padding are left out."""
  random = np.random.default_rng(0)
  query, key, value = (
    jnp.asarray(random.normal(size=(2, length, 2, 8)), jnp.float32) for length in (600, 520, 520)
  )
  mask = jnp.arange(520) < jnp.array([[520], [300]])
  mask = mask[:, None, None]
  ours = backends.tpu_attention(query, key, value, mask, 0.5)
  other = jax.nn.dot_product_attention(query, key, value, mask=mask, scale=0.5)
  np.testing.assert_allclose(ours, other, atol=1e-5)


def test_a_cpu_takes_xla_s_attention():
  x = jnp.zeros((1, backends.LONG, 1, 8))
  assert backends.platform() == "cpu" and backends.choose(x, x, None, None) is None
