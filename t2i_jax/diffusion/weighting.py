"""Which errors count: weights on the squared error of x_0, by signal-to-noise ratio.

Any loss in the literature is a weight on the same error: the squared error of
the noise is snr times, that of v is (1 + snr) times that of x_0. A weight is
therefore stated once here, and holds for every parameterization.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError, unknown

Array = jax.Array
Weighting = Callable[[Array], Array]

# (snr, bound) -> weight.
WEIGHTINGS: dict[str, Callable[[Array, float], Array]] = {
  # The simple loss of Ho et al. 2020, equation 14: plain error of the noise.
  "epsilon": lambda snr, bound: snr,
  "x0": lambda snr, bound: jnp.ones_like(snr),
  # Salimans and Ho 2022, section 4, "SNR + 1": plain error of v.
  "v": lambda snr, bound: 1.0 + snr,
  # The same, not growing beyond a bound on the ratio: without one, a network that predicts x_0
  # learns little else than to copy almost clean pictures.
  "v_bounded": lambda snr, bound: 1.0 + jnp.minimum(snr, bound),
  # Hang et al. 2023, min(SNR, gamma); their gamma is 5.
  "min_snr": jnp.minimum,
}


def make_weighting(name: str, bound: float = 5.0) -> Weighting:
  """The weighting of a name: snr [B] -> weight [B].

  Args:
    name: key of `WEIGHTINGS`.
    bound: on the ratio, for those that have one.

  Raises:
    UserError: for another name, or a bound that is not positive.
  """
  if name not in WEIGHTINGS:
    raise unknown("diffusion weighting", name, WEIGHTINGS)
  if bound <= 0:
    raise UserError(f"weighting bound {bound} is not positive; Hang et al. 2023 use 5")
  return lambda snr: WEIGHTINGS[name](snr, bound)
