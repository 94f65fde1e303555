import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.layers.resample import enlarged, shuffle, unshuffle
from t2i_jax.networks.layers.resblock import ResBlock
from t2i_jax.networks.unet import UNet

TINY = dict(
  channels=16, multipliers=(1, 2), blocks=1, attention_levels=(), head_channels=16, groups=8,
  patch=2, coordinates=2, mlp_ratio=2.0,
)
# The middle attends; to attend at a level too takes twice as long to compile.
NETWORK = UNet(**TINY)
APPLY = jax.jit(NETWORK.apply)


def inputs():
  random = np.random.default_rng(0)
  given = dict(
    x=random.normal(size=(2, 8, 8, 3)).astype("f4"),
    t=np.array([0, 400], np.int32),
    context=random.normal(size=(2, 5, 12)).astype("f4"),
    mask=np.arange(5) < np.array([[3], [5]]),
    pooled=random.normal(size=(2, 7)).astype("f4"),
  )
  return jax.tree.map(jnp.asarray, given)


def shapes_of(network, *given, **named):
  """Shapes of a network's parameters; nothing is compiled."""
  return jax.eval_shape(network.init, jax.random.key(0), *given, **named)


def filled(shapes, seed=1):
  """Parameters in general position, none at its initial zero; drawing them compiles nothing."""
  random = np.random.default_rng(seed)

  def draw(path, leaf):
    scale = 0.1 if len(leaf.shape) < 2 else np.prod(leaf.shape[:-1]) ** -0.5
    drawn = scale * random.normal(size=leaf.shape) + (path[-1].key == "scale")
    return jnp.asarray(drawn, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def params():
  return filled(shapes_of(NETWORK, **inputs()))


@pytest.fixture(scope="module")
def run(params):
  """The network as a function of its inputs."""
  return lambda **changes: APPLY(params, **{**inputs(), **changes})


def count(shapes):
  return sum(x.size for x in jax.tree.leaves(shapes))


def test_the_published_cifar10_network_has_its_parameters():
  # Ho et al. 2020, appendix B: 35.7 million; the exact number is that of their checkpoint.
  network = UNet(
    channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention_levels=(1,), head_channels=256,
    groups=32, scale_shift=False, positions=False,
  )
  shapes = shapes_of(network, jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))
  assert count(shapes) == 35_746_307


STABLE = dict(
  channels=320, multipliers=(1, 2, 4, 4), blocks=2, attention="transformer",
  attention_levels=(0, 1, 2), epsilon=1e-5, scale_shift=False, symmetric=True,
)
ADM = dict(
  blocks=3, attention="block", head_channels=64, epsilon=1e-5, block_resample=True, classes=1000,
  out_channels=6,
)
PUBLISHED = {
  # Options; side and channels of the input; of the text; of the pooled text; parameters.
  "Stable Diffusion 1": (dict(STABLE, heads=8), (64, 4), (77, 768), 0, 859_520_964),
  "Stable Diffusion 2": (dict(STABLE, head_channels=64), (64, 4), (77, 1024), 0, 865_910_724),
  "Stable Diffusion XL": (
    dict(STABLE, multipliers=(1, 2, 4), attention_levels=(1, 2), depths=(0, 2, 10),
         middle_depth=10, head_channels=64, pooled_mlp=True),
    (128, 4), (77, 2048), 2816, 2_567_463_684,
  ),
  "latent diffusion, 1.4B": (dict(STABLE, heads=8), (32, 4), (77, 1280), 0, 872_300_484),
  "ADM, 64 px": (
    dict(ADM, channels=192, multipliers=(1, 2, 3, 4), attention_levels=(1, 2, 3)),
    (64, 3), None, 0, 295_904_454,
  ),
  "ADM, 256 px": (
    dict(ADM, channels=256, multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(3, 4, 5), blocks=2),
    (256, 3), None, 0, 553_838_086,
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_networks_have_their_parameters(name):
  options, (side, channels), text, pooled, expected = PUBLISHED[name]
  network = UNet(**options)
  shapes = shapes_of(
    network, jnp.zeros((1, side, side, channels)), jnp.zeros(1),
    context=None if text is None else jnp.zeros((1, *text)),
    pooled=jnp.zeros((1, pooled)) if pooled else None,
    label=jnp.zeros(1, jnp.int32) if network.classes else None,
  )  # fmt: skip
  assert count(shapes) == expected


@pytest.mark.parametrize("attention", ["block", "transformer"])
def test_recomputing_blocks_changes_no_gradient(attention):
  # The middle and one block, for the sake of the compiler.
  options = dict(
    channels=8, multipliers=(1,), blocks=0, attention=attention, attention_levels=(), heads=2,
    groups=4, dropout=0.1,
  )
  given = {name: inputs()[name] for name in ("x", "t", "context", "mask")}
  kept, again = UNet(**options), UNet(**options, remat=True)
  params = filled(shapes_of(kept, **given))
  assert jax.tree.structure(params) == jax.tree.structure(shapes_of(again, **given))

  def gradients(network):
    def loss(params):
      rngs = {"dropout": jax.random.key(3)}
      return jnp.sum(jnp.square(network.apply(params, **given, train=True, rngs=rngs)))

    return jax.grad(loss), str(jax.make_jaxpr(jax.grad(loss))(params))

  (plain, program), (checkpointed, recomputing) = gradients(kept), gradients(again)
  # jax.checkpoint's name in a program.
  assert "checkpoint" in recomputing or "remat" in recomputing
  assert "checkpoint" not in program and "remat" not in program
  one, two = jax.jit(plain)(params), jax.jit(checkpointed)(params)
  largest = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(one))
  for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(x, y, atol=1e-5 * largest)


def test_stacked_blocks_compute_what_they_do_one_by_one():
  apart = UNet(
    channels=8, multipliers=(1,), blocks=0, attention="transformer", attention_levels=(), heads=2,
    groups=4, middle_depth=3,
  )  # fmt: skip
  given = {name: inputs()[name] for name in ("x", "t", "context", "mask")}
  params = filled(shapes_of(apart, **given))
  stacked = jax.tree.map(lambda x: x, params)
  middle = stacked["params"]["middle_attention"]
  blocks = [middle.pop(f"block_{i}") for i in range(3)]
  middle["block"] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
  scanned = jax.jit(apart.clone(scan=True).apply)(stacked, **given)
  one_by_one = jax.jit(apart.apply)(params, **given)
  np.testing.assert_allclose(scanned, one_by_one, atol=1e-5 * float(jnp.abs(scanned).max()))


def test_a_network_with_text_has_the_parameters_counted_by_hand():
  conv = lambda size, i, o: size**2 * i * o + o  # noqa: E731
  dense, norm = (lambda i, o: i * o + o), (lambda c: 2 * c)
  width, text, pooled = 4 * 16, 12, 7

  def block(i, o):
    skip = dense(i, o) if i != o else 0
    return norm(i) + conv(3, i, o) + dense(width, 2 * o) + norm(o) + conv(3, o, o) + skip

  def attention(c):
    own = norm(c) + 4 * dense(c, c)
    cross = norm(c) + 2 * dense(c, c) + 2 * dense(text, c)
    return own + cross + norm(c) + dense(c, 2 * c) + dense(2 * c, c)

  expected = conv(3, 3 * 4 + 8, 16) + dense(16, width) + dense(width, width) + dense(pooled, width)
  expected += block(16, 16) + conv(3, 16, 16) + block(16, 32) + attention(32)
  expected += 2 * block(32, 32) + attention(32)
  expected += block(32 + 32, 32) + block(32 + 16, 32) + 2 * attention(32) + conv(3, 32, 32)
  expected += block(32 + 16, 16) + block(16 + 16, 16) + norm(16) + conv(3, 16, 3 * 4)
  network = UNet(**{**TINY, "attention_levels": (1,)})
  assert count(shapes_of(network, **inputs())) == expected


@pytest.mark.parametrize(
  "dtype, changes, shape",
  [
    (jnp.float32, {"patch": 1, "coordinates": 0, "multipliers": (1,), "attention_levels": ()},
     (1, 6, 10, 3)),
    (jnp.bfloat16, {"multipliers": (1, 2, 3), "blocks": 2, "attention_levels": (0, 2)},
     (3, 16, 24, 4)),
    (jnp.float32, {"scale_shift": False, "mlp_ratio": 0.0, "positions": False}, (2, 8, 8, 1)),
  ],
)
def test_the_output_is_a_float32_picture(dtype, changes, shape):
  network = UNet(**{**TINY, **changes, "dtype": dtype})
  given = jnp.zeros(shape), jnp.zeros(shape[0]), jnp.zeros((shape[0], 5, 12))
  out, variables = jax.eval_shape(
    lambda *given: network.init_with_output(jax.random.key(0), *given), *given
  )
  assert out.shape == shape and out.dtype == jnp.float32
  assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_coordinates_enter_beside_the_picture(params):
  assert params["params"]["conv_in"]["kernel"].shape == (3, 3, 3 * 2**2 + 4 * 2, 16)


def test_the_output_and_residual_branches_start_at_zero():
  network = UNet(**{**TINY, "attention_levels": (1,)})
  ends = re.compile(r"((block|block_\d)/conv_out|attention/out|mlp_out|^conv_out)/kernel$")

  @jax.jit
  def last_kernels():
    params = network.init(jax.random.key(0), **inputs())["params"]
    flat = {
      "/".join(p.key for p in path): leaf
      for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    }
    return {name: leaf for name, leaf in flat.items() if ends.search(name)}

  kernels = last_kernels()
  # 2 residual blocks down, 2 in the middle, 4 up; 4 places with 2 attentions and an MLP.
  assert len(kernels) == 8 + 4 * 3 + 1 and "conv_out/kernel" in kernels
  assert all(np.all(np.asarray(kernel) == 0) for kernel in kernels.values())


def test_masked_text_changes_nothing_and_other_text_does(run):
  context, mask = inputs()["context"], inputs()["mask"]
  np.testing.assert_allclose(run(context=jnp.where(mask[..., None], context, 50.0)), run(),
                             atol=1e-5)
  moved = np.abs(run(context=context.at[:, 0].add(1.0)) - run()).max(axis=(1, 2, 3))
  assert np.all(moved > 1e-3)


def test_rows_do_not_mix(run):
  x = inputs()["x"]
  other = run(x=x.at[1].add(1.0), t=jnp.array([0, 3]))
  np.testing.assert_allclose(other[0], run()[0], atol=1e-5)
  assert np.abs(other[1] - run()[1]).max() > 1e-2


@pytest.mark.parametrize("name, change", [("t", 1), ("pooled", 1.0)])
def test_time_and_the_pooled_text_matter(run, name, change):
  moved = np.abs(run(**{name: inputs()[name] + change}) - run()).max(axis=(1, 2, 3))
  assert np.all(moved > 1e-3)


def test_gradient_reaches_every_parameter(params):
  def loss(params):
    return jnp.sum(jnp.square(NETWORK.apply(params, **inputs())))

  for path, gradient in jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(loss))(params))[0]:
    # A key's bias moves all of a query's logits alike, which the softmax does not see.
    if path[-2:] != (jax.tree_util.DictKey("key"), jax.tree_util.DictKey("bias")):
      assert np.abs(gradient).max() > 1e-6, jax.tree_util.keystr(path)


def test_bfloat16_keeps_norms_softmax_and_the_output_in_float32(params, run):
  network = UNet(**TINY, dtype=jnp.bfloat16)
  program = str(jax.make_jaxpr(network.apply)(params, **inputs()))
  # Softmax's exponentials and the norms' inverse roots.
  types = re.findall(r":(\w+)\[[^\]]*\] = (?:exp|rsqrt)\b", program)
  assert len(types) > 20 and set(types) == {"f32"}
  # Without the norms' sums [B, 1, C], which are products on a CPU.
  products = re.findall(
    r":(\w+)\[(?!2,1,\d+\])[^\]]*\] = (?:dot_general|conv_general_dilated)\[", program
  )
  # All but the last convolution and the attentions' logits.
  assert products.count("bf16") > 0.8 * len(products) and products[-1] == "f32"

  out = jax.jit(network.apply)(params, **inputs())
  exact = run()
  assert np.abs(out - exact).max() < 0.05 * np.abs(exact).max()
  rounded = out.astype(jnp.bfloat16).astype(jnp.float32)
  assert np.mean(np.asarray(rounded != out)) > 0.9


def test_dropout_is_on_in_training_alone():
  block = ResBlock(8, groups=4, dropout=0.5)
  x, embedding = jnp.ones((1, 4, 4, 8)) * jnp.arange(8), jnp.ones((1, 3))
  params = filled(jax.eval_shape(lambda: block.init(jax.random.key(0), x, embedding, False)))

  @jax.jit
  def run(keys):
    train = [block.apply(params, x, embedding, True, rngs={"dropout": key}) for key in keys]
    return [*train, block.apply(params, x, embedding, False)]

  keys = jax.random.split(jax.random.key(1))
  one, again, two, still = run([keys[0], keys[0], keys[1]])
  np.testing.assert_array_equal(one, again)
  assert np.abs(one - two).max() > 1e-2 and np.abs(one - still).max() > 1e-2


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_shuffle_inverts_unshuffle(patch):
  x = np.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
  patches = unshuffle(x, patch)
  assert patches.shape == (2, 8 // patch, 12 // patch, 3 * patch**2)
  np.testing.assert_array_equal(patches[1, 1, 0], x[1, patch : 2 * patch, :patch].reshape(-1))
  np.testing.assert_array_equal(shuffle(patches, patch), x)


def test_enlarged_repeats_each_pixel():
  x = np.arange(2 * 3 * 2 * 4).reshape(2, 3, 2, 4)
  np.testing.assert_array_equal(enlarged(jnp.asarray(x), 6, 8), x.repeat(2, 1).repeat(4, 2))


def test_embeddings_of_several_labels_are_added_up():
  network = UNet(**{**TINY, "classes": 5})
  given = {**inputs(), "label": jnp.array([[0, 3], [1, 4]])}
  params = filled(shapes_of(network, **given))
  apply = jax.jit(lambda params, label: network.apply(params, **{**given, "label": label}))
  table = params["params"]["label"]["embedding"]
  assert table.shape == (5, 64)
  summed = jax.tree.map(lambda x: x, params)
  summed["params"]["label"]["embedding"] = table.at[0].set(table[0] + table[3])
  both, one = apply(params, given["label"]), apply(summed, jnp.array([0, 0]))
  np.testing.assert_allclose(both[0], one[0], atol=1e-5)
  assert np.abs(both[1] - one[1]).max() > 1e-3
