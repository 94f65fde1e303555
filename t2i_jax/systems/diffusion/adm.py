"""The ablated diffusion model, conditioned on labels, for guidance by a classifier.

Dhariwal and Nichol 2021 (Diffusion Models Beat GANs on Image Synthesis): the U-Net of section 3,
trained with the learned variances of Nichol and Dhariwal 2021 (Improved Denoising Diffusion
Probabilistic Models, section 3.1). Its guide is that of section 4, for which `noisy_classifier` is
a system: the ancestral solver shifts its mean along the classifier's gradient (algorithm 1), the
deterministic ones shift the noise (algorithm 2).
"""

import dataclasses
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from t2i_jax.networks.unet import UNet
from t2i_jax.systems import trees
from t2i_jax.systems.base import Array, Batch, Conditioning
from t2i_jax.systems.diffusion import labels
from t2i_jax.systems.diffusion.ddpm import DDPM
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.systems.diffusion.unet_options import make_unet
from t2i_jax.systems.trees import Variables


@dataclasses.dataclass(frozen=True, eq=False)
class ADM(labels.Labelled, DDPM):
  """See the module's docstring; the published models drop no label."""

  learned_variance: bool = True
  channels: int = 192
  multipliers: tuple[float, ...] = (1, 2, 3, 4)
  blocks: int = 3
  attention: str = "block"
  attention_levels: tuple[int, ...] = (1, 2, 3)
  epsilon: float = 1e-5
  block_resample: bool = True

  @cached_property
  def network(self) -> UNet:
    return make_unet(self, 3 * self.outputs, classes=labels.rows_of(self.classes))

  def init_denoiser(self, rng: Array, x: Array, given: Conditioning) -> Variables:
    return self.network.init(rng, x, jnp.zeros(len(x), jnp.int32), **_arguments(given))

  def output(
    self, variables: Variables, x: Array, t: Array, given: Conditioning, **kwargs: Any
  ) -> Array:
    own = trees.group(variables, DENOISER)
    return self.network.apply(own, x, t, **_arguments(given), **kwargs)

  def reading(
    self, variables: Variables, batch: Batch, rng: Array | None
  ) -> tuple[Conditioning, Array | None]:
    given, drafted = super().reading(variables, batch, rng)
    return labels.trained(self, given, batch, rng), drafted


def _arguments(given: Conditioning) -> dict[str, Array | None]:
  """What the U-Net reads of the conditioning."""
  return {
    "context": given.sequence, "mask": given.mask, "pooled": given.pooled,
    "layout": given.extra.get("layout"), "label": given.extra.get(labels.LABEL),
  }
