import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t2i_jax.diffusion import guidance
from t2i_jax.diffusion.parameterization import PARAMETERIZATIONS, make_parameterization

CONDITIONAL, UNCONDITIONAL = jnp.asarray(
  np.random.default_rng(0).normal(size=(2, 3, 4, 4, 3)), jnp.float32
)


def test_scale_one_is_the_condition_and_zero_is_none():
  one = guidance.classifier_free(CONDITIONAL, UNCONDITIONAL, 1.0)
  np.testing.assert_allclose(one, CONDITIONAL, atol=1e-6)
  zero = guidance.classifier_free(CONDITIONAL, UNCONDITIONAL, 0.0)
  np.testing.assert_array_equal(zero, UNCONDITIONAL)


def test_scale_is_one_more_than_the_papers():
  # Ho and Salimans 2022, equation 6, at w = 2.
  expected = 3.0 * CONDITIONAL - 2.0 * UNCONDITIONAL
  given = guidance.classifier_free(CONDITIONAL, UNCONDITIONAL, 3.0)
  np.testing.assert_allclose(given, expected, atol=1e-5)


def test_each_picture_may_have_its_own_scale():
  scales = jnp.array([0.0, 1.0, 4.0])
  given = guidance.classifier_free(CONDITIONAL, UNCONDITIONAL, scales)
  for i, scale in enumerate(scales):
    one = guidance.classifier_free(CONDITIONAL[i], UNCONDITIONAL[i], scale)
    np.testing.assert_allclose(given[i], one, atol=1e-6)


def test_bfloat16_outputs_stay_bfloat16():
  halves = CONDITIONAL.astype(jnp.bfloat16), UNCONDITIONAL.astype(jnp.bfloat16)
  assert guidance.classifier_free(*halves, jnp.float32(2.0)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", sorted(PARAMETERIZATIONS))
def test_guiding_any_output_guides_the_noise(name):
  kind, alpha, sigma = make_parameterization(name), jnp.float32(0.6), jnp.float32(0.8)
  x_t = np.random.default_rng(1).normal(size=CONDITIONAL.shape).astype("f4")
  noise = lambda output: kind.predict(x_t, output, alpha, sigma).noise  # noqa: E731
  outputs = CONDITIONAL, UNCONDITIONAL
  np.testing.assert_allclose(
    noise(guidance.classifier_free(*outputs, 3.0)),
    guidance.classifier_free(*map(noise, outputs), 3.0),
    atol=1e-4,
  )


def test_layouts_agree():
  doubled = guidance.interleave(CONDITIONAL, UNCONDITIONAL)
  assert doubled.shape == (6, 4, 4, 3)
  np.testing.assert_array_equal(doubled[2], CONDITIONAL[1])
  np.testing.assert_array_equal(doubled[3], UNCONDITIONAL[1])
  for given, back in zip(
    (CONDITIONAL, UNCONDITIONAL), guidance.separate(doubled), strict=True
  ):
    np.testing.assert_array_equal(given, back)
  np.testing.assert_array_equal(
    guidance.both(CONDITIONAL), guidance.interleave(CONDITIONAL, CONDITIONAL)
  )


@pytest.mark.parametrize("layout", ["interleave", "both"])
def test_doubling_a_sharded_batch_moves_nothing_between_devices(layout):
  devices = np.array(jax.devices())
  rows = NamedSharding(Mesh(devices, ("data",)), PartitionSpec("data"))
  x = jax.device_put(jnp.arange(2.0 * len(devices))[:, None], rows)
  double = (lambda x: guidance.interleave(x, -x)) if layout == "interleave" else guidance.both
  program = jax.jit(double, in_shardings=rows, out_shardings=rows).lower(x).compile().as_text()
  for collective in ("all-gather", "all-to-all", "collective-permute", "all-reduce"):
    assert collective not in program
