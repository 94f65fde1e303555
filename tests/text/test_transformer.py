import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.text.tokenizer import null_text
from t2i_jax.text.transformer import TransformerEncoder

LENGTH = 6
IDS = jnp.array([[1, 5, 6, 2, 0, 0], [1, 7, 8, 9, 10, 2]])
MASK = IDS != 0


def encoder(pool, dtype=jnp.float32):
  return TransformerEncoder(
    vocab_size=16, length=LENGTH, width=8, layers=1, heads=2, pool=pool, dtype=dtype
  )


@pytest.fixture(scope="module")
def params():
  """Parameters by pool, large enough that attention matters."""

  def draw(pool):
    shapes = jax.eval_shape(encoder(pool).init, jax.random.key(0), IDS, MASK)
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: 0.7 * random.normal(size=x.shape).astype("f4"), shapes)

  return {pool: draw(pool) for pool in ("mean", "flatten")}


@pytest.fixture(scope="module")
def run(params):
  programs = {pool: jax.jit(encoder(pool).apply) for pool in params}
  return lambda pool, ids=IDS, mask=MASK: programs[pool](params[pool], ids, mask)


each_pool = pytest.mark.parametrize("pool", ["mean", "flatten"])


@each_pool
def test_shapes_and_types(pool):
  for dtype in (jnp.float32, jnp.bfloat16):
    (features, pooled), variables = jax.eval_shape(
      lambda dtype=dtype: encoder(pool, dtype).init_with_output(jax.random.key(0), IDS, MASK)
    )
    assert features.shape == (2, LENGTH, 8) and pooled.shape == (2, 8)
    assert features.dtype == pooled.dtype == dtype
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@each_pool
def test_what_is_masked_is_not_seen(run, pool):
  features, pooled = run(pool)
  other_features, other_pooled = run(pool, ids=jnp.where(MASK, IDS, 11))
  np.testing.assert_allclose(other_pooled, pooled, atol=1e-5)
  np.testing.assert_allclose(other_features[MASK], features[MASK], atol=1e-5)


def test_mean_pooling_does_not_depend_on_the_padding(params):
  apply = jax.jit(encoder("mean").apply)
  long = apply(params["mean"], IDS[:1], MASK[:1])
  short = apply(params["mean"], IDS[:1, :4], MASK[:1, :4])
  np.testing.assert_allclose(short[0], long[0][:, :4], atol=1e-5)
  np.testing.assert_allclose(short[1], long[1], atol=1e-5)


@each_pool
@pytest.mark.parametrize("position", range(4))
def test_every_token_matters_to_the_pooled_vector(run, pool, position):
  moved = np.abs(run(pool, ids=IDS.at[0, position].set(12))[1] - run(pool)[1])
  assert moved[0].max() > 1e-3 and moved[1].max() < 1e-6


@each_pool
def test_the_order_of_words_matters(run, pool):
  swapped = IDS.at[0, 1:3].set(IDS[0, 2:0:-1])
  assert np.abs(run(pool, ids=swapped)[1][0] - run(pool)[1][0]).max() > 1e-3


@each_pool
def test_the_null_text_and_no_text_are_finite(run, pool):
  null = null_text(LENGTH)
  ids, mask = np.stack([null["ids"], IDS[1]]), np.stack([null["mask"], np.zeros(LENGTH, bool)])
  for out in run(pool, jnp.asarray(ids), jnp.asarray(mask)):
    assert np.all(np.isfinite(out))


@each_pool
def test_gradient_reaches_every_parameter(params, pool):
  def loss(params):
    features, pooled = encoder(pool).apply(params, IDS, MASK)
    return jnp.sum(jnp.sin(features) * MASK[..., None]) + jnp.sum(jnp.sin(pooled))

  gradients = jax.jit(jax.grad(loss))(params[pool])
  for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
    # A key's bias moves all of a query's logits alike, which the softmax does not see.
    if path[-2:] != (jax.tree_util.DictKey("key"), jax.tree_util.DictKey("bias")):
      assert np.abs(gradient).max() > 1e-5, jax.tree_util.keystr(path)


def test_tokens_and_positions_start_with_unit_variance():
  # With 0.02, small networks never learned the order of two objects (docs/learning.md).
  wide = TransformerEncoder(vocab_size=64, length=LENGTH, width=128, layers=1, heads=2)
  start = wide.init(jax.random.key(0), IDS, MASK)["params"]
  assert np.std(start["tokens"]["embedding"]) == pytest.approx(1.0, rel=0.05)
  assert np.std(start["positions"]) == pytest.approx(1.0, rel=0.1)
