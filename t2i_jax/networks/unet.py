"""The U-Net of the diffusion line, in the form of each of its models by its options.

Ho et al. 2020, appendix B (blocks, group norm, attention); Dhariwal and Nichol
2021, section 3 (heads, scale and shift from the embedding, changes of size
inside blocks); Rombach et al. 2022, section 3.3 (cross-attention to the text);
Podell et al. 2023, section 2.1 (several transformer blocks a level) and 2.2 (a
vector of sizes). `configs/` has the options under the models' names.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.embeddings import coordinate_channels, timestep_embedding
from t2i_jax.networks.layers.group_norm import GroupNorm
from t2i_jax.networks.layers.resample import Downsample, Upsample, enlarged, shuffle, unshuffle
from t2i_jax.networks.layers.resblock import ResBlock
from t2i_jax.networks.layers.spatial import AttentionBlock, CompactAttention, SpatialTransformer

Array = jax.Array
ATTENTIONS = ("compact", "block", "transformer")


class Trunk(nn.Module):
  """What U-Nets and their halves share: the embedding, the levels on the way down, the middle.

  Attributes:
    channels: of which levels have multiples; a quarter of the time embedding's.
    multipliers: channels of each level, as multiples; they may be fractions.
    blocks: residual blocks a level on the way down; one more on the way up.
    attention: "block" (self-attention; a text's tokens beside the pixels), "transformer"
      (self-attention, cross-attention and a gated MLP, `depths` times) or "compact" (the same once,
      with positions, for small networks).
    attention_levels: levels (0 is the finest) that attend; the middle always does.
    depths: transformer blocks of each level; () for one each.
    middle_depth: transformer blocks of the middle.
    head_channels: width of an attention head, where `heads` is 0.
    heads: number of heads at every level.
    groups, epsilon: of the group norms; the groups must divide every level's channels.
    positions, mlp_ratio: of the "compact" attention.
    scale_shift, dropout: of the residual blocks.
    block_resample: residual blocks change the size between levels, rather than convolutions.
    symmetric: convolutions that halve the size have zeros on all sides; see `Downsample`.
    sine_first: the order of the time embedding; see `timestep_embedding`.
    pooled_mlp: the pooled vector is embedded by an MLP rather than by one layer.
    classes: labels that may be given; 0 for none.
    remat: compute blocks again in the backward pass rather than keep what is in them.
    scan: transformer blocks in a row are one program and have stacked parameters, which compiles in
      a fraction of the time; no adapters.
    dtype: type of the computation; the last norm and convolution are float32.
  """

  channels: int = 128
  multipliers: tuple[float, ...] = (1, 2, 2, 2)
  blocks: int = 2
  attention: str = "compact"
  attention_levels: tuple[int, ...] = (1,)
  depths: tuple[int, ...] = ()
  middle_depth: int = 1
  head_channels: int = 64
  heads: int = 0
  groups: int = 32
  epsilon: float = 1e-6
  positions: bool = True
  mlp_ratio: float = 0.0
  scale_shift: bool = True
  dropout: float = 0.0
  block_resample: bool = False
  symmetric: bool = False
  sine_first: bool = False
  pooled_mlp: bool = False
  classes: int = 0
  remat: bool = False
  scan: bool = False
  dtype: jnp.dtype = jnp.float32

  def width(self, i: int) -> int:
    """Channels of level `i`."""
    return int(self.channels * self.multipliers[i])

  def embedded(self, t: Array, pooled: Array | None = None, label: Array | None = None) -> Array:
    """t [B], pooled [B, P], label int32 [B] or [B, labels] -> [B, 4 channels].

    A label below 0 is unsaid and adds nothing.
    """
    width = 4 * self.channels
    dense = lambda name: nn.Dense(width, dtype=self.dtype, name=name)  # noqa: E731
    e = timestep_embedding(t, self.channels, sine_first=self.sine_first).astype(self.dtype)
    e = dense("time_out")(nn.silu(dense("time_in")(e)))
    if pooled is not None:
      pooled = dense("pooled")(pooled.astype(self.dtype))
      e = e + (dense("pooled_out")(nn.silu(pooled)) if self.pooled_mlp else pooled)
    if self.classes:
      table = nn.Embed(self.classes, width, dtype=self.dtype, name="label")
      label = label.reshape(len(label), -1)
      said = (label >= 0)[..., None]
      e = e + jnp.sum(jnp.where(said, table(jnp.maximum(label, 0)), 0), axis=1)
    return e

  def resblock(self, channels: int, name: str, resample: str = "none") -> ResBlock:
    """A residual block with the network's options; call it with (x, embedding, train)."""
    kind = nn.remat(ResBlock, static_argnums=(3,)) if self.remat else ResBlock
    return kind(
      channels, self.groups, self.epsilon, self.scale_shift, resample, self.dropout,
      dtype=self.dtype, name=name,
    )  # fmt: skip

  def attending(self, channels: int, depth: int, name: str) -> nn.Module:
    """An attention with the network's options; call it with (x, context, mask)."""
    heads = self.heads or max(channels // self.head_channels, 1)
    if self.attention == "transformer":
      return SpatialTransformer(
        heads, depth, self.groups, self.remat, self.scan, self.dtype, name=name
      )
    if self.attention == "block":
      kind = nn.remat(AttentionBlock) if self.remat else AttentionBlock
      return kind(heads, self.groups, self.epsilon, dtype=self.dtype, name=name)
    kind = nn.remat(CompactAttention) if self.remat else CompactAttention
    return kind(
      heads, self.groups, self.epsilon, self.positions, self.mlp_ratio, self.dtype, name=name
    )

  def block(self, h: Array, i: int, name: str, embedding, context, mask, train: bool) -> Array:
    """A residual block of level `i`, and its attention where the level attends."""
    channels = self.width(i)
    h = self.resblock(channels, f"{name}_block")(h, embedding, train)
    if i in self.attention_levels:
      depth = self.depths[i] if self.depths else 1
      h = self.attending(channels, depth, f"{name}_attention")(h, context, mask)
    return h

  def down(self, h: Array, embedding, context, mask, train: bool) -> tuple[Array, list[Array]]:
    """All levels on the way down: the coarsest features, and what the way up takes of each."""
    skips = [h]
    for i in range(len(self.multipliers)):
      for j in range(self.blocks):
        h = self.block(h, i, f"down_{i}_{j}", embedding, context, mask, train)
        skips.append(h)
      if i < len(self.multipliers) - 1:
        name = f"down_{i}_sample"
        if self.block_resample:
          h = self.resblock(h.shape[-1], name, "down")(h, embedding, train)
        else:
          h = Downsample(h.shape[-1], self.symmetric, self.dtype, name=name)(h)
        skips.append(h)
    return h, skips

  def middle(self, h: Array, embedding, context, mask, train: bool) -> Array:
    """Two residual blocks with attention between them."""
    channels = h.shape[-1]
    h = self.resblock(channels, "middle_block_0")(h, embedding, train)
    h = self.attending(channels, self.middle_depth, "middle_attention")(h, context, mask)
    return self.resblock(channels, "middle_block_1")(h, embedding, train)


class UNet(Trunk):
  """Predicts from a noised picture, its time and a text.

  Attributes (beside those of `Trunk`):
    out_channels: of the prediction; 0 for those of the picture.
    patch: the picture is unshuffled into patch x patch pixels a position first,
      so that no level works at full resolution.
    coordinates: frequencies of the sine-cosine coordinate channels beside the
      input; 0 for none.
  """

  out_channels: int = 0
  patch: int = 1
  coordinates: int = 0

  @nn.compact
  def __call__(
    self,
    x: Array,
    t: Array,
    context: Array | None = None,
    mask: Array | None = None,
    pooled: Array | None = None,
    layout: Array | None = None,
    label: Array | None = None,
    train: bool = False,
  ) -> Array:
    """Prediction from noised pictures.

    Args:
      x: [B, H, W, C]; H and W divide by patch * 2^(levels - 1).
      t: [B] times, in the units of the process's `embedded`.
      context: [B, L, D] text features to attend to.
      mask: bool [B, L].
      pooled: [B, P] vector, added to the time embedding.
      layout: [B, S, S, F] features of a coarse grid, put beside the picture; S
        divides H / patch and W / patch.
      label: int32 [B], one of `classes`, or -1 for none; or [B, labels], whose embeddings are
        added up.
      train: whether dropout is on (needs the `dropout` rng).

    Returns:
      float32 [B, H, W, out_channels].
    """
    embedding = self.embedded(t, pooled, label)
    context = None if context is None else context.astype(self.dtype)
    out_channels = self.out_channels or x.shape[-1]
    h = unshuffle(x.astype(self.dtype), self.patch)
    if self.coordinates:
      places = jnp.asarray(coordinate_channels(*h.shape[1:3], self.coordinates), self.dtype)
      h = jnp.concatenate([h, jnp.broadcast_to(places, (*h.shape[:3], places.shape[-1]))], -1)
    if layout is not None:
      h = jnp.concatenate([h, enlarged(layout.astype(self.dtype), *h.shape[1:3])], axis=-1)
    h = nn.Conv(self.width(0), (3, 3), dtype=self.dtype, name="conv_in")(h)
    h, skips = self.down(h, embedding, context, mask, train)
    h = self.middle(h, embedding, context, mask, train)
    for i in reversed(range(len(self.multipliers))):
      for j in range(self.blocks + 1):
        h = jnp.concatenate([h, skips.pop()], axis=-1)
        h = self.block(h, i, f"up_{i}_{j}", embedding, context, mask, train)
      if i > 0:
        name = f"up_{i}_sample"
        if self.block_resample:
          h = self.resblock(h.shape[-1], name, "up")(h, embedding, train)
        else:
          h = Upsample(h.shape[-1], self.dtype, name=name)(h)
    # In float32 to the end: bfloat16 near 1 is coarser than a picture's 8 bits are fine.
    h = nn.silu(GroupNorm(self.groups, self.epsilon, jnp.float32, name="norm_out")(h))
    h = nn.Conv(
      out_channels * self.patch**2, (3, 3), kernel_init=nn.initializers.zeros, name="conv_out"
    )(h)
    return shuffle(h, self.patch)
