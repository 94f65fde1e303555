"""The multimodal diffusion transformer: a picture and a text attend to one another.

Esser et al. 2024 (Stable Diffusion 3), section 4: both are streams of tokens with weights of their
own, which meet in one attention; the time and the pooled text modulate them. Version 3.5 norms
queries and keys (section 5.3.2), and its medium model has a second attention, of the picture alone,
in its first blocks.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.networks.layers.adaptive import LastLayer, Modulation, modulated, plain_norm
from t2i_jax.networks.layers.attention import HeadNorm, attend
from t2i_jax.networks.layers.barriers import computed_once
from t2i_jax.networks.layers.embeddings import patch_positions
from t2i_jax.networks.layers.mlp import Mlp
from t2i_jax.networks.patch_transformer import PatchTransformer
from t2i_jax.parallel.sharding import logical

Array = jax.Array
xavier = nn.initializers.xavier_uniform()


class Projections(nn.Module):
  """A stream's queries, keys and values.

  Attributes:
    heads: of the attention.
    norm: whether queries and keys are normed, head by head.
    dtype: type of the computation.
  """

  heads: int
  norm: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Array) -> tuple[Array, Array, Array]:
    """x [B, T, C] -> queries, keys and values [B, T, H, D]."""
    width = x.shape[-1]
    dense = lambda name: nn.Dense(  # noqa: E731
      width, dtype=self.dtype, kernel_init=xavier, name=name
    )
    query, key, value = (
      logical(dense(name)(x).reshape(*x.shape[:2], self.heads, -1), "batch", None, "heads", None)
      for name in ("query", "key", "value")
    )
    query = HeadNorm(self.norm, name="query_norm")(query)
    return query, HeadNorm(self.norm, name="key_norm")(key), value


class JointBlock(nn.Module):
  """One attention of a picture and a text, and an MLP of each.

  Attributes:
    heads: of the attention.
    hidden: units of the MLPs.
    norm: whether queries and keys are normed.
    dual: whether the picture attends to itself besides.
    last: whether the text is only read: nothing comes after that would read what it became.
    dtype: type of the computation.
  """

  heads: int
  hidden: int
  norm: bool = False
  dual: bool = False
  last: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(
    self, streams: tuple[Array, Array], each: None, condition: Array, mask: Array | None = None
  ) -> tuple[Array, Array]:
    """Streams ([B, T, C], [B, L, C]), condition [B, C], mask bool [B, L] -> the streams."""
    image, text = streams
    split = text.shape[1]
    modulate = lambda name, number: Modulation(  # noqa: E731
      image.shape[-1], number, self.dtype, name=name
    )(condition)
    project = lambda name: Projections(self.heads, self.norm, self.dtype, name=name)  # noqa: E731
    image_vectors = modulate("image_modulation", 9 if self.dual else 6)
    text_vectors = modulate("text_modulation", 2 if self.last else 6)
    normed = plain_norm(image, self.dtype)
    of_image = project("image")(modulated(normed, *image_vectors[:2]))
    of_text = project("text")(modulated(plain_norm(text, self.dtype), *text_vectors[:2]))
    joined = (jnp.concatenate(parts, axis=1) for parts in zip(of_text, of_image, strict=True))
    if mask is not None:
      mask = jnp.concatenate([mask, jnp.ones(image.shape[:2], bool)], axis=1)[:, None, None]
    read = attend(*joined, mask)
    image = image + image_vectors[2][:, None] * self._out("image_out", read[:, split:])
    if self.dual:
      shift, scale, gate = image_vectors[6:]
      own = attend(*project("second")(modulated(normed, shift, scale)))
      image = image + gate[:, None] * self._out("second_out", own)
    image = self._mlp("image_mlp", image, image_vectors[3:6])
    if not self.last:
      text = text + text_vectors[2][:, None] * self._out("text_out", read[:, :split])
      text = self._mlp("text_mlp", text, text_vectors[3:])
    return logical(image, "batch", "length", None), text

  def _out(self, name: str, read: Array) -> Array:
    """What was read, [B, T, H, D], as tokens [B, T, C]."""
    read = read.reshape(*read.shape[:2], -1)
    return nn.Dense(read.shape[-1], dtype=self.dtype, kernel_init=xavier, name=name)(read)

  def _mlp(self, name: str, x: Array, vectors: list[Array]) -> Array:
    shift, scale, gate = vectors
    x = computed_once(x)
    h = modulated(plain_norm(x, self.dtype), shift, scale)
    return x + gate[:, None] * Mlp(self.hidden, dtype=self.dtype, name=name)(h)


class MMDiT(PatchTransformer):
  """Predicts from a noised latent, its time, a text's tokens and its pooled vector.

  Attributes (beside those of `PatchTransformer`):
    norm: whether queries and keys are normed, as in version 3.5.
    dual: blocks, from the first on, with a second attention of the picture alone.
    grid, largest: places are those of a picture of `grid` tokens a side, in the middle of one of
      `largest` whose places are as far apart (Esser et al. 2024, section 5.3.2, "positional
      encodings"); 192 and 64 were published, and 384 in 3.5's medium model.
  """

  width: int = 1536
  depth: int = 24
  heads: int = 24
  norm: bool = False
  dual: int = 0
  grid: int = 64
  largest: int = 192

  @nn.compact
  def __call__(
    self, x: Array, t: Array, context: Array, mask: Array | None = None,
    pooled: Array | None = None, train: bool = False,
  ) -> Array:
    """Prediction from noised data.

    Args:
      x: [B, H, W, C]; H and W divide by `patch`, and are at most `largest` times it.
      t: [B] times; those of the published models are 0 to 1000.
      context, pooled: as of `networks.unet.UNet`.
      mask: bool [B, L], the tokens that count; the published models have none.
      train: nothing is other in training.

    Returns:
      float32 [B, H, W, out_channels].
    """
    condition = self.condition(t, pooled)
    h, grid = self.tokens(x, xavier)
    h = h + jnp.asarray(self._positions(*grid), self.dtype)
    layer = nn.Dense(self.width, dtype=self.dtype, kernel_init=xavier, name="context")
    streams = logical(h, "batch", "length", None), layer(context.astype(self.dtype))

    def make(dual: bool, last: bool = False):
      return lambda name: JointBlock(
        self.heads, self.hidden, self.norm, dual, last, self.dtype, name=name
      )

    given, plain = (condition, mask), self.depth - 1 - self.dual
    streams, _ = self.run(make(True), "dual_blocks", self.dual, streams, *given)
    streams, _ = self.run(make(False), "blocks", plain, streams, *given, first=self.dual)
    h, _ = self.run_one(make(False, True)("last_block"), streams, *given)
    shift, scale = Modulation(self.width, 2, self.dtype, name="modulation_out")(condition)
    h = LastLayer(self.numbers(x), name="out")(h, shift, scale)
    return self.picture(h, grid)

  def _positions(self, height: int, width: int) -> np.ndarray:
    """[height * width, width of a token]."""
    return patch_positions(*(places(n, self.grid, self.largest) for n in (height, width)),
                           self.width)


def places(number: int, grid: int, largest: int) -> np.ndarray:
  """The middle `number` of `largest` places whose numbers run from 0 to `grid`, [number]."""
  first = (largest - number) // 2
  return (np.arange(number) + first) * (grid / largest)
