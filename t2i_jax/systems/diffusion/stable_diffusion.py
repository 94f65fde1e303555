"""Stable Diffusion 1, 2 and XL: latent diffusion on frozen CLIP text encoders.

Rombach et al. 2022 (Stable Diffusion 1 and 2 are its released models); Podell et al. 2023 (SDXL:
section 2.1, two text encoders; 2.2, conditioning on the pictures' sizes and crops).
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import struct

from t2i_jax.networks.layers.embeddings import timestep_embedding
from t2i_jax.systems.base import Array, Batch, Conditioning, Field
from t2i_jax.systems.diffusion.latent import LatentOptions
from t2i_jax.systems.diffusion.ldm import LDM
from t2i_jax.systems.trees import Variables

SIZE_WIDTH = 256  # of the embedding of each of six numbers, Podell et al. 2023, section 2.2


@struct.dataclass
class StableDiffusionOptions(LatentOptions):
  """Sampling options with the guidance at which versions 1 and 2 are mostly drawn from."""

  guidance: float = 7.5


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion(LDM):
  """Versions 1 and 2: `LDM` with the process that they were trained with.

  Their text is that of frozen encoders: CLIP L's last layer with the final norm (1), OpenCLIP H's
  last but one with it (2); `text.null` is "empty", and padding is attended to.
  """

  Options = StableDiffusionOptions

  schedule: str = "scaled_linear"


@struct.dataclass
class SDXLOptions(LatentOptions):
  """Sampling options of SDXL, beside the common ones.

  Attributes:
    original_height, original_width: of the picture that is asked for to have been made from, in
      pixels; 0 for those that are drawn. Small ones give blurred pictures.
    crop_top, crop_left: pixels that were cut off; 0 gives centred subjects.
  """

  guidance: float = 5.0
  original_height: int = 0
  original_width: int = 0
  crop_top: int = 0
  crop_left: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class SDXL(StableDiffusion):
  """Version XL: two text encoders, and the pictures' sizes and crops.

  `text.encoders` is ("text_encoder+text_encoder_2",), whose features, of the layers before the
  last and without a final norm, are put side by side; `text.pooled` is ("text_encoder_2",), with
  its projection; `text.null` is "zeros". Batches bring `size` (of the original picture) and `crop`
  (what was cut off at the top and left); what the network is to fill is the shape of the batch's
  pictures (section 2.3: of their bucket).
  """

  Options = SDXLOptions

  multipliers: tuple[int, ...] = (1, 2, 4)
  attention_levels: tuple[int, ...] = (1, 2)
  depths: tuple[int, ...] = (0, 2, 10)
  middle_depth: int = 10
  heads: int = 0
  pooled_mlp: bool = True

  def batch_spec(self) -> dict[str, Field]:
    return {**super().batch_spec(), "size": Field((2,), "int32"), "crop": Field((2,), "int32")}

  def given(
    self, variables: Variables, batch: Batch, rng: Array | None = None
  ) -> Conditioning:
    given = super().given(variables, batch, rng)
    sides = (self.resolution, self.resolution)  # of what latents were stored of
    if "image" in batch:
      sides = batch["image"].shape[1:3]
    target = jnp.broadcast_to(jnp.asarray(sides, jnp.int32), batch["size"].shape)
    sizes = jnp.concatenate([batch["size"], batch["crop"], target], axis=-1)
    return given.replace(extra={**given.extra, "sizes": sizes})

  def prepared(self, conditioning: Conditioning, options: Any) -> Conditioning:
    height, width = options.height or self.resolution, options.width or self.resolution
    numbers = [
      jnp.where(options.original_height, options.original_height, height),
      jnp.where(options.original_width, options.original_width, width),
      options.crop_top, options.crop_left, height, width,
    ]  # fmt: skip
    rows = len(conditioning.sequence)
    sizes = jnp.broadcast_to(jnp.stack([jnp.asarray(n, jnp.int32) for n in numbers]), (rows, 6))

    def with_sizes(given: Conditioning) -> Conditioning:
      return given.replace(extra={**given.extra, "sizes": sizes})

    return with_sizes(conditioning).replace(null=with_sizes(conditioning.null))

  def vector(self, given: Conditioning) -> Array:
    """The pooled text and the six numbers' embeddings, [B, P + 1536]."""
    sizes = given.extra["sizes"]
    embedded = timestep_embedding(sizes.reshape(-1), SIZE_WIDTH).reshape(len(sizes), -1)
    return jnp.concatenate([given.pooled, embedded.astype(given.pooled.dtype)], axis=-1)
