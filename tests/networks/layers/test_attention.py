import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.layers.attention import MultiHeadAttention, attend
from t2i_jax.networks.layers.backends import cpu_attention


def draw(*shapes, seed=0, dtype=jnp.float32):
  random = np.random.default_rng(seed)
  return [jnp.asarray(random.normal(size=shape), dtype) for shape in shapes]


def written_out(query, key, value, mask):
  """Softmax of the scaled products, in float64; [B, T, H, D]."""
  query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
  logits = np.einsum("bthd,bshd->bhts", query, key) / np.sqrt(query.shape[-1])
  logits = np.where(mask, logits, -np.inf)
  weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return np.einsum("bhts,bshd->bthd", weights / weights.sum(axis=-1, keepdims=True), value)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_attend_is_softmax_attention(dtype, tolerance):
  query, key, value = draw((2, 3, 2, 8), (2, 6, 2, 8), (2, 6, 2, 8), dtype=dtype)
  mask = np.arange(6) < np.array([4, 6])[:, None, None, None]
  out = attend(query, key, value, mask)
  assert out.dtype == dtype
  expected = written_out(query, key, value, mask)
  np.testing.assert_allclose(np.asarray(out, np.float64), expected, atol=tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_cpus_attention_is_jaxs(dtype):
  query, key, value = draw((2, 3, 2, 8), (2, 6, 2, 8), (2, 6, 2, 8), dtype=dtype)
  (bias,) = draw((1, 2, 3, 6))
  pairs = np.tri(3, 6, 2, dtype=bool)[None, None]
  # Where nothing may be attended to, all keys count alike.
  nothing = np.array([True, False])[:, None, None, None] & np.ones((2, 1, 1, 6), bool)
  for given in ((None, None, None), (bias, None, 0.3), (None, pairs, None), (bias, nothing, 1.0)):
    ours = cpu_attention(query, key, value, *given[:2], given[2])
    theirs = jax.nn.dot_product_attention(query, key, value, *given[:2], scale=given[2])
    assert ours.dtype == theirs.dtype == dtype
    tolerance = 1e-6 if dtype == jnp.float32 else 0.01
    np.testing.assert_allclose(*(np.asarray(x, "f4") for x in (ours, theirs)), atol=tolerance)


def test_softmax_of_bfloat16_logits_is_float32():
  # 256 equal keys and one that is a little better: in bfloat16 its logit would be the same.
  key = jnp.zeros((1, 257, 1, 16), jnp.bfloat16).at[:, 0].set(16.0).at[:, 1:].set(15.9375)
  query = jnp.full((1, 1, 1, 16), 16.0, jnp.bfloat16)
  value = jnp.zeros((1, 257, 1, 16), jnp.bfloat16).at[:, 0].set(1.0)
  given = float(attend(query, key, value)[0, 0, 0, 0])
  assert given == pytest.approx(1 / (1 + 256 * np.exp(-16 * 16 * 0.0625 / 4)), rel=0.01)


@pytest.fixture(scope="module")
def cross():
  network = MultiHeadAttention(heads=2)
  x, context = draw((2, 4, 8), (2, 5, 6))
  mask = jnp.array([[True] * 3 + [False] * 2, [True] * 5])
  shapes = jax.eval_shape(network.init, jax.random.key(1), x, context, mask)
  random = np.random.default_rng(1)
  params = jax.tree.map(lambda x: 0.4 * random.normal(size=x.shape).astype("f4"), shapes)
  return jax.jit(network.apply), params, x, context, mask


def test_heads_attend_apart_through_their_projections(cross):
  apply, params, x, context, mask = cross
  project = lambda name, y: np.asarray(  # noqa: E731
    y @ params["params"][name]["kernel"] + params["params"][name]["bias"]
  ).reshape(2, -1, 2, 4)
  heads = written_out(
    project("query", x), project("key", context), project("value", context),
    np.asarray(mask)[:, None, None],
  ).reshape(2, 4, 8)
  out = params["params"]["out"]
  np.testing.assert_allclose(
    apply(params, x, context, mask), heads @ out["kernel"] + out["bias"], atol=1e-5
  )


def test_masked_context_is_not_seen(cross):
  apply, params, x, context, mask = cross
  other = jnp.where(mask[..., None], context, 1e4)
  np.testing.assert_allclose(
    apply(params, x, other, mask), apply(params, x, context, mask), atol=1e-6
  )


def test_a_row_without_context_stays_finite(cross):
  apply, params, x, context, _ = cross
  out = apply(params, x, context, jnp.zeros((2, 5), bool))
  assert np.all(np.isfinite(out))


def test_zero_output_starts_at_zero():
  (x,) = draw((1, 4, 8))
  network = MultiHeadAttention(heads=2, zero_output=True)
  out = jax.jit(lambda: network.init_with_output(jax.random.key(0), x)[0])()
  assert np.all(np.asarray(out) == 0)
