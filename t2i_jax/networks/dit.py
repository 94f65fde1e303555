"""The diffusion transformer, and its form that attends to a text.

Peebles and Xie 2023 (DiT): patches as tokens, fixed positions, and blocks that the time and a label
modulate (section 3.2, "adaLN-Zero"). Chen et al. 2024 (PixArt-alpha), section 2.3: cross-attention
to the text between a block's two halves, and one regression for all blocks ("adaLN-single").
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.networks.layers.adaptive import (
  LastLayer,
  Modulation,
  TwoLayers,
  modulated,
  plain_norm,
)
from t2i_jax.networks.layers.attention import MultiHeadAttention
from t2i_jax.networks.layers.barriers import computed_once
from t2i_jax.networks.layers.embeddings import patch_positions
from t2i_jax.networks.layers.mlp import Mlp
from t2i_jax.networks.patch_transformer import PatchTransformer
from t2i_jax.parallel.sharding import logical

Array = jax.Array
MODULATIONS = ("zero", "single")


class DiTBlock(nn.Module):
  """Attention, cross-attention where there is a text, and an MLP.

  Attributes:
    heads: of the attentions.
    hidden: units of the MLP.
    modulation: "zero", a regression of the block's own, or "single", a table beside what all share.
    dtype: type of the computation.
  """

  heads: int
  hidden: int
  modulation: str = "zero"
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: Array, each: None, condition: Array, context: Array | None = None,
    mask: Array | None = None,
  ) -> Array:
    """x [B, T, C], context [B, L, D], mask bool [B, L] -> [B, T, C].

    `condition` is [B, C], or, with "single", the six vectors that all blocks share [B, 6, C].
    """
    width = x.shape[-1]
    if self.modulation == "single":
      table = self.param("table", nn.initializers.normal(width**-0.5), (6, width))
      vectors = jnp.split(condition + table.astype(self.dtype), 6, axis=1)
      vectors = [vector[:, 0] for vector in vectors]
    else:
      vectors = Modulation(width, 6, self.dtype, name="modulation")(condition)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors
    attention = partial(MultiHeadAttention, self.heads, dtype=self.dtype)
    h = modulated(plain_norm(x, self.dtype), shift, scale)
    x = x + gate[:, None] * attention(name="attention")(h)
    if context is not None:
      # Not normed before, as published.
      x = x + attention(zero_output=True, name="cross_attention")(x, context, mask)
    x = computed_once(x)
    h = modulated(plain_norm(x, self.dtype), mlp_shift, mlp_scale)
    x = x + mlp_gate[:, None] * Mlp(self.hidden, dtype=self.dtype, name="mlp")(h)
    return logical(x, "batch", "length", None)


class DiT(PatchTransformer):
  """Predicts from a noised picture or latent, its time, and labels or a text.

  Attributes (beside those of `PatchTransformer`):
    modulation: of `MODULATIONS`; see `DiTBlock`.
    position_scale: what places are divided by: PixArt-alpha's larger models were grown from smaller
      ones, and have 2 at 1024 px.
    classes: labels that may be given, beside which there is a row for none; 0 for no table.
  """

  modulation: str = "zero"
  position_scale: float = 1.0
  classes: int = 0

  @nn.compact
  def __call__(
    self,
    x: Array,
    t: Array,
    context: Array | None = None,
    mask: Array | None = None,
    pooled: Array | None = None,
    label: Array | None = None,
    train: bool = False,
  ) -> Array:
    """Prediction from noised data.

    Args:
      x: [B, H, W, C]; H and W divide by `patch`.
      t, context, mask, pooled, label: as of `networks.unet.UNet`.
      train: nothing is other in training.

    Returns:
      float32 [B, H, W, out_channels].
    """
    condition = self.condition(t, pooled)
    if self.classes:
      condition = condition + self.labels(label, self.classes, nn.initializers.normal(0.02))
    h, grid = self.tokens(x, nn.initializers.xavier_uniform())
    places = (np.arange(n) / self.position_scale for n in grid)
    h = h + jnp.asarray(patch_positions(*places, self.width), self.dtype)
    h = logical(h, "batch", "length", None)
    if context is not None:
      context = TwoLayers(self.width, True, self.dtype, name="context")(context)
    given = condition
    if self.modulation == "single":
      vectors = Modulation(self.width, 6, self.dtype, name="modulation")(condition)
      given = jnp.stack(vectors, axis=1)
    make = lambda name: DiTBlock(  # noqa: E731
      self.heads, self.hidden, self.modulation, self.dtype, name=name
    )
    h, _ = self.run(make, "blocks", self.depth, h, given, context, mask)
    if self.modulation == "single":
      init = nn.initializers.normal(self.width**-0.5)
      table = self.param("table_out", init, (2, self.width))
      shift, scale = (condition + row for row in table.astype(self.dtype))
    else:
      shift, scale = Modulation(self.width, 2, self.dtype, name="modulation_out")(condition)
    h = LastLayer(self.numbers(x), name="out")(h, shift, scale)
    return self.picture(h, grid)
