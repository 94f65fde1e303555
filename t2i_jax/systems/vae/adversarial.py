"""What an autoencoder's discriminator is trained by, and how much it weighs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
# Of the quotient of two gradients' lengths (the code that Esser et al. 2021 published).
_OFFSET, _LARGEST = 1e-4, 1e4


class Game(NamedTuple):
  """The two sides of an adversarial loss.

  Attributes:
    discriminate: (real logits, fake logits) -> scalar, the discriminator's loss.
    fool: fake logits -> scalar, the generator's.
  """

  discriminate: Callable[[Array, Array], Array]
  fool: Callable[[Array], Array]


def _hinge(real: Array, fake: Array) -> Array:
  return 0.5 * (jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake)))


def _cross_entropy(real: Array, fake: Array) -> Array:
  return 0.5 * (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake)))


GAMES = {
  # Lim and Ye 2017; Miyato et al. 2018, equations 16 and 17.
  "hinge": Game(_hinge, lambda fake: -jnp.mean(fake)),
  # Goodfellow et al. 2014, section 3, with the generator's loss that does not saturate.
  "vanilla": Game(_cross_entropy, lambda fake: jnp.mean(jax.nn.softplus(-fake))),
}


def adaptive_weight(reconstruction: Any, adversarial: Any) -> Array:
  """Esser et al. 2021, equation 7: how the adversarial loss becomes as strong as the other.

  Args:
    reconstruction, adversarial: gradients of the two losses at the decoder's last layer.
  """
  ratio = optax.tree.norm(reconstruction) / (optax.tree.norm(adversarial) + _OFFSET)
  return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, _LARGEST))
