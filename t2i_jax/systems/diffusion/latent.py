"""What diffusion systems in latents share: the frozen autoencoder around them.

Rombach et al. 2022, section 3.2 and, for the scale of the latents, appendix G.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.base import GUIDE, Array, Batch, Field
from t2i_jax.systems.capabilities import FirstStage, require
from t2i_jax.systems.diffusion.denoiser import DENOISER, Denoiser
from t2i_jax.systems.diffusion.sampling import Options
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables

FIRST_STAGE = "first_stage"
LATENTS = "latents"  # the collection of what is measured of them


@struct.dataclass
class LatentOptions(Options):
  """Sampling options, without the bounds that pictures have and latents have not."""

  clip: bool = struct.field(pytree_node=False, default=False)


@dataclasses.dataclass(frozen=True, eq=False)
class LatentDenoiser(Denoiser):
  """See the module's docstring.

  Attributes (beside those of `Denoiser`):
    latent_scale, latent_shift: of what is modelled, (z - shift) * scale; a scale of 0 takes both
      from the first stage, or, where it has none, from stored latents, or measures them on the
      first batch, so that latents have mean 0 and standard deviation 1 (appendix G).
    components: `first_stage`, and `guide` if there is one.
    cached_latent: what batches bring in place of pictures, where they do: the posterior's moments.
    latent_statistics: mean and standard deviation of stored latents.

  Class attributes:
    models_pixels: whether, without a first stage, pictures are modelled themselves.
  """

  Options = LatentOptions
  roles: ClassVar[tuple[str, ...]] = (FIRST_STAGE, GUIDE)
  models_pixels: ClassVar[bool] = False

  latent_scale: float = 0.0
  latent_shift: float = 0.0
  cached_latent: Field | None = None
  latent_statistics: tuple[float, float] | None = None

  def __post_init__(self):
    super().__post_init__()
    if self.first_stage is not None:
      require(self.first_stage, FirstStage, f"components.{FIRST_STAGE}")
    elif self.latent_scale or not self.models_pixels:
      pixels = f"; model.latent_scale={self.latent_scale} is of latents, and 0 with no first stage "
      raise UserError("a latent system models the latents of an autoencoder: set "
                      "components.first_stage=PATH of its export (configs/kl_autoencoder.py trains "
                      "one, python -m t2i_jax.convert makes one of a public file)"
                      f"{(pixels + 'models pixels') * self.models_pixels}")
    height, _, _ = self.shape
    if height % self.unit:
      what = "pixels" if self.first_stage is None else f"latents of side {height}"
      raise UserError(f"model.resolution={self.resolution} gives {what}, which does not divide by "
                      f"{self.unit} ({self.unit_is})")

  @property
  def unit(self) -> int:
    """What the sides of what is modelled must divide by."""
    return 1

  @property
  def unit_is(self) -> str:
    """What the `unit` comes from, for errors."""
    return ""

  @property
  def first_stage(self) -> Any:
    return self.components.get(FIRST_STAGE)

  @property
  def shape(self) -> tuple[int, int, int]:
    if self.first_stage is None:
      return super().shape
    return self.first_stage.latent_shape(self.resolution)

  def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
    unit = self.resolution // self.shape[0] * self.unit
    if height % unit or width % unit:
      raise UserError(f"pictures of {height} x {width} do not fit the network: use multiples of "
                      f"{unit}")
    factor = self.resolution // self.shape[0]
    return height // factor, width // factor, self.shape[-1]

  def batch_spec(self) -> dict[str, Field]:
    if self.cached_latent is not None:
      return {"latent": self.cached_latent, **self.text.batch_spec()}
    image = Field((self.resolution, self.resolution, 3), "uint8")
    return {"image": image, **self.text.batch_spec()}

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    variables = super().init(rng, batch, frozen)
    if self.first_stage is None:
      return variables
    scale, shift = self.latent_scale, self.latent_shift
    if not scale:
      scale, shift = self.first_stage.scale, self.first_stage.shift
    if not scale and self.latent_statistics is not None:
      shift, deviation = self.latent_statistics
      scale = 1.0 / deviation
    if not scale:
      latents = self._posterior(frozen, batch, fold_name(rng, LATENTS))
      shift, scale = jnp.mean(latents), 1.0 / jnp.std(latents)
    measured = {"scale": jnp.float32(scale), "shift": jnp.float32(shift)}
    return trees.merge(variables, {LATENTS: {DENOISER: measured}})

  def clean(self, variables: Variables, batch: Batch, rng: Array) -> Array:
    if self.first_stage is None:
      return super().clean(variables, batch, rng)
    latents = self._posterior(variables, batch, fold_name(rng, "posterior"))
    return self.scaled(variables, latents)

  def scaled(self, variables: Variables, latents: Array) -> Array:
    """Latents of the first stage as they are modelled, [B, h, w, c]."""
    measured = variables[LATENTS][DENOISER]
    return (latents - measured["shift"]) * measured["scale"]

  def encoded(self, variables: Variables, images: Array) -> Array:
    if self.first_stage is None:
      return images
    moments = self.first_stage.encode(trees.group(variables, FIRST_STAGE), images)
    return self.scaled(variables, jnp.split(moments.astype(jnp.float32), 2, axis=-1)[0])

  def kept(self, known: Array) -> Array:
    """A latent is known where all of its pixels are."""
    factor = self.resolution // self.shape[0]
    b, h, w, _ = known.shape
    cells = known.reshape(b, h // factor, factor, w // factor, factor, 1)
    return jnp.all(cells, axis=(2, 4)).astype(jnp.float32)

  def finish(self, variables: Variables, drawn: Array) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1] of latents that were drawn; a program of its own."""
    if self.first_stage is None:
      return jnp.clip(drawn, -1.0, 1.0)
    measured = variables[LATENTS][DENOISER]
    latents = drawn / measured["scale"] + measured["shift"]
    images = self.first_stage.decode(trees.group(variables, FIRST_STAGE), latents)
    return jnp.clip(images, -1.0, 1.0)

  def _posterior(self, variables: Variables, batch: Batch, rng: Array) -> Array:
    """A draw from the first stage's posterior, unscaled."""
    if "latent" in batch:
      moments = batch["latent"]
    else:
      images = normalize_images(batch["image"])
      moments = self.first_stage.encode(trees.group(variables, FIRST_STAGE), images)
    mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(rng, mean.shape)
