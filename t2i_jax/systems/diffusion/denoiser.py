"""What every diffusion system shares: corruption, loss, and sampling with guidance.

A system of this family says what its clean data is (pixels, or latents) and which network reads
them; how they are corrupted, which times are trained, what the network's output means, which
errors count and how samples are drawn is put together here from `t2i_jax/diffusion/`.
"""

import abc
import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.diffusion import variance
from t2i_jax.diffusion.combination import check_combination
from t2i_jax.diffusion.continuous import shifted
from t2i_jax.diffusion.parameterization import make_parameterization
from t2i_jax.diffusion.process import DiscreteProcess, expand
from t2i_jax.diffusion.schedules import make_process
from t2i_jax.diffusion.timesteps import make_density
from t2i_jax.diffusion.weighting import make_weighting
from t2i_jax.errors import UserError
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import GUIDE, Array, Aux, Batch, Conditioning, Field, Player
from t2i_jax.systems.capabilities import Guide, require
from t2i_jax.systems.checks import check_positive
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.diffusion import sampling
from t2i_jax.systems.diffusion.sampling import KNOWN, START, Options
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables

DENOISER = "denoiser"
@dataclasses.dataclass(frozen=True, eq=False)
class Denoiser(base.System):
  """See the module's docstring.

  Attributes:
    text: turns captions into conditioning.
    resolution: side of the pictures, in pixels.
    schedule, steps, beta_start, beta_end, zero_terminal_snr, sigma_min, sigma_max, shift: of the
      process; see `diffusion.schedules`. What is None is as published.
    prediction, sigma_data: what the network outputs; see `diffusion.parameterization`.
    weighting, weighting_bound: which error the loss measures; see `diffusion.weighting`.
    learned_variance: whether the network has a second output, the variance of the reverse process
      (Nichol and Dhariwal 2021, section 3.1), which is trained by the variational bound.
    density, density_mean, density_spread, time_shift: which times are trained; see
      `diffusion.timesteps`. What is None is as published.
    offset_noise: of a noise that is the same over a picture's positions, beside the noise of each;
      0.05 in SDXL's last stage (Podell et al. 2023, section 2.5).
    components: frozen systems by their role, `guide` among them.
    dtype: type of the computation.
  """

  Options = Options
  roles: ClassVar[tuple[str, ...]] = (GUIDE,)

  text: TextConditioner
  resolution: int = 32
  schedule: str = "linear"
  steps: int = 1000
  beta_start: float | None = None
  beta_end: float | None = None
  zero_terminal_snr: bool = False
  sigma_min: float | None = None
  sigma_max: float | None = None
  shift: float | None = None
  prediction: str = "epsilon"
  sigma_data: float = 0.5
  weighting: str = "epsilon"
  weighting_bound: float = 5.0
  learned_variance: bool = False
  density: str = "uniform"
  density_mean: float | None = None
  density_spread: float | None = None
  time_shift: float = 1.0
  offset_noise: float = 0.0
  components: Mapping[str, base.System] = dataclasses.field(default_factory=dict)
  dtype: Any = jnp.float32

  def __post_init__(self):
    check_positive("model", self, "resolution")
    if self.time_shift <= 0:
      raise UserError(f"model.time_shift={self.time_shift} is not positive; 1 shifts nothing")
    if self.offset_noise < 0:
      raise UserError(f"model.offset_noise={self.offset_noise} is negative; 0 is none")
    for name in self.components:
      if name not in self.roles:
        raise UserError(f"{type(self).__name__} takes no component '{name}', only "
                        f"{', '.join(self.roles)}; text encoders are those that text.encoders "
                        "names, with text.encoder=component")
    # Wrong names are found when the system is built, not when it first trains.
    self.process, self.weight, self.times  # noqa: B018
    check_combination(self.process, self.parameterization)
    if self.learned_variance and not isinstance(self.process, DiscreteProcess):
      raise UserError(f"model.learned_variance is of processes in steps, and model.schedule="
                      f"{self.schedule} has none; leave one of them out")
    if GUIDE in self.components:
      self._check_guide()

  def _check_guide(self) -> None:
    """Raises UserError unless the guide knows pictures noised as these are."""
    require(self.guide, Guide, f"components.{GUIDE}")
    u = np.linspace(0.0, 1.0, 9)
    ours, theirs = (
      [np.asarray(f(p.time(jnp.float32(u)))) for f in (p.alpha, p.sigma)]
      for p in (self.process, self.guide.process)
    )
    if not np.allclose(ours, theirs, atol=1e-4):
      raise UserError(f"components.{GUIDE} was trained on pictures noised by another process than "
                      f"model.schedule={self.schedule} in model.steps={self.steps}; train it on "
                      "this one")

  @cached_property
  def process(self):
    return make_process(
      self.schedule, self.steps, shift=self.shift, zero_terminal_snr=self.zero_terminal_snr,
      beta_start=self.beta_start, beta_end=self.beta_end, sigma_min=self.sigma_min,
      sigma_max=self.sigma_max,
    )  # fmt: skip

  @cached_property
  def parameterization(self):
    return make_parameterization(self.prediction, self.sigma_data)

  @cached_property
  def weight(self):
    return make_weighting(self.weighting, self.weighting_bound, sigma_data=self.sigma_data)

  @cached_property
  def times(self):
    return make_density(
      self.density, self.density_spread, mean=self.density_mean, process=self.process
    )

  @property
  def guide(self) -> Any:
    return self.components.get(GUIDE)

  @property
  def labels(self) -> tuple[tuple[str, int], ...]:
    return self.guide.labels if self.guide else ()

  @property
  def outputs(self) -> int:
    """Arrays of the data's shape that the network gives."""
    return 2 if self.learned_variance else 1

  @property
  def players(self) -> tuple[Player, ...]:
    return (Player("denoiser", self.ema_groups, self.loss),)

  @property
  def ema_groups(self) -> tuple[str, ...]:
    return (*self.text.groups, DENOISER)

  @property
  def frozen_groups(self) -> tuple[str, ...]:
    return (*self.text.frozen_groups, *self.components)

  @property
  def shape(self) -> tuple[int, int, int]:
    """Of one example as it is modelled, (height, width, channels)."""
    return (self.resolution, self.resolution, 3)

  def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
    """The same for pictures of another size; UserError for one that the network does not take."""
    if (height, width) != (self.resolution, self.resolution):
      raise UserError(f"{type(self).__name__} takes pictures of model.resolution={self.resolution} "
                      f"alone, not of {height} x {width}")
    return self.shape

  def batch_spec(self) -> dict[str, Field]:
    image = Field((self.resolution, self.resolution, 3), "uint8")
    return {"image": image, **self.text.batch_spec()}

  @abc.abstractmethod
  def output(
    self, variables: Variables, x: Array, t: Array, given: Conditioning, **kwargs: Any
  ) -> Array:
    """The network's output [B, h, w, outputs * c].

    Args:
      variables: of the system.
      x: noised data [B, h, w, c], scaled as the parameterization has it.
      t: [B], as `Process.embedded` gives them.
      given: the condition.
      **kwargs: `train` and `rngs` of the network.
    """

  @abc.abstractmethod
  def init_denoiser(self, rng: Array, x: Array, given: Conditioning) -> Variables:
    """Fresh variables of the network, as Linen has them."""

  def clean(self, variables: Variables, batch: Batch, rng: Array) -> Array:
    """What is modelled, float32 [B, h, w, c], of a batch."""
    return normalize_images(batch["image"])

  def given(self, variables: Variables, batch: Batch, rng: Array | None = None) -> Conditioning:
    """The condition of a batch; with `rng`, captions are dropped as in training."""
    return self.text(variables, batch, rng)

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    text = self.text.init(fold_name(rng, "text_encoder"), batch, frozen)
    given = self.given(trees.merge(text, frozen), batch)
    rows = jax.tree.leaves(batch)[0].shape[0]
    denoiser = self.init_denoiser(
      fold_name(rng, DENOISER), jnp.zeros((rows, *self.shape)), given
    )
    return trees.merge(text, trees.as_group(DENOISER, denoiser))

  def loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """The weighted error of Ho et al. 2020, algorithm 1, averaged over the batch."""
    given = self.given(variables, batch, rng)
    return jnp.mean(self.errors(variables, batch, given, rng, train=True)), Aux()

  def evaluation_loss(self, variables: Variables, batch: Batch, rng: Array) -> dict[str, Array]:
    """The training error of each example [B], without dropout of captions or units."""
    given = self.given(variables, batch)
    return {"loss": self.errors(variables, batch, given, rng, train=False)}

  def errors(
    self, variables: Variables, batch: Batch, given: Conditioning, rng: Array, train: bool
  ) -> Array:
    """Each example's weighted error [B] at a time of its own."""
    x_0 = self.clean(variables, batch, rng)
    u = shifted(self.times(fold_name(rng, "time"), len(x_0)), self.time_shift)
    t = self.process.time(u)
    noise = jax.random.normal(fold_name(rng, "noise"), x_0.shape)
    if self.offset_noise:
      offset = jax.random.normal(
        fold_name(rng, "offset_noise"), (len(x_0), 1, 1, x_0.shape[-1])
      )
      noise = noise + self.offset_noise * offset
    alpha, sigma = (expand(f(t), x_0.ndim) for f in (self.process.alpha, self.process.sigma))
    x_t = self.process.corrupt(x_0, noise, t)
    output, share = self.split(self.output(
      variables, x_t * self.parameterization.input_scale(alpha, sigma), self.process.embedded(t),
      given, train=train, rngs={"dropout": fold_name(rng, "dropout")},
    ))  # fmt: skip
    target = self.parameterization.target(x_0, noise, alpha, sigma)
    scale = self.parameterization.error_scale(alpha, sigma)
    weight = self.weight(expand(self.process.snr(t), x_0.ndim)) / scale**2
    errors = jnp.mean(weight * jnp.square(output - target), axis=(1, 2, 3))
    if share is None:
      return errors
    predicted = self.parameterization.predict(x_t, output, alpha, sigma).x_0
    bound = variance.bound(self.process, x_0, x_t, t, predicted, share)
    return errors + variance.WEIGHT * self.process.steps * bound

  def split(self, output: Array) -> tuple[Array, Array | None]:
    """The network's output, and the share of the larger variance, if it is learned."""
    if not self.learned_variance:
      return output, None
    output, share = jnp.split(output, 2, axis=-1)
    return output, variance.fraction(share)

  def condition(self, variables: Variables, batch: Batch) -> Conditioning:
    """The condition of prompts with its null, what the guide reads of them, and what to begin with.

    `batch` may bring `image`, uint8 [B, H, W, 3], to begin with, and `known`, bool [B, H, W, 1],
    where it is to stay; as `guide`, what the guide's `references` gave.
    """
    given = self.text.with_null(variables, batch)
    extra = {}
    if self.guide:
      read = {"label": batch.get("label"), "text": batch.get("text", {}).get(GUIDE)}
      read |= batch.get(GUIDE, {})
      extra[GUIDE] = self.guide.read(trees.group(variables, GUIDE), read)
    if "image" in batch:
      extra[START] = self.encoded(variables, normalize_images(batch["image"]))
    if KNOWN in batch:
      extra[KNOWN] = self.kept(batch[KNOWN])
    return given.replace(extra={**given.extra, **extra})

  def encoded(self, variables: Variables, images: Array) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1] as what is modelled."""
    return images

  def kept(self, known: Array) -> Array:
    """Where what is modelled is known, float32 [B, h, w, 1], of pixels bool [B, H, W, 1]."""
    return known.astype(jnp.float32)

  def prepared(self, conditioning: Conditioning, options: Any) -> Conditioning:
    """Conditioning with what the sampling options say of it."""
    return conditioning

  def sample(
    self, variables: Variables, conditioning: Conditioning, keys: Array, options: Any
  ) -> Array:
    """Samples [B, h, w, c] of what is modelled; see `sampling.draw`."""
    return sampling.draw(self, variables, conditioning, keys, options)
