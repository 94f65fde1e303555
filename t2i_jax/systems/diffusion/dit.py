"""Diffusion transformers, conditioned on a text or on labels, in latents or in pixels.

Peebles and Xie 2023 (DiT): labels, or a text's pooled vector, modulate every block. Chen et al.
2024 (PixArt-alpha): every block attends to the text (`cross_attention`), and one regression from
the time modulates all (`modulation=single`).
"""

import dataclasses
from functools import cached_property
from typing import Any, ClassVar

import jax.numpy as jnp

from t2i_jax.errors import UserError, unknown
from t2i_jax.networks import dit
from t2i_jax.systems import base
from t2i_jax.systems.base import Array, Batch, Conditioning, Field, Variables
from t2i_jax.systems.diffusion import labels
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.systems.diffusion.latent import LatentDenoiser
from t2i_jax.systems.diffusion.transformer_options import check_transformer, make_transformer


@dataclasses.dataclass(frozen=True, eq=False)
class DiT(LatentDenoiser):
  """See the module's docstring.

  Attributes (beside those of `LatentDenoiser`):
    patch, width, depth, heads, mlp_ratio, modulation, position_scale, remat, scan: of
      `networks.dit.DiT`.
    pooled: whether the text's vector, of encoders that give one, modulates the blocks.
    cross_attention: whether the blocks attend to the text's tokens.
    classes, label_drop: labels; see `labels`. DiT drops a tenth, for guidance.
  """

  models_pixels: ClassVar[bool] = True

  learned_variance: bool = True
  patch: int = 2
  width: int = 1152
  depth: int = 28
  heads: int = 16
  mlp_ratio: float = 4.0
  modulation: str = "zero"
  position_scale: float = 1.0
  pooled: bool = True
  cross_attention: bool = False
  classes: tuple[tuple[str, int], ...] = ()
  label_drop: float = 0.0
  remat: str = "none"
  scan: bool = True

  def __post_init__(self):
    check_transformer(self)
    if self.modulation not in dit.MODULATIONS:
      raise unknown("model.modulation", self.modulation, dit.MODULATIONS)
    if self.position_scale <= 0:
      raise UserError(f"model.position_scale={self.position_scale} is not positive; 1 is usual")
    if self.text.names and not self.pooled and not self.cross_attention:
      raise UserError("model.pooled and model.cross_attention are both off, so that no caption is "
                      "read; set one of them, or text.encoder=none")
    super().__post_init__()
    labels.check_labels(self)

  @property
  def unit(self) -> int:
    return self.patch

  @property
  def unit_is(self) -> str:
    return "model.patch"

  @property
  def labels(self) -> tuple[tuple[str, int], ...]:
    return self.classes or super().labels

  @cached_property
  def network(self) -> dit.DiT:
    return make_transformer(
      dit.DiT, self, out_channels=self.shape[-1] * self.outputs,
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
    return self.network.init(rng, x, jnp.zeros(len(x)), **self._arguments(given))

  def output(
    self, variables: Variables, x: Array, t: Array, given: Conditioning, **kwargs: Any
  ) -> Array:
    own = base.group(variables, DENOISER)
    return self.network.apply(own, x, t, **self._arguments(given), **kwargs)

  def _arguments(self, given: Conditioning) -> dict[str, Array | None]:
    """What the network reads of the conditioning."""
    if self.text.names and given.pooled is None and not self.cross_attention:
      raise UserError("this text encoder gives no vector for the whole caption, which "
                      "model.pooled=True reads; set model.cross_attention=True")
    read = {"context": given.sequence, "mask": given.mask} if self.cross_attention else {}
    return {
      **read, "pooled": given.pooled if self.pooled else None,
      "label": given.extra.get(labels.LABEL),
    }
