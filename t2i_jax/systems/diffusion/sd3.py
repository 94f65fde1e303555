"""Stable Diffusion 3 and 3.5: rectified flow in latents by a multimodal transformer.

Esser et al. 2024 (Scaling Rectified Flow Transformers for High-Resolution Image Synthesis): section
2 (rectified flow), 3.1 (times by a logit-normal), 4 (the network, and three text encoders), 5.3.2
(times shifted by the resolution; normed queries and keys), 5.3 (each encoder left out by itself).
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from flax import struct

from t2i_jax.errors import UserError
from t2i_jax.networks.mmdit import MMDiT
from t2i_jax.systems.base import Array, Conditioning
from t2i_jax.systems.checks import check_positive
from t2i_jax.systems.diffusion.latent import LatentOptions
from t2i_jax.systems.diffusion.transformer import TransformerDenoiser


@struct.dataclass
class SD3Options(LatentOptions):
  """Sampling options with those at which the released models are mostly drawn from."""

  solver: str = struct.field(pytree_node=False, default="flow_euler")
  steps: int = struct.field(pytree_node=False, default=28)
  guidance: float = 7.0


@dataclasses.dataclass(frozen=True, eq=False)
class SD3(TransformerDenoiser):
  """See the module's docstring.

  `text.encoders` is ("text_encoder+text_encoder_2", "text_encoder_3"): the features of CLIP L and
  of OpenCLIP bigG side by side, filled up with zeros to the width of T5's, which come behind them;
  `text.pooled` is ("text_encoder", "text_encoder_2"); `text.drop_each` is 0.464.

  Attributes (beside those of `TransformerDenoiser`):
    norm, dual, grid, largest: of `networks.mmdit.MMDiT`.
    blank: tokens of zeros behind those of the text, in the place of an encoder that is left out, as
      the released models are drawn from without T5.
    context_width: to which the text's features are filled up with zeros; 0 for the widest's.
    shift: of `Denoiser`; 3 at 1024 px. It moves the times that are trained and those of sampling.
  """

  Options = SD3Options
  Network: ClassVar = MMDiT

  schedule: str = "flow"
  prediction: str = "flow"
  weighting: str = "flow"
  density: str = "logit_normal"
  width: int = 1536
  depth: int = 24
  heads: int = 24
  norm: bool = False
  dual: int = 0
  grid: int = 64
  largest: int = 192
  blank: int = 0
  context_width: int = 0

  def __post_init__(self):
    check_positive("model", self, "grid", "largest")
    if not self.text.names:
      raise UserError("text.encoder=none: this network is of a picture and a text; choose one")
    if self.blank < 0 or self.context_width < 0:
      raise UserError(f"model.blank={self.blank} and model.context_width={self.context_width} are "
                      "numbers of 0 or more")
    if not 0 <= self.dual < self.depth:
      raise UserError(f"model.dual={self.dual} is not between 0 and model.depth={self.depth} - 1: "
                      "the last block is never one of them")
    super().__post_init__()
    self._check_side(self.shape[0], f"model.resolution={self.resolution}")

  def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
    shape = super().shape_of(height, width)
    self._check_side(max(shape[:2]), f"a picture of {height} x {width}")
    return shape

  def _check_side(self, side: int, what: str) -> None:
    tokens = side // self.patch
    if tokens > self.largest:
      raise UserError(f"{what} is {tokens} tokens a side, and there are places for "
                      f"model.largest={self.largest}; use less")

  def arguments(self, given: Conditioning) -> dict[str, Array | None]:
    context, mask = given.sequence, given.mask
    missing = self.context_width - context.shape[-1] if self.context_width else 0
    if missing < 0:
      raise UserError(f"model.context_width={self.context_width} is less than the text's "
                      f"{context.shape[-1]}; set it to 0, or to as many as the network reads")
    context = jnp.pad(context, ((0, 0), (0, self.blank), (0, missing)))
    if mask is not None:
      mask = jnp.pad(mask, ((0, 0), (0, self.blank)), constant_values=True)
    return {"context": context, "mask": mask, "pooled": given.pooled}
