import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.systems.vae.adversarial import GAMES, adaptive_weight


def test_hinge():
  game = GAMES["hinge"]
  real, fake = jnp.array([[2.0, 0.5]]), jnp.array([[-3.0, 1.0]])
  # 0.5 (mean(0, 0.5) + mean(0, 2)).
  np.testing.assert_allclose(game.discriminate(real, fake), 0.5 * (0.25 + 1.0))
  np.testing.assert_allclose(game.fool(fake), 1.0)


def test_vanilla_does_not_saturate():
  game = GAMES["vanilla"]
  real, fake = jnp.array([1.0, -1.0]), jnp.array([0.0, 3.0])
  p = lambda x: 1 / (1 + np.exp(-np.asarray(x, np.float64)))  # noqa: E731
  expected = -0.5 * (np.mean(np.log(p(real))) + np.mean(np.log(1 - p(fake))))
  np.testing.assert_allclose(game.discriminate(real, fake), expected, rtol=1e-6)
  np.testing.assert_allclose(game.fool(fake), -np.mean(np.log(p(fake))), rtol=1e-6)
  # Where the discriminator is sure, the slope is one and not zero.
  np.testing.assert_allclose(jax.grad(game.fool)(jnp.array([-20.0])), [-1.0], atol=1e-6)


def test_adaptive_weight_is_the_quotient_of_lengths_within_bounds():
  weight = adaptive_weight(jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0]))
  np.testing.assert_allclose(weight, 5.0 / (2.0 + 1e-4), rtol=1e-6)
  assert adaptive_weight(jnp.ones(4) * 1e6, jnp.zeros(4)) == 1e4
  assert adaptive_weight(jnp.zeros(4), jnp.ones(4)) == 0
  assert np.all(jax.grad(lambda x: adaptive_weight(x, jnp.ones(2)))(jnp.ones(2)) == 0)
