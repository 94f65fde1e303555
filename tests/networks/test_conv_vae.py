import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.conv_vae import SCALE_FLOOR, Decoder, Encoder, MomentHead, Prior

SMALL = {"channels": 4, "groups": 2}
DECODER = Decoder(side=2, multipliers=(1, 2), attention_levels=(0,), head_channels=4, **SMALL)
TINY = {"side": 2, "multipliers": (1,), "attention_levels": (), "blocks": 0, **SMALL}


def filled(shapes, seed=9):
  """Random variables of given shapes, none at its initial zero, which would hide
  what depends on what; drawing them so compiles nothing."""
  random = np.random.default_rng(seed)

  def draw(path, leaf):
    around = 1.0 if path[-1].key in ("scale", "var") else 0.0
    return jnp.asarray(around + 0.3 * random.uniform(-1, 1, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def test_moments_start_standard_normal():
  for moment in MomentHead(3).init_with_output(jax.random.key(0), jnp.ones((2, 5)))[0]:
    assert moment.shape == (2, 3) and not np.any(moment)
  for network, inputs in ((Encoder(3, **SMALL), [(2, 8, 8, 3), (2, 5)]), (Prior(3, 8), [(2, 5)])):
    arrays = [jnp.ones(shape) for shape in inputs]
    moments, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), *arrays)
    assert [m.shape for m in moments] == [(2, 3), (2, 3)]
    assert "moments" in variables["params"]["head"]


def test_log_variances_are_bounded():
  head = MomentHead(2)
  variables = {"params": {"moments": {"kernel": jnp.full((1, 4), 1e4), "bias": jnp.zeros(4)}}}
  _, log_variance = head.apply(variables, jnp.array([[1.0], [-1.0]]))
  np.testing.assert_allclose(log_variance, [[10, 10], [-10, -10]], atol=1e-4)


@pytest.fixture(scope="module")
def decode():
  """The decoder's means, of inputs by name."""
  given = inputs()
  variables = filled(jax.eval_shape(DECODER.init, jax.random.key(3), *given.values()))
  apply = jax.jit(lambda *args: DECODER.apply(variables, *args)[0])
  return lambda **changed: apply(*{**given, **changed}.values())


def inputs():
  normal = lambda key, *shape: jax.random.normal(jax.random.key(key), shape)  # noqa: E731
  return {
    "latent": normal(0, 2, 3),
    "text": normal(1, 2, 5),
    "context": normal(2, 2, 4, 6),
    "mask": jnp.arange(4) < jnp.array([[4], [2]]),
  }


@pytest.mark.parametrize("what", ["latent", "text", "context"])
def test_picture_depends_on(decode, what):
  before = decode()
  assert before.shape == (2, 8, 8, 3)
  after = decode(**{what: inputs()[what].at[0].add(1.0)})
  assert np.abs(after[0] - before[0]).max() > 1e-3
  np.testing.assert_allclose(after[1], before[1], atol=1e-5)


def test_masked_words_are_not_read(decode):
  after = decode(context=inputs()["context"].at[1, 2:].add(3.0))
  np.testing.assert_allclose(after, decode(), atol=1e-5)


def test_scale_is_given_or_learned():
  args = (jnp.ones((1, 3)), jnp.ones((1, 5)), None, None)
  fixed = Decoder(scale=0.1, **TINY)
  variables = filled(jax.eval_shape(fixed.init, jax.random.key(0), *args))
  assert "log_scale" not in variables["params"]
  np.testing.assert_allclose(fixed.apply(variables, *args)[1], np.log(0.1), rtol=1e-6)
  learned = Decoder(**TINY)
  variables = filled(jax.eval_shape(learned.init, jax.random.key(0), *args))
  for parameter, scale in ((0.0, 0.25 + SCALE_FLOOR), (-100.0, SCALE_FLOOR)):
    variables["params"]["log_scale"] = jnp.float32(parameter)
    np.testing.assert_allclose(np.exp(learned.apply(variables, *args)[1]), scale, rtol=1e-5)
