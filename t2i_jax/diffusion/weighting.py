"""Which errors count: weights on the squared error of x_0, by signal-to-noise ratio.

Any loss in the literature is a weight on the same error: the squared error of
the noise is snr times that of x_0. A weight is therefore stated once here, and
holds for every parameterization. Those that were published for one process
hold for others at the same ratio: with r = alpha / sigma, the root of snr, v's
error is that of the process scaled to alpha^2 + sigma^2 = 1, rectified flow has
sigma = 1 / (1 + r), and Karras et al.'s sigma is 1 / r.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError, unknown

Array = jax.Array
Weighting = Callable[[Array], Array]


def epsilon(snr: Array) -> Array:
  """Plain error of the noise: the simple loss of Ho et al. 2020, equation 14."""
  return snr


def x0(snr: Array) -> Array:
  """Plain error of the picture."""
  return jnp.ones_like(snr)


def v(snr: Array) -> Array:
  """Plain error of v (Salimans and Ho 2022, section 4, "SNR + 1")."""
  return 1.0 + snr


def v_bounded(snr: Array, bound: float) -> Array:
  """That of v, not growing beyond a bound on the ratio.

  Without one, a network that predicts x_0 learns little else than to copy
  almost clean pictures.
  """
  return 1.0 + jnp.minimum(snr, bound)


def min_snr(snr: Array, bound: float) -> Array:
  """min(SNR, gamma) (Hang et al. 2023, section 3.4); their gamma is 5."""
  return jnp.minimum(snr, bound)


def p2(snr: Array, gamma: float) -> Array:
  """The simple loss, less of it where little noise is left (Choi et al. 2022, section 3.3; k 1)."""
  return snr / (1.0 + snr) ** gamma


def edm(snr: Array, sigma_data: float) -> Array:
  """Plain error of the "edm" output: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.

  Karras et al. 2022, table 1.
  """
  return snr + 1.0 / sigma_data**2


def flow(snr: Array) -> Array:
  """Plain error of noise - x_0, rectified flow's velocity: 1 / sigma^2."""
  return (1.0 + jnp.sqrt(snr)) ** 2


def cosmap(snr: Array) -> Array:
  """The flow's error at times as frequent as the cosine schedule has them.

  Esser et al. 2024, section 3.1: 2 / (pi - 2 pi t + 2 pi t^2) times it.
  """
  root = jnp.sqrt(snr)
  return 2.0 / math.pi * (1.0 + root) ** 4 / (1.0 + snr)


# By name; what an option is called there is the one that `make_weighting` has.
WEIGHTINGS: dict[str, Callable[..., Array]] = {
  "epsilon": epsilon, "simple": epsilon, "x0": x0, "v": v, "v_bounded": v_bounded,
  "min_snr": min_snr, "p2": p2, "edm": edm, "flow": flow,
  # 1 / sigma^2 on x_0, by the name that it has in public trainers of rectified flow.
  "sigma_sqrt": flow,
  "cosmap": cosmap,
}
OPTIONS = {
  "v_bounded": ("bound",), "min_snr": ("bound",), "p2": ("gamma",), "edm": ("sigma_data",),
}


def make_weighting(
  name: str, bound: float = 5.0, *, gamma: float = 1.0, sigma_data: float = 0.5
) -> Weighting:
  """The weighting of a name: snr [B] -> weight [B].

  Args:
    name: key of `WEIGHTINGS`.
    bound: on the ratio, for those that have one.
    gamma: of "p2"; Choi et al. use 0.5 and 1.
    sigma_data: of "edm".

  Raises:
    UserError: for another name, or an option that is not positive, whichever weighting is named.
  """
  if name not in WEIGHTINGS:
    raise unknown("diffusion weighting", name, WEIGHTINGS)
  if bound <= 0:
    raise UserError(f"weighting bound {bound} is not positive; Hang et al. 2023 use 5")
  if gamma <= 0:
    raise UserError(f"weighting gamma {gamma} is not positive; Choi et al. 2022 use 1")
  if sigma_data <= 0:
    raise UserError(f"sigma_data={sigma_data} is not positive; Karras et al. 2022 use 0.5")
  options = {"bound": bound, "gamma": gamma, "sigma_data": sigma_data}
  return partial(WEIGHTINGS[name], **{key: options[key] for key in OPTIONS.get(name, ())})
