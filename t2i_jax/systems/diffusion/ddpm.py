"""Denoising diffusion in pixels, conditioned on text, with classifier-free guidance.

Ho, Jain and Abbeel 2020 (the process, the loss, ancestral sampling); Nichol and
Dhariwal 2021 (the cosine schedule); Song, Meng and Ermon 2021 (DDIM); Ho and
Salimans 2022 (guidance without a classifier).
"""

import dataclasses
import math
from functools import cached_property
from typing import Any

import jax.numpy as jnp

from t2i_jax.errors import UserError
from t2i_jax.networks.draft import Draft, shrunk
from t2i_jax.networks.unet import UNet
from t2i_jax.systems import trees
from t2i_jax.systems.base import Array, Aux, Batch, Conditioning
from t2i_jax.systems.checks import check_positive
from t2i_jax.systems.diffusion.denoiser import DENOISER, Denoiser
from t2i_jax.systems.diffusion.unet_options import check_network, make_unet
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables

DRAFT = "draft"


@dataclasses.dataclass(frozen=True, eq=False)
class DDPM(Denoiser):
  """See the module's docstring.

  Attributes (beside those of `Denoiser`):
    draft: side of the coarse picture that is predicted from the text alone, with a squared
      error of its own, and whose features the U-Net gets (`networks.draft`); 0 for none.
    channels ... scan: of the `UNet`.
  """

  draft: int = 0
  channels: int = 128
  multipliers: tuple[int, ...] = (1, 2, 2, 2)
  blocks: int = 2
  attention: str = "compact"
  attention_levels: tuple[int, ...] = (1,)
  depths: tuple[int, ...] = ()
  middle_depth: int = 1
  head_channels: int = 64
  heads: int = 0
  groups: int = 32
  epsilon: float = 1e-6
  patch: int = 1
  coordinates: int = 0
  positions: bool = True
  mlp_ratio: float = 0.0
  scale_shift: bool = True
  dropout: float = 0.0
  block_resample: bool = False
  symmetric: bool = False
  sine_first: bool = False
  remat: bool = False
  scan: bool = False

  def __post_init__(self):
    super().__post_init__()
    check_positive("model", self, "patch")
    check_network(self)
    coarsest = self.patch * 2 ** (len(self.multipliers) - 1)
    if self.resolution % coarsest:
      raise UserError(
        f"model.resolution={self.resolution} does not divide by {coarsest} "
        "(model.patch times 2 for each level but the first); change one of them"
      )
    if self.draft < 0 or (self.draft and self.resolution // self.patch % self.draft):
      raise UserError(
        f"model.draft={self.draft} does not divide {self.resolution // self.patch} "
        "(model.resolution / model.patch); change it, or set 0 for no draft"
      )

  def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
    # The draft has as many cells down as across, whatever the picture's shape.
    unit = self.patch * math.lcm(2 ** (len(self.multipliers) - 1), self.draft or 1)
    if height % unit or width % unit:
      raise UserError(f"pictures of {height} x {width} do not fit the network: use multiples of "
                      f"{unit}")
    return height, width, 3

  @cached_property
  def network(self) -> UNet:
    return make_unet(self, 3 * self.outputs)

  @cached_property
  def drafter(self) -> Draft:
    return Draft(self.draft, dtype=self.dtype)

  @property
  def ema_groups(self) -> tuple[str, ...]:
    return (*self.text.groups, *((DRAFT,) if self.draft else ()), DENOISER)

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    if not self.draft:
      return super().init(rng, batch, frozen)
    text = self.text.init(fold_name(rng, "text_encoder"), batch, frozen)
    given = self.text(trees.merge(text, frozen), batch)
    draft = self.drafter.init(fold_name(rng, DRAFT), given.sequence, given.mask)
    drafted = trees.as_group(DRAFT, draft)
    return trees.merge(drafted, super().init(rng, batch, trees.merge(frozen, drafted)))

  def init_denoiser(self, rng: Array, x: Array, given: Conditioning) -> Variables:
    return self.network.init(
      rng, x, jnp.zeros(len(x), jnp.int32), given.sequence, given.mask, given.pooled,
      given.extra.get("layout"),
    )

  def output(
    self, variables: Variables, x: Array, t: Array, given: Conditioning, **kwargs: Any
  ) -> Array:
    return self.network.apply(
      trees.group(variables, DENOISER), x, t, given.sequence, given.mask, given.pooled,
      given.extra.get("layout"), **kwargs,
    )

  def loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """The weighted error of Ho et al. 2020, algorithm 1, and, with a draft, its squared error."""
    given, drafted = self.reading(variables, batch, rng)
    loss = jnp.mean(self.errors(variables, batch, given, rng, train=True))
    if drafted is None:
      return loss, Aux()
    x_0 = normalize_images(batch["image"])
    draft = jnp.mean(jnp.square(drafted - shrunk(x_0, self.draft)))
    return loss + draft, Aux({"loss": loss, "draft": draft})

  def given(self, variables: Variables, batch: Batch, rng: Array | None = None) -> Conditioning:
    return self.reading(variables, batch, rng)[0]

  def reading(
    self, variables: Variables, batch: Batch, rng: Array | None
  ) -> tuple[Conditioning, Array | None]:
    """The condition of a batch, and the draft that is made of it, if there is one.

    With `rng`, captions are dropped as in training.
    """
    return self._drafted(variables, self.text(variables, batch, rng))

  def condition(self, variables: Variables, batch: Batch) -> Conditioning:
    given = super().condition(variables, batch)
    null, _ = self._drafted(variables, given.null)
    return self._drafted(variables, given)[0].replace(null=null)

  def sample(
    self, variables: Variables, conditioning: Conditioning, keys: Array, options: Any
  ) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1]."""
    return jnp.clip(super().sample(variables, conditioning, keys, options), -1.0, 1.0)

  def _drafted(self, variables, given: Conditioning) -> tuple[Conditioning, Array | None]:
    """Conditioning with the draft's features, and the draft, if there is one."""
    if not self.draft:
      return given, None
    if given.sequence is None:
      raise UserError(
        f"model.draft={self.draft} reads features of the tokens, of which this text encoder has "
        "none; set model.draft=0"
      )
    layout, picture = self.drafter.apply(
      trees.group(variables, DRAFT), given.sequence, given.mask
    )
    return given.replace(extra={**given.extra, "layout": layout}), picture
