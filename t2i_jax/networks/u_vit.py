"""U-ViT: a picture's patches, the time and the text as the tokens of one transformer.

Bao et al. 2023 (All are Worth Words), section 3: long skips between the first blocks and the last,
by a layer on both put side by side; learned positions of all tokens; a 3x3 convolution at the end.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.attention import MultiHeadAttention
from t2i_jax.networks.layers.embeddings import timestep_embedding
from t2i_jax.networks.layers.mlp import Mlp
from t2i_jax.networks.layers.resample import shuffle, unshuffle
from t2i_jax.networks.layers.stack import run_blocks
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
    h = norm("norm_mlp")(x)
    x = x + Mlp(self.hidden, exact=True, kernel_init=normal, dtype=self.dtype, name="mlp")(h)
    return logical(x, "batch", "length", None)


class UViT(nn.Module):
  """Predicts from a noised picture or latent, its time, and a text or a label.

  Attributes:
    patch: side of the squares of pixels that are tokens.
    width, depth, heads: units of a token; blocks besides the one in the middle, half of them on
      either side of it; heads of their attentions.
    mlp_ratio: units of the MLPs over `width`.
    convolution: whether there is one at the end; the largest published model has none.
    out_channels: of the prediction; 0 for those of the input.
    classes: labels that may be given, beside which there is a row for none; 0 for no table.
    remat, scan: of the blocks; see `layers.stack`.
    dtype: type of the computation; the last layers are float32.
  """

  patch: int = 2
  width: int = 512
  depth: int = 12
  heads: int = 8
  mlp_ratio: float = 4.0
  convolution: bool = True
  out_channels: int = 0
  classes: int = 0
  remat: str = "none"
  scan: bool = True
  dtype: jnp.dtype = jnp.float32

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
      mask: bool [B, L], the tokens of the text that count.
      label: int32 [B], one of `classes`, or -1 for none; or [B, labels], whose embeddings are
        added up.
      train: nothing is other in training.

    Returns:
      float32 [B, H, W, out_channels].
    """
    out_channels = self.out_channels or x.shape[-1]
    dense = lambda name: nn.Dense(  # noqa: E731
      self.width, dtype=self.dtype, kernel_init=normal, name=name
    )
    patches = unshuffle(x.astype(self.dtype), self.patch)
    batch, height, width, _ = patches.shape
    # As the published convolution of patches begins, of which a matrix is the same.
    fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    tokens = nn.Dense(self.width, dtype=self.dtype, kernel_init=fan_in, name="patches")(
      patches.reshape(batch, height * width, -1)
    )
    # The time is a token as it is: the published models have no MLP on it.
    time = timestep_embedding(t, self.width).astype(self.dtype)[:, None]
    extra = [time]
    if context is not None:
      extra.append(dense("context")(context.astype(self.dtype)))
    if self.classes:
      init = nn.initializers.normal(1.0)
      table = nn.Embed(
        self.classes + 1, self.width, dtype=self.dtype, embedding_init=init, name="label"
      )
      label = label.reshape(batch, -1)
      label = table(jnp.where(label < 0, self.classes, label))
      extra.insert(0, jnp.sum(label, axis=1, keepdims=True))
    number = sum(part.shape[1] for part in extra)
    tokens = jnp.concatenate([*extra, tokens], axis=1)
    places = self.param("positions", normal, tokens.shape[1:])
    tokens = logical(tokens + places.astype(self.dtype), "batch", "length", None)
    if mask is not None:
      count = jnp.ones((batch, number - mask.shape[1]), bool)
      mask = jnp.concatenate([count, mask, jnp.ones((batch, height * width), bool)], axis=1)
    h = self._blocks(tokens, mask)
    h = nn.LayerNorm(1e-5, name="norm_out")(h[:, number:])
    h = nn.Dense(self.patch**2 * out_channels, kernel_init=normal, name="out")(h)
    h = shuffle(h.reshape(batch, height, width, -1), self.patch)
    if self.convolution:
      h = nn.Conv(out_channels, (3, 3), kernel_init=fan_in, name="conv_out")(h)
    return h

  def _blocks(self, x: Array, mask: Array | None) -> Array:
    """Tokens [B, T, C] through all blocks; the last reads what the first gave, and so inwards."""
    make = lambda name: UViTBlock(  # noqa: E731
      self.heads, int(self.mlp_ratio * self.width), self.dtype, name=name
    )
    half, how = self.depth // 2, {"remat": self.remat, "scan": self.scan}
    x, skips = run_blocks(make, "in_blocks", half, x, (mask,), keep=True, **how)
    x, _ = run_blocks(lambda _: make("middle_block"), "", 1, x, (mask,), **{**how, "scan": False})
    skips = None if skips is None else skips[::-1]
    return run_blocks(make, "out_blocks", half, x, (mask,), each=skips, **how)[0]
