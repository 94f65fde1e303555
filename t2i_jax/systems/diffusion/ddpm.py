"""Denoising diffusion in pixels, conditioned on text, with classifier-free guidance.

Ho, Jain and Abbeel 2020 (the process, the loss, ancestral sampling); Nichol and
Dhariwal 2021 (the cosine schedule); Song, Meng and Ermon 2021 (DDIM); Ho and
Salimans 2022 (guidance without a classifier).
"""

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from t2i_jax.diffusion import guidance, solvers, thresholding
from t2i_jax.diffusion.combination import check_combination
from t2i_jax.diffusion.grid import make_grid
from t2i_jax.diffusion.parameterization import make_parameterization
from t2i_jax.diffusion.process import expand, shifted
from t2i_jax.diffusion.schedules import make_process
from t2i_jax.diffusion.timesteps import make_density
from t2i_jax.diffusion.weighting import make_weighting
from t2i_jax.errors import UserError
from t2i_jax.networks.draft import Draft, shrunk
from t2i_jax.networks.unet import UNet
from t2i_jax.systems import base
from t2i_jax.systems.base import Array, Aux, Batch, Conditioning, Field, Player, Variables
from t2i_jax.systems.conditioning import TextConditioner

DENOISER = "denoiser"
DRAFT = "draft"


@struct.dataclass
class Options:
  """Sampling options.

  Attributes:
    solver: one of `diffusion.solvers.SOLVERS`: "ddpm" (ancestral), "ddim", "dpmpp_2m"...
    steps: of the solver; of most, network evaluations a picture.
    guidance: classifier-free guidance scale; 1 is the conditional model alone.
    eta: of DDIM.
    variance: of the ancestral solver, "small" or "large".
    clip: clip the predicted x_0 to [-1, 1] at every step.
  """

  solver: str = struct.field(pytree_node=False, default="ddim")
  steps: int = struct.field(pytree_node=False, default=50)
  guidance: float = 2.0
  eta: float = struct.field(pytree_node=False, default=0.0)
  variance: str = struct.field(pytree_node=False, default="small")
  clip: bool = struct.field(pytree_node=False, default=True)


@dataclasses.dataclass(frozen=True, eq=False)
class DDPM(base.System):
  """See the module's docstring.

  Attributes:
    text: turns captions into conditioning.
    resolution: side of the pictures, in pixels.
    schedule, steps: of the process ("linear" or "cosine").
    prediction, sigma_data: what the network outputs: "epsilon", "x0", "v" or "edm"; see
      `diffusion.parameterization`.
    weighting, weighting_bound: which error the loss measures; see `diffusion.weighting`.
    draft: side of the coarse picture that is predicted from the text alone, with a squared
      error of its own, and whose features the U-Net gets (`networks.draft`); 0 for none.
    density, density_spread, time_shift: which times are trained; see `diffusion.timesteps`.
    channels ... dropout: of the `UNet`.
    dtype: type of the computation.
  """

  Options = Options

  text: TextConditioner
  resolution: int = 32
  schedule: str = "linear"
  steps: int = 1000
  prediction: str = "epsilon"
  sigma_data: float = 0.5
  weighting: str = "epsilon"
  weighting_bound: float = 5.0
  density: str = "uniform"
  density_spread: float = 1.0
  time_shift: float = 1.0
  draft: int = 0
  channels: int = 128
  multipliers: tuple[int, ...] = (1, 2, 2, 2)
  blocks: int = 2
  attention_levels: tuple[int, ...] = (1,)
  head_channels: int = 64
  groups: int = 32
  patch: int = 1
  coordinates: int = 0
  positions: bool = True
  mlp_ratio: float = 0.0
  scale_shift: bool = True
  dropout: float = 0.0
  dtype: Any = jnp.float32

  def __post_init__(self):
    base.check_positive(
      "model", self, "resolution", "channels", "multipliers", "blocks", "head_channels", "groups",
      "patch",
    )
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
    # The middle, which is as wide as the last level, always attends.
    base.check_levels(self, (len(self.multipliers) - 1,), self.positions)
    if not 0.0 <= self.dropout < 1.0:
      raise UserError(f"model.dropout={self.dropout} is out of range; use 0 to below 1")
    if self.time_shift <= 0:
      raise UserError(f"model.time_shift={self.time_shift} is not positive; 1 shifts nothing")
    # Wrong names are found when the system is built, not when it first trains.
    self.process, self.parameterization, self.weight, self.times  # noqa: B018

  @cached_property
  def process(self):
    return make_process(self.schedule, self.steps)

  @cached_property
  def parameterization(self):
    return make_parameterization(self.prediction, self.sigma_data)

  @cached_property
  def weight(self):
    return make_weighting(self.weighting, self.weighting_bound)

  @cached_property
  def times(self):
    return make_density(self.density, self.density_spread)

  @cached_property
  def network(self) -> UNet:
    names = {field.name for field in dataclasses.fields(UNet)} - {"parent", "name"}
    return UNet(**{name: getattr(self, name) for name in names if hasattr(self, name)})

  @cached_property
  def drafter(self) -> Draft:
    return Draft(self.draft, dtype=self.dtype)

  @property
  def players(self) -> tuple[Player, ...]:
    return (Player("denoiser", self.ema_groups, self.loss),)

  @property
  def ema_groups(self) -> tuple[str, ...]:
    return (*self.text.groups, *((DRAFT,) if self.draft else ()), DENOISER)

  @property
  def frozen_groups(self) -> tuple[str, ...]:
    return self.text.frozen_groups

  def batch_spec(self) -> dict[str, Field]:
    image = Field((self.resolution, self.resolution, 3), "uint8")
    return {"image": image, **self.text.batch_spec()}

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = base.NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    text = self.text.init(base.fold_name(rng, "text_encoder"), batch, frozen)
    x = base.normalize_images(batch["image"])
    given = self.text(base.merge(text, frozen), batch)
    drafted, layout = {}, None
    if self.draft:
      (layout, _), draft = self.drafter.init_with_output(
        base.fold_name(rng, DRAFT), given.sequence, given.mask
      )
      drafted = base.as_group(DRAFT, draft)
    denoiser = self.network.init(
      base.fold_name(rng, DENOISER), x, jnp.zeros(len(x), jnp.int32),
      given.sequence, given.mask, given.pooled, layout,
    )
    return base.merge(text, drafted, base.as_group(DENOISER, denoiser))

  def loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """The weighted error of Ho et al. 2020, algorithm 1, averaged over the batch."""
    given, drafted = self._drafted(variables, self.text(variables, batch, rng))
    loss = jnp.mean(self._errors(variables, batch, given, rng, train=True))
    if drafted is None:
      return loss, Aux()
    x_0 = base.normalize_images(batch["image"])
    draft = jnp.mean(jnp.square(drafted - shrunk(x_0, self.draft)))
    return loss + draft, Aux({"loss": loss, "draft": draft})

  def evaluation_loss(self, variables: Variables, batch: Batch, rng: Array) -> dict[str, Array]:
    """The training error of each example [B], without dropout of captions or units."""
    given, _ = self._drafted(variables, self.text(variables, batch))
    return {"loss": self._errors(variables, batch, given, rng, train=False)}

  def _errors(self, variables, batch, given: Conditioning, rng, train: bool) -> Array:
    x_0 = base.normalize_images(batch["image"])
    u = shifted(self.times(base.fold_name(rng, "time"), len(x_0)), self.time_shift)
    t = self.process.time(u)
    noise = jax.random.normal(base.fold_name(rng, "noise"), x_0.shape)
    alpha, sigma = (expand(f(t), x_0.ndim) for f in (self.process.alpha, self.process.sigma))
    output = self._network(
      variables, self.process.corrupt(x_0, noise, t), t, given, train=train,
      rngs={"dropout": base.fold_name(rng, "dropout")},
    )
    target = self.parameterization.target(x_0, noise, alpha, sigma)
    scale = self.parameterization.error_scale(alpha, sigma)
    weight = self.weight(expand(self.process.snr(t), x_0.ndim)) / scale**2
    return jnp.mean(weight * jnp.square(output - target), axis=(1, 2, 3))

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
      base.group(variables, DRAFT), given.sequence, given.mask
    )
    return given.replace(extra={**given.extra, "layout": layout}), picture

  def _network(self, variables, x, t, given: Conditioning, **kwargs) -> Array:
    return self.network.apply(
      base.group(variables, DENOISER), x, t, given.sequence, given.mask, given.pooled,
      given.extra.get("layout"), **kwargs,
    )

  def condition(self, variables: Variables, batch: Batch) -> Conditioning:
    given = self.text.with_null(variables, batch)
    null, _ = self._drafted(variables, given.null)
    return self._drafted(variables, given)[0].replace(null=null)

  def sample(
    self, variables: Variables, conditioning: Conditioning, keys: Array, options: Options
  ) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1]; both branches of the guidance run as one batch."""
    solver = solvers.make_solver(options.solver, options.eta, options.variance)
    doubled = jax.tree.map(
      guidance.interleave, conditioning.replace(null=None), conditioning.null
    )

    def predict(x: Array, row: solvers.Row, memory: Any):
      t = self.process.embedded(row.time)
      output = self._network(
        variables, guidance.both(x), jnp.full(2 * len(x), t), doubled
      )
      output = guidance.classifier_free(*guidance.separate(output), options.guidance)
      prediction = self.parameterization.predict(x, output, row.alpha, row.sigma)
      if options.clip:
        prediction = thresholding.static(prediction, x, row.alpha, row.sigma)
      return solvers.Evaluation(*prediction), memory

    check_combination(self.process, self.parameterization, solver)
    grid = make_grid(self.process, options.steps, convention=solver.convention)
    start = grid.deviation * solvers.start_noise(keys, (self.resolution, self.resolution, 3))
    x_0 = solvers.solve(solver(grid), predict, start, keys)
    return jnp.clip(x_0, -1.0, 1.0)
