"""Diffusion transformers, conditioned on a text or on labels, in latents or in pixels.

Peebles and Xie 2023 (DiT): labels, or a text's pooled vector, modulate every block. Chen et al.
2024 (PixArt-alpha): every block attends to the text (`cross_attention`), and one regression from
the time modulates all (`modulation=single`).
"""

import dataclasses
from typing import ClassVar

from t2i_jax.errors import UserError, unknown
from t2i_jax.networks import dit
from t2i_jax.systems.base import Array, Conditioning
from t2i_jax.systems.diffusion import labels
from t2i_jax.systems.diffusion.transformer import LabelledTransformer


@dataclasses.dataclass(frozen=True, eq=False)
class DiT(LabelledTransformer):
  """See the module's docstring.

  Attributes (beside those of `LabelledTransformer`, of whose labels DiT drops a tenth):
    modulation, position_scale: of `networks.dit.DiT`.
    pooled: whether the text's vector, of encoders that give one, modulates the blocks.
    cross_attention: whether the blocks attend to the text's tokens.
  """

  Network: ClassVar = dit.DiT

  learned_variance: bool = True
  modulation: str = "zero"
  position_scale: float = 1.0
  pooled: bool = True
  cross_attention: bool = False

  def __post_init__(self):
    if self.modulation not in dit.MODULATIONS:
      raise unknown("model.modulation", self.modulation, dit.MODULATIONS)
    if self.position_scale <= 0:
      raise UserError(f"model.position_scale={self.position_scale} is not positive; 1 is usual")
    if self.text.names and not self.pooled and not self.cross_attention:
      raise UserError("model.pooled and model.cross_attention are both off, so that no caption is "
                      "read; set one of them, or text.encoder=none")
    super().__post_init__()

  def arguments(self, given: Conditioning) -> dict[str, Array | None]:
    if self.text.names and given.pooled is None and not self.cross_attention:
      raise UserError("this text encoder gives no vector for the whole caption, which "
                      "model.pooled=True reads; set model.cross_attention=True")
    read = {"context": given.sequence, "mask": given.mask} if self.cross_attention else {}
    return {
      **read, "pooled": given.pooled if self.pooled else None,
      "label": given.extra.get(labels.LABEL),
    }
