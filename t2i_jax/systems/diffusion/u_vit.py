"""U-ViT: a transformer of all tokens with long skips, on a text or on labels.

Bao et al. 2023 (All are Worth Words: A ViT Backbone for Diffusion Models), in latents (sections 5.1
and 5.3) or in pixels.
"""

import dataclasses
from functools import cached_property
from typing import Any, ClassVar

import jax.numpy as jnp

from t2i_jax.diffusion.process import DiscreteProcess
from t2i_jax.errors import UserError
from t2i_jax.networks.u_vit import UViT as Network
from t2i_jax.systems import base
from t2i_jax.systems.base import Array, Batch, Conditioning, Field, Variables
from t2i_jax.systems.diffusion import labels
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.systems.diffusion.latent import LatentDenoiser
from t2i_jax.systems.diffusion.transformer_options import check_transformer, make_transformer


@dataclasses.dataclass(frozen=True, eq=False)
class UViT(LatentDenoiser):
  """See the module's docstring.

  Every token of the text is one of the network's, padding too where the text encoder lets it be
  seen, as CLIP's did in the published models; so captions have one length.

  Attributes (beside those of `LatentDenoiser`):
    patch, width, depth, heads, mlp_ratio, convolution, remat, scan: of `networks.u_vit.UViT`.
    classes, label_drop: labels; see `labels`.
  """

  models_pixels: ClassVar[bool] = True

  schedule: str = "scaled_linear"
  patch: int = 2
  width: int = 512
  depth: int = 12
  heads: int = 8
  mlp_ratio: float = 4.0
  convolution: bool = True
  classes: tuple[tuple[str, int], ...] = ()
  label_drop: float = 0.0
  remat: str = "none"
  scan: bool = True

  def __post_init__(self):
    check_transformer(self)
    if self.depth % 2:
      raise UserError(f"model.depth={self.depth} is odd, and half of the blocks skip to the other "
                      "half; the one between them is not counted")
    super().__post_init__()
    labels.check_labels(self)

  @property
  def unit(self) -> int:
    return self.patch

  @property
  def unit_is(self) -> str:
    return "model.patch"

  def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
    if (height, width) != (self.resolution, self.resolution):
      raise UserError("U-ViT has learned the place of each token, so it takes pictures of "
                      f"model.resolution={self.resolution} alone, not of {height} x {width}")
    return self.shape

  @property
  def labels(self) -> tuple[tuple[str, int], ...]:
    return self.classes or super().labels

  @cached_property
  def network(self) -> Network:
    return make_transformer(
      Network, self, out_channels=self.shape[-1] * self.outputs,
      classes=labels.rows_of(self.classes),
    )

  def batch_spec(self) -> dict[str, Field]:
    return {**super().batch_spec(), **labels.label_spec(self.classes)}

  def given(
    self, variables: Variables, batch: Batch, rng: Array | None = None
  ) -> Conditioning:
    return labels.trained(self, super().given(variables, batch, rng), batch, rng)

  def condition(self, variables: Variables, batch: Batch) -> Conditioning:
    return labels.asked_for(self, super().condition(variables, batch), batch)

  def init_denoiser(self, rng: Array, x: Array, given: Conditioning) -> Variables:
    return self.network.init(rng, x, jnp.zeros(len(x)), **_arguments(given))

  def output(
    self, variables: Variables, x: Array, t: Array, given: Conditioning, **kwargs: Any
  ) -> Array:
    if isinstance(self.process, DiscreteProcess):
      # The published models count from 1, which is the least noise, to 1000.
      t = t + 1
    own = base.group(variables, DENOISER)
    return self.network.apply(own, x, t, **_arguments(given), **kwargs)


def _arguments(given: Conditioning) -> dict[str, Array | None]:
  """What the network reads of the conditioning."""
  return {
    "context": given.sequence, "mask": given.mask, "label": given.extra.get(labels.LABEL),
  }  # fmt: skip
