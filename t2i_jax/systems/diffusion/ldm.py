"""Diffusion in the latents of a frozen autoencoder.

Rombach et al. 2022 (latent diffusion, section 3.2; the scale of the latents, appendix G; text
through cross-attention, section 3.3), of which Stable Diffusion 1 and 2 are trained models.
"""

import dataclasses
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from t2i_jax.errors import UserError
from t2i_jax.networks.unet import UNet
from t2i_jax.systems import base
from t2i_jax.systems.base import GUIDE, Array, Batch, Conditioning, Field, Variables
from t2i_jax.systems.diffusion.denoiser import DENOISER, Denoiser
from t2i_jax.systems.diffusion.sampling import Options
from t2i_jax.systems.diffusion.unet_options import check_network, make_unet

FIRST_STAGE = "first_stage"
LATENTS = "latents"  # the collection of what is measured of them


@struct.dataclass
class LatentOptions(Options):
  """Sampling options, without the bounds that pictures have and latents have not."""

  clip: bool = struct.field(pytree_node=False, default=False)


@dataclasses.dataclass(frozen=True, eq=False)
class LDM(Denoiser):
  """See the module's docstring.

  Attributes (beside those of `Denoiser`):
    latent_scale, latent_shift: of what is modelled, (z - shift) * scale; a scale of 0 takes both
      from the first stage, or, where it has none, from stored latents, or measures them on the
      first batch, so that latents have mean 0 and standard deviation 1 (appendix G).
    channels ... remat: of the `UNet`.
    components: `first_stage`, and `guide` if there is one.
    cached_latent: what batches bring in place of pictures, where they do: the posterior's moments.
    latent_statistics: mean and standard deviation of stored latents.
  """

  Options = LatentOptions
  roles: ClassVar[tuple[str, ...]] = (FIRST_STAGE, GUIDE)

  latent_scale: float = 0.0
  latent_shift: float = 0.0
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
  cached_latent: Field | None = None
  latent_statistics: tuple[float, float] | None = None

  def __post_init__(self):
    super().__post_init__()
    check_network(self)
    if FIRST_STAGE not in self.components:
      raise UserError("a latent system models the latents of an autoencoder: set "
                      "components.first_stage=PATH of its export (configs/kl_autoencoder.py trains "
                      "one, python -m t2i_jax.convert makes one of a public file)")
    base.require(self.first_stage, base.FirstStage, f"components.{FIRST_STAGE}")
    coarsest = 2 ** (len(self.multipliers) - 1)
    height, _, _ = self.shape
    if height % coarsest:
      raise UserError(f"model.resolution={self.resolution} gives latents of side {height}, which "
                      f"does not divide by {coarsest} (2 for each level but the first)")

  @property
  def first_stage(self) -> Any:
    return self.components[FIRST_STAGE]

  @cached_property
  def network(self) -> UNet:
    return make_unet(self, self.shape[-1] * self.outputs)

  def init_denoiser(self, rng: Array, x: Array, given: Conditioning) -> Variables:
    return self.network.init(
      rng, x, jnp.zeros(len(x), jnp.int32), given.sequence, given.mask, self.vector(given)
    )

  @property
  def shape(self) -> tuple[int, int, int]:
    return self.first_stage.latent_shape(self.resolution)

  def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
    unit = self.resolution // self.shape[0] * 2 ** (len(self.multipliers) - 1)
    if height % unit or width % unit:
      raise UserError(f"pictures of {height} x {width} cannot be drawn: use multiples of {unit}")
    return (
      self.first_stage.latent_shape(height)[0], self.first_stage.latent_shape(width)[1],
      self.shape[-1],
    )

  def batch_spec(self) -> dict[str, Field]:
    if self.cached_latent is not None:
      return {"latent": self.cached_latent, **self.text.batch_spec()}
    image = Field((self.resolution, self.resolution, 3), "uint8")
    return {"image": image, **self.text.batch_spec()}

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = base.NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    variables = super().init(rng, batch, frozen)
    scale, shift = self.latent_scale, self.latent_shift
    if not scale:
      scale, shift = self.first_stage.scale, self.first_stage.shift
    if not scale and self.latent_statistics is not None:
      shift, deviation = self.latent_statistics
      scale = 1.0 / deviation
    if not scale:
      latents = self._posterior(frozen, batch, base.fold_name(rng, LATENTS))
      shift, scale = jnp.mean(latents), 1.0 / jnp.std(latents)
    measured = {"scale": jnp.float32(scale), "shift": jnp.float32(shift)}
    return base.merge(variables, {LATENTS: {DENOISER: measured}})

  def clean(self, variables: Variables, batch: Batch, rng: Array) -> Array:
    latents = self._posterior(variables, batch, base.fold_name(rng, "posterior"))
    return self.scaled(variables, latents)

  def scaled(self, variables: Variables, latents: Array) -> Array:
    """Latents of the first stage as they are modelled, [B, h, w, c]."""
    measured = variables[LATENTS][DENOISER]
    return (latents - measured["shift"]) * measured["scale"]

  def encoded(self, variables: Variables, images: Array) -> Array:
    moments = self.first_stage.encode(base.group(variables, FIRST_STAGE), images)
    return self.scaled(variables, jnp.split(moments.astype(jnp.float32), 2, axis=-1)[0])

  def kept(self, known: Array) -> Array:
    """A latent is known where all of its pixels are."""
    factor = self.resolution // self.shape[0]
    b, h, w, _ = known.shape
    cells = known.reshape(b, h // factor, factor, w // factor, factor, 1)
    return jnp.all(cells, axis=(2, 4)).astype(jnp.float32)

  def finish(self, variables: Variables, drawn: Array) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1] of latents that were drawn; a program of its own."""
    measured = variables[LATENTS][DENOISER]
    latents = drawn / measured["scale"] + measured["shift"]
    images = self.first_stage.decode(base.group(variables, FIRST_STAGE), latents)
    return jnp.clip(images, -1.0, 1.0)

  def _posterior(self, variables: Variables, batch: Batch, rng: Array) -> Array:
    """A draw from the first stage's posterior, unscaled."""
    if "latent" in batch:
      moments = batch["latent"]
    else:
      images = base.normalize_images(batch["image"])
      moments = self.first_stage.encode(base.group(variables, FIRST_STAGE), images)
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(rng, mean.shape)

  def output(
    self, variables: Variables, x: Array, t: Array, given: Conditioning, **kwargs: Any
  ) -> Array:
    return self.network.apply(
      base.group(variables, DENOISER), x, t, given.sequence, given.mask, self.vector(given),
      **kwargs,
    )

  def vector(self, given: Conditioning) -> Array | None:
    """What is added to the embedding of the time: nothing, of a text that is attended to."""
    return None
