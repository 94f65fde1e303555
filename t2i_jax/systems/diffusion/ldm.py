"""Diffusion in the latents of a frozen autoencoder.

Rombach et al. 2022 (latent diffusion, section 3.2; the scale of the latents, appendix G; text
through cross-attention, section 3.3), of which Stable Diffusion 1 and 2 are trained models.
"""

import dataclasses
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from t2i_jax.networks.unet import UNet
from t2i_jax.systems import trees
from t2i_jax.systems.base import Array, Conditioning
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.systems.diffusion.latent import FIRST_STAGE as FIRST_STAGE
from t2i_jax.systems.diffusion.latent import LATENTS as LATENTS
from t2i_jax.systems.diffusion.latent import LatentDenoiser
from t2i_jax.systems.diffusion.unet_options import check_network, make_unet
from t2i_jax.systems.trees import Variables


@dataclasses.dataclass(frozen=True, eq=False)
class LDM(LatentDenoiser):
  """See the module's docstring.

  Attributes (beside those of `LatentDenoiser`):
    channels ... scan: of the `UNet`.
  """

  channels: int = 320
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  blocks: int = 2
  attention: str = "transformer"
  attention_levels: tuple[int, ...] = (0, 1, 2)
  depths: tuple[int, ...] = ()
  middle_depth: int = 1
  head_channels: int = 64
  heads: int = 8
  groups: int = 32
  epsilon: float = 1e-5
  coordinates: int = 0
  positions: bool = True
  mlp_ratio: float = 0.0
  scale_shift: bool = False
  dropout: float = 0.0
  block_resample: bool = False
  symmetric: bool = True
  pooled_mlp: bool = False
  remat: bool = False
  scan: bool = False

  def __post_init__(self):
    check_network(self)
    super().__post_init__()

  @property
  def unit(self) -> int:
    return 2 ** (len(self.multipliers) - 1)

  @property
  def unit_is(self) -> str:
    return "2 for each level but the first"

  @cached_property
  def network(self) -> UNet:
    return make_unet(self, self.shape[-1] * self.outputs)

  def init_denoiser(self, rng: Array, x: Array, given: Conditioning) -> Variables:
    return self.network.init(
      rng, x, jnp.zeros(len(x), jnp.int32), given.sequence, given.mask, self.vector(given)
    )

  def output(
    self, variables: Variables, x: Array, t: Array, given: Conditioning, **kwargs: Any
  ) -> Array:
    return self.network.apply(
      trees.group(variables, DENOISER), x, t, given.sequence, given.mask, self.vector(given),
      **kwargs,
    )

  def vector(self, given: Conditioning) -> Array | None:
    """What is added to the embedding of the time: nothing, of a text that is attended to."""
    return None
