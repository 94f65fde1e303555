"""What diffusion transformers share: patches as tokens, blocks in a row, and patches again.

Dosovitskiy et al. 2021, section 3.1 (patches); Peebles and Xie 2023, section 3.2 (the condition).
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.adaptive import TwoLayers
from t2i_jax.networks.layers.embeddings import timestep_embedding
from t2i_jax.networks.layers.resample import shuffle, unshuffle
from t2i_jax.networks.layers.stack import Carry, run_blocks

Array = jax.Array
Initializer = nn.initializers.Initializer
TIME_WIDTH = 256  # of the waves that embed a time


class PatchTransformer(nn.Module):
  """See the module's docstring. Its methods are for a network's own compact method.

  Attributes:
    patch: side of the squares of positions that are tokens.
    width, depth, heads: units of a token, blocks, and heads of their attentions.
    mlp_ratio: units of the MLPs over `width`.
    out_channels: of the prediction; 0 for those of the input.
    remat, scan: of the blocks; see `layers.stack`.
    dtype: type of the computation; the last layers are float32.
  """

  patch: int = 2
  width: int = 1152
  depth: int = 28
  heads: int = 16
  mlp_ratio: float = 4.0
  out_channels: int = 0
  remat: str = "none"
  scan: bool = True
  dtype: jnp.dtype = jnp.float32

  @property
  def hidden(self) -> int:
    """Units of the MLPs."""
    return int(self.mlp_ratio * self.width)

  def numbers(self, x: Array) -> int:
    """Of a token's prediction, for an input x [B, H, W, C]."""
    return self.patch**2 * (self.out_channels or x.shape[-1])

  def tokens(self, x: Array, kernel_init: Initializer) -> tuple[Array, tuple[int, int]]:
    """x [B, H, W, C] -> tokens [B, h w, width] and (h, w) = (H, W) / patch.

    A layer on a patch's pixels is the published convolution whose stride is its size.
    """
    x = unshuffle(x.astype(self.dtype), self.patch)
    batch, *grid, _ = x.shape
    layer = nn.Dense(self.width, dtype=self.dtype, kernel_init=kernel_init, name="patches")
    return layer(x.reshape(batch, grid[0] * grid[1], -1)), tuple(grid)

  def picture(self, tokens: Array, grid: tuple[int, int]) -> Array:
    """Predictions of patches [B, h w, patch^2 C] -> [B, H, W, C]."""
    return shuffle(tokens.reshape(len(tokens), *grid, -1), self.patch)

  def condition(self, t: Array, pooled: Array | None) -> Array:
    """Times [B] and a text's vector [B, P], embedded and added up, [B, width]."""
    e = TwoLayers(self.width, dtype=self.dtype, name="time")(timestep_embedding(t, TIME_WIDTH))
    if pooled is None:
      return e
    return e + TwoLayers(self.width, dtype=self.dtype, name="pooled")(pooled)

  def labels(self, label: Array, classes: int, embedding_init: Initializer) -> Array:
    """int32 [B] or [B, labels], -1 for none, which has a row of its own -> their sum [B, width]."""
    table = nn.Embed(
      classes + 1, self.width, dtype=self.dtype, embedding_init=embedding_init, name="label"
    )
    label = label.reshape(len(label), -1)
    return jnp.sum(table(jnp.where(label < 0, classes, label)), axis=1)

  def run(
    self, make: Callable[[str], nn.Module], name: str, depth: int, x: Carry, *given: Any,
    **how: Any,
  ) -> tuple[Carry, Any]:
    """`layers.stack.run_blocks` as the network's `remat` and `scan` say."""
    return run_blocks(
      make, name, depth, x, given, **{"remat": self.remat, "scan": self.scan, **how}
    )

  def run_one(self, block: nn.Module, x: Carry, *given: Any) -> Carry:
    """The same with a block that has no equal and keeps its own name."""
    return self.run(lambda _: block, "", 1, x, *given, scan=False)[0]
