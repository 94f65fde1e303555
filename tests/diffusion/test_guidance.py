import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t2i_jax.diffusion import guidance
from t2i_jax.diffusion.parameterization import (
  PARAMETERIZATIONS,
  Prediction,
  make_parameterization,
  noise_of,
)

CONDITIONAL, UNCONDITIONAL = jnp.asarray(
  np.random.default_rng(0).normal(size=(2, 3, 4, 4, 3)), jnp.float32
)


def test_scale_one_is_the_condition_and_zero_is_none():
  one = guidance.classifier_free(CONDITIONAL, UNCONDITIONAL, 1.0)
  np.testing.assert_array_equal(one, CONDITIONAL)
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


@pytest.mark.parametrize("scale", [1.0, jnp.ones(3)], ids=["scalar", "rows"])
def test_scale_one_is_no_guidance_bit_for_bit(scale):
  def guided(c, u, scale):
    free = guidance.classifier_free(c, u, scale)
    within = guidance.scale_within(scale, 0.5, 0.5, 0.1, 3.0)
    return {
      "free": free, "composed": guidance.composed([c], u, [scale]),
      "rescaled": guidance.rescaled(free, c, 0.7),
      "interval": guidance.classifier_free(c, u, within),
      "projected": guidance.projected(c, u, scale, jnp.ones_like(c), threshold=2.0)[0],
    }

  for run in (guided, jax.jit(guided)):
    for name, x in run(CONDITIONAL, UNCONDITIONAL, scale).items():
      np.testing.assert_array_equal(x, CONDITIONAL, err_msg=name)


def test_conditions_add_up():
  other = jnp.asarray(np.random.default_rng(2).normal(size=CONDITIONAL.shape), jnp.float32)
  given = guidance.composed([CONDITIONAL, other], UNCONDITIONAL, [3.0, jnp.array([0.0, 1.0, -2.0])])
  weights = np.array([0.0, 1.0, -2.0])[:, None, None, None]
  expected = 3 * CONDITIONAL - 2 * UNCONDITIONAL + weights * (other - UNCONDITIONAL)
  np.testing.assert_allclose(given, expected, atol=1e-5)


def test_the_interval_is_in_noise_to_signal_ratio():
  # Kynkaanniemi et al. 2024: above `low`, up to `high`.
  sigma = jnp.array([0.1, 0.28, 0.3, 5.42, 6.0])
  scale = guidance.scale_within(4.0, jnp.ones(5), sigma, 0.28, 5.42)
  assert scale.tolist() == [1, 1, 4, 4, 1]
  # Pure noise is within no bounded interval, and within one that has no upper bound.
  assert guidance.scale_within(4.0, 0.0, 1.0, 0.28, 5.42) == 1.0
  assert guidance.scale_within(4.0, 0.0, 1.0, 0.28, jnp.inf) == 4.0
  assert guidance.scale_within(4.0, 1.0, 0.01, 0.0, jnp.inf) == 4.0


def test_rescaling_gives_each_picture_its_deviation_back():
  guided = guidance.classifier_free(CONDITIONAL, UNCONDITIONAL, 7.5)
  whole = guidance.rescaled(guided, CONDITIONAL, 1.0)
  np.testing.assert_allclose(np.std(whole, (1, 2, 3)), np.std(CONDITIONAL, (1, 2, 3)), rtol=1e-5)
  np.testing.assert_array_equal(guidance.rescaled(guided, CONDITIONAL, 0.0), guided)
  # Lin et al. 2024, equations 15 and 16: a mean of the two.
  np.testing.assert_allclose(
    guidance.rescaled(guided, CONDITIONAL, 0.7), 0.7 * whole + 0.3 * guided, rtol=1e-5
  )


def test_projected_guidance_leaves_out_what_lies_along_the_prediction():
  zeros = jnp.zeros_like(CONDITIONAL)
  guided, average = guidance.projected(CONDITIONAL, UNCONDITIONAL, 4.0, zeros)
  update = np.asarray(guided - CONDITIONAL) / 3
  difference = np.asarray(CONDITIONAL - UNCONDITIONAL)
  np.testing.assert_allclose(average, difference)
  along = np.sum(update * CONDITIONAL, axis=(1, 2, 3))
  np.testing.assert_allclose(along, 0, atol=1e-4)
  # What is left of the difference is a multiple of the prediction.
  rest = difference - update
  ratio = np.sum(rest * CONDITIONAL, (1, 2, 3)) / np.sum(CONDITIONAL**2, (1, 2, 3))
  np.testing.assert_allclose(rest, ratio[:, None, None, None] * CONDITIONAL, atol=1e-5)
  # With all of it, it is classifier-free guidance.
  plain, _ = guidance.projected(CONDITIONAL, UNCONDITIONAL, 4.0, zeros, parallel=1.0)
  expected = guidance.classifier_free(CONDITIONAL, UNCONDITIONAL, 4.0)
  np.testing.assert_allclose(plain, expected, atol=1e-5)


def test_projected_guidance_bounds_and_remembers_the_difference():
  before = jnp.asarray(np.random.default_rng(3).normal(size=CONDITIONAL.shape), jnp.float32)
  given = CONDITIONAL, UNCONDITIONAL, 2.0, before
  guided, average = guidance.projected(*given, momentum=-0.5, threshold=0.1, parallel=1.0)
  np.testing.assert_allclose(average, CONDITIONAL - UNCONDITIONAL - 0.5 * before, rtol=1e-5)
  update = np.asarray(guided - CONDITIONAL)
  np.testing.assert_allclose(np.sqrt(np.sum(update**2, (1, 2, 3))), 0.1, rtol=1e-4)
  cosine = np.sum(update * average, (1, 2, 3)) / 0.1 / np.sqrt(np.sum(average**2, (1, 2, 3)))
  np.testing.assert_allclose(cosine, 1.0, rtol=1e-3)
  # Shorter ones stay.
  far, _ = guidance.projected(*given, threshold=100.0, parallel=1.0)
  np.testing.assert_allclose(far, CONDITIONAL + average, atol=1e-5)


def test_a_gradient_moves_the_prediction_along_the_line():
  # Dhariwal and Nichol 2021, algorithm 2: noise - sigma gradient, at the same x_t.
  x_t, alpha, sigma = CONDITIONAL, jnp.float32(0.6), jnp.float32(0.8)
  prediction = Prediction(UNCONDITIONAL, noise_of(x_t, UNCONDITIONAL, alpha, sigma))
  gradient = jnp.ones_like(x_t)
  moved = guidance.shifted_noise(prediction, gradient, alpha, sigma)
  np.testing.assert_allclose(moved.noise, prediction.noise - 0.8, atol=1e-6)
  np.testing.assert_allclose(alpha * moved.x_0 + sigma * moved.noise, x_t, atol=1e-5)
  blind = guidance.shifted_noise(prediction, gradient, jnp.float32(0.0), jnp.float32(1.0))
  jax.tree.map(np.testing.assert_array_equal, blind, prediction)


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
