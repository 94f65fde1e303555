"""Which errors count: weights on the squared error of x_0, by signal-to-noise ratio.

Any loss in the literature is a weight on the same error: the squared error of
the noise is snr times, that of v is (1 + snr) times that of x_0. A weight is
therefore stated once here, and holds for every parameterization.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from t2i_jax.errors import unknown

Array = jax.Array
Weighting = Callable[[Array], Array]

WEIGHTINGS: dict[str, Weighting] = {
  # The simple loss of Ho et al. 2020, equation 14: plain error of the noise.
  "epsilon": lambda snr: snr,
  "x0": lambda snr: jnp.ones_like(snr),
  # Salimans and Ho 2022, section 4, "SNR + 1": plain error of v.
  "v": lambda snr: 1.0 + snr,
  # The same up to the ratio at which Hang et al. 2023 stop, gamma = 5: without the bound, a
  # network that predicts x_0 learns little else than to copy almost clean pictures.
  "v_bounded": lambda snr: 1.0 + jnp.minimum(snr, 5.0),
  # Hang et al. 2023, min(SNR, gamma) with their gamma = 5.
  "min_snr": lambda snr: jnp.minimum(snr, 5.0),
}


def make_weighting(name: str) -> Weighting:
  """The weighting of a name: snr [B] -> weight [B]; UserError for another."""
  if name not in WEIGHTINGS:
    raise unknown("diffusion weighting", name, WEIGHTINGS)
  return WEIGHTINGS[name]
