import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_unet import count, filled, shapes_of

from t2i_jax.networks.encoder_unet import POOLS, AttentionPool, EncoderUNet
from t2i_jax.networks.layers.attention import MultiHeadAttention
from t2i_jax.networks.unet import UNet

TINY = dict(
  channels=8, multipliers=(1, 2), blocks=1, attention="block", attention_levels=(1,),
  head_channels=8, groups=4, block_resample=True, out_channels=5,
)  # fmt: skip
# Dhariwal and Nichol 2021, appendix H: width 128, depth 2 (4 at 64 px), attention at 32, 16 and 8.
PUBLISHED = dict(
  channels=128, blocks=2, attention="block", head_channels=64, epsilon=1e-5, block_resample=True
)
MULTIPLIERS = {
  64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)
}  # fmt: skip


def attending(side):
  """The levels of 32, 16 and 8 pixels."""
  return tuple(i for i in range(len(MULTIPLIERS[side])) if side >> i in (32, 16, 8))


def inputs():
  random = np.random.default_rng(0)
  return jnp.asarray(random.normal(size=(2, 8, 8, 3)), jnp.float32), jnp.array([3, 40])


# Of guided-diffusion's EncoderUNetModel, and of its UNetModel below. With random weights, read
# through `weights.unet_single_file.classifier_map`, the former's logits (three levels, both orders
# of the fused projections) are ours within 1.2e-6 of the largest, whatever the pool.
@pytest.mark.parametrize(
  "side, changes, parameters",
  [
    (64, {"blocks": 4}, 65_438_568), (128, {}, 42_568_040), (256, {}, 54_096_360),
    (512, {}, 54_448_360), (64, {"blocks": 4, "pool": "adaptive"}, 64_617_320),
    (64, {"blocks": 4, "pool": "spatial"}, 79_523_688),
  ],
)  # fmt: skip
def test_published_classifiers_have_their_numbers_of_parameters(side, changes, parameters):
  network = EncoderUNet(**{
    **PUBLISHED, "multipliers": MULTIPLIERS[side], "attention_levels": attending(side), **changes
  })
  assert count(shapes_of(network, jnp.zeros((1, side, side, 3)), jnp.zeros(1))) == parameters


@pytest.mark.parametrize(
  "side, heads, parameters", [(128, 4, 421_529_606), (512, 0, 558_997_638)]
)
def test_denoisers_of_the_other_resolutions_have_theirs(side, heads, parameters):
  network = UNet(**{
    **PUBLISHED, "channels": 256, "multipliers": MULTIPLIERS[side], "heads": heads,
    "attention_levels": attending(side), "classes": 1000, "out_channels": 6,
  })
  given = jnp.zeros((1, side, side, 3)), jnp.zeros(1)
  assert count(shapes_of(network, *given, label=jnp.zeros(1, int))) == parameters


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("patch", [1, 2])
def test_logits_are_float32_and_of_each_picture_alone(pool, patch):
  network = EncoderUNet(**TINY, pool=pool, patch=patch, dtype=jnp.bfloat16)
  x, t = inputs()
  params = filled(shapes_of(network, x, t))
  run = jax.jit(network.apply)
  logits = run(params, x, t)
  assert logits.shape == (2, 5) and logits.dtype == jnp.float32
  other = run(params, x.at[1].add(1.0), t)
  np.testing.assert_array_equal(other[0], logits[0])
  assert np.abs(other[1] - logits[1]).max() > 1e-3
  assert np.all(np.abs(run(params, x, t + 1) - logits).max(axis=1) > 1e-4)


def test_attention_pool_is_what_the_mean_hears():
  random = np.random.default_rng(0)
  x = jnp.asarray(random.normal(size=(3, 4, 2, 8)), jnp.float32)
  pool = AttentionPool(2, 8)
  params = filled(shapes_of(pool, x))
  own = dict(params["params"])
  tokens = x.reshape(3, 8, 8)
  tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], 1) + own.pop("positions")
  whole = MultiHeadAttention(2).apply({"params": own}, tokens)
  np.testing.assert_allclose(pool.apply(params, x), whole[:, 0], atol=1e-5)


def test_the_attention_pool_knows_where_things_are_and_the_mean_does_not():
  x = jnp.zeros((2, 2, 2, 8)).at[0, 0, 0].set(1.0).at[1, 1, 1].set(1.0)
  pool = AttentionPool(2, 4)
  params = filled(shapes_of(pool, x))
  one, other = pool.apply(params, x)
  assert np.abs(one - other).max() > 1e-2
  params["params"]["positions"] = jnp.zeros_like(params["params"]["positions"])
  one, other = pool.apply(params, x)
  np.testing.assert_allclose(one, other, atol=1e-5)


def test_gradient_reaches_every_parameter_and_the_picture():
  for pool in POOLS:
    network = EncoderUNet(**TINY, pool=pool)
    x, t = inputs()
    params = filled(shapes_of(network, x, t))
    loss = lambda params, x: jnp.sum(jnp.square(network.apply(params, x, t)))  # noqa: B023, E731
    gradients, moved = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    assert np.all(np.abs(moved).max(axis=(1, 2, 3)) > 1e-5)
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
      # A key's bias moves all of a query's logits alike, which the softmax does not see.
      if "key" not in jax.tree_util.keystr(path[-2:]) or path[-1].key != "bias":
        assert np.abs(gradient).max() > 1e-6, (pool, jax.tree_util.keystr(path))


def test_an_unknown_pool():
  with pytest.raises(ValueError, match="pool=max"):
    shapes_of(EncoderUNet(**TINY, pool="max"), *inputs())
