"""LPIPS: pictures compared in the features of VGG16, by weights that people's judgements taught.

Zhang, Isola, Efros, Shechtman and Wang 2018, section 3 ("lin", on VGG), whose
files are public; `t2i_jax.conversion.perceptual` makes an export of them.
"""

import dataclasses
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from t2i_jax.networks.vgg import BLOCKS, VGG16
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Batch
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.perceptual.features import squared_difference
from t2i_jax.systems.trees import NO_VARIABLES, Variables

VGG, WEIGHTS = "vgg", "weights"
# ImageNet's channel means and deviations of pictures in [0, 1], for pictures in [-1, 1]; rounded
# as the published weights were trained with.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclasses.dataclass(frozen=True, eq=False)
class LPIPS(base.System):
  """See the module's docstring; no player trains it.

  Attributes:
    text: of the config; nothing of it is used.
    blocks: of the network; the published ones by default.
    dtype: type of the computation.
  """

  text: TextConditioner
  blocks: tuple[tuple[int, int], ...] = BLOCKS
  dtype: Any = jnp.float32

  name = "lpips"
  reads_text = False
  players = ()
  ema_groups = (VGG, WEIGHTS)

  @cached_property
  def network(self) -> VGG16:
    return VGG16(tuple(map(tuple, self.blocks)), self.dtype)

  def batch_spec(self) -> dict[str, base.Field]:
    return {}

  def init(self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES):
    """Random numbers, which compare nothing: of use for their shapes alone."""
    vgg = self.network.init(rng, jnp.zeros((1, 16, 16, 3)))
    weights = {f"block_{i}": jnp.ones(channels) for i, (channels, _) in enumerate(self.blocks)}
    return trees.merge(trees.as_group(VGG, vgg), {"params": {WEIGHTS: weights}})

  def distance(self, variables: Variables, a: Array, b: Array) -> Array:
    """Of pictures [B, H, W, 3] in [-1, 1], H and W at least 16: [B]."""
    own = trees.group(variables, VGG)
    features = [
      self.network.apply(own, (x - jnp.array(SHIFT)) / jnp.array(SCALE)) for x in (a, b)
    ]
    weights = variables["params"][WEIGHTS]
    return sum(
      squared_difference(ours, theirs, weights[f"block_{i}"])
      for i, (ours, theirs) in enumerate(zip(*features, strict=True))
    )
