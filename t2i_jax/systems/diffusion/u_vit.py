"""U-ViT: a transformer of all tokens with long skips, on a text or on labels.

Bao et al. 2023 (All are Worth Words: A ViT Backbone for Diffusion Models), in latents (sections 5.1
and 5.3) or in pixels.
"""

import dataclasses
from typing import Any, ClassVar

from t2i_jax.diffusion.process import DiscreteProcess
from t2i_jax.errors import UserError
from t2i_jax.networks import u_vit
from t2i_jax.systems.base import Array, Conditioning
from t2i_jax.systems.diffusion import labels
from t2i_jax.systems.diffusion.transformer import LabelledTransformer
from t2i_jax.systems.trees import Variables


@dataclasses.dataclass(frozen=True, eq=False)
class UViT(LabelledTransformer):
  """See the module's docstring.

  Every token of the text is one of the network's, padding too where the text encoder lets it be
  seen, as CLIP's did in the published models; so captions have one length.

  Attributes (beside those of `LabelledTransformer`):
    convolution: of `networks.u_vit.UViT`.
  """

  Network: ClassVar = u_vit.UViT

  schedule: str = "scaled_linear"
  width: int = 512
  depth: int = 12
  heads: int = 8
  convolution: bool = True

  def __post_init__(self):
    if self.depth % 2:
      raise UserError(f"model.depth={self.depth} is odd, and half of the blocks skip to the other "
                      "half; the one between them is not counted")
    super().__post_init__()

  def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
    if (height, width) != (self.resolution, self.resolution):
      raise UserError("U-ViT has learned the place of each token, so it takes pictures of "
                      f"model.resolution={self.resolution} alone, not of {height} x {width}")
    return self.shape

  def arguments(self, given: Conditioning) -> dict[str, Array | None]:
    return {
      "context": given.sequence, "mask": given.mask, "label": given.extra.get(labels.LABEL),
    }  # fmt: skip

  def output(
    self, variables: Variables, x: Array, t: Array, given: Conditioning, **kwargs: Any
  ) -> Array:
    if isinstance(self.process, DiscreteProcess):
      # The published models count from 1, which is the least noise, to 1000.
      t = t + 1
    return super().output(variables, x, t, given, **kwargs)
