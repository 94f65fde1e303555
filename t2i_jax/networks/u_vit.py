"""U-ViT: a picture's patches, the time and the text as the tokens of one transformer.

Bao et al. 2023 (All are Worth Words), section 3: long skips between the first blocks and the last,
by a layer on both put side by side; learned positions of all tokens; a 3x3 convolution at the end.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.attention import MultiHeadAttention
from t2i_jax.networks.layers.barriers import computed_once
from t2i_jax.networks.layers.embeddings import timestep_embedding
from t2i_jax.networks.layers.mlp import Mlp
from t2i_jax.networks.patch_transformer import PatchTransformer
from t2i_jax.parallel.sharding import logical

Array = jax.Array
normal = nn.initializers.normal(0.02)


class UViTBlock(nn.Module):
  """A long skip, if there is one, then attention and an MLP, each behind a norm.

  Attributes:
    heads: of the attention.
    hidden: units of the MLP.
    dtype: type of the computation.
  """

  heads: int
  hidden: int
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array, skip: Array | None, mask: Array | None = None) -> Array:
    """x [B, T, C], skip [B, T, C], mask bool [B, T] of tokens that count -> [B, T, C]."""
    norm = lambda name: nn.LayerNorm(1e-5, dtype=self.dtype, name=name)  # noqa: E731
    if skip is not None:
      both = jnp.concatenate([x, skip], axis=-1)
      x = nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=normal, name="skip")(both)
    x = x + MultiHeadAttention(
      self.heads, input_bias=False, kernel_init=normal, dtype=self.dtype, name="attention"
    )(norm("norm_attention")(x), mask=mask)
    x = computed_once(x)
    h = norm("norm_mlp")(x)
    x = x + Mlp(self.hidden, exact=True, kernel_init=normal, dtype=self.dtype, name="mlp")(h)
    return logical(x, "batch", "length", None)


class UViT(PatchTransformer):
  """Predicts from a noised picture or latent, its time, and a text or a label.

  Attributes (beside those of `PatchTransformer`):
    depth: blocks besides the one in the middle, half of them on either side of it.
    convolution: whether there is one at the end; the largest published model has none.
    classes: labels that may be given, beside which there is a row for none; 0 for no table.
  """

  width: int = 512
  depth: int = 12
  heads: int = 8
  convolution: bool = True
  classes: int = 0

  @nn.compact
  def __call__(
    self,
    x: Array,
    t: Array,
    context: Array | None = None,
    mask: Array | None = None,
    label: Array | None = None,
    train: bool = False,
  ) -> Array:
    """Prediction from noised data.

    Args:
      x: [B, H, W, C], of the size at initialisation; H and W divide by `patch`.
      t: [B] times; those of the published models are 1 to 1000.
      context: [B, L, D] text features, a token each.
      mask, label: as of `networks.unet.UNet`.
      train: nothing is other in training.

    Returns:
      float32 [B, H, W, out_channels].
    """
    # As the published convolution of patches begins, of which a matrix is the same.
    fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    tokens, grid = self.tokens(x, fan_in)
    # The time is a token as it is: the published models have no MLP on it.
    extra = [timestep_embedding(t, self.width).astype(self.dtype)[:, None]]
    if context is not None:
      layer = nn.Dense(self.width, dtype=self.dtype, kernel_init=normal, name="context")
      extra.append(layer(context.astype(self.dtype)))
    if self.classes:
      label = self.labels(label, self.classes, nn.initializers.normal(1.0))
      extra.insert(0, label[:, None])
    number = sum(part.shape[1] for part in extra)
    if mask is not None:
      count = lambda length: jnp.ones((len(x), length), bool)  # noqa: E731
      mask = jnp.concatenate(
        [count(number - mask.shape[1]), mask, count(tokens.shape[1])], axis=1
      )
    tokens = jnp.concatenate([*extra, tokens], axis=1)
    places = self.param("positions", normal, tokens.shape[1:])
    tokens = logical(tokens + places.astype(self.dtype), "batch", "length", None)
    h = self._blocks(tokens, mask)
    h = nn.LayerNorm(1e-5, name="norm_out")(h[:, number:])
    h = nn.Dense(self.numbers(x), kernel_init=normal, name="out")(h)
    h = self.picture(h, grid)
    if self.convolution:
      h = nn.Conv(h.shape[-1], (3, 3), kernel_init=fan_in, name="conv_out")(h)
    return h

  def _blocks(self, x: Array, mask: Array | None) -> Array:
    """Tokens [B, T, C] through all blocks; the last reads what the first gave, and so inwards."""
    make = lambda name: UViTBlock(self.heads, self.hidden, self.dtype, name=name)  # noqa: E731
    half = self.depth // 2
    x, skips = self.run(make, "in_blocks", half, x, mask, keep=True)
    x = self.run_one(make("middle_block"), x, mask)
    skips = None if skips is None else skips[::-1]
    return self.run(make, "out_blocks", half, x, mask, each=skips)[0]
