"""What diffusion systems share, on data whose best denoiser is known: no network is trained."""

import dataclasses
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.diffusion.process import expand
from t2i_jax.diffusion.schedules import make_process
from t2i_jax.errors import UserError
from t2i_jax.systems import base
from t2i_jax.systems.base import GUIDE, Conditioning
from t2i_jax.systems.capabilities import make_options
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.diffusion.denoiser import Denoiser
from t2i_jax.systems.diffusion.sampling import KNOWN, START
from t2i_jax.systems.trees import NO_VARIABLES

NO_TEXT = TextConditioner(encoder="none")
MEAN, DEVIATION = 0.2, 0.3
SIDE = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian(Denoiser):
  """Every pixel by itself is normal; the network is E[x_0 | x_t]."""

  schedule: str = "cosine"
  steps: int = 100
  resolution: int = SIDE
  prediction: str = "x0"

  def init_denoiser(self, rng, x, given):
    return {"params": {"unused": jnp.zeros(())}}

  def output(self, variables, x, t, given, **kwargs):
    t = t.astype(jnp.int32)
    alpha, sigma = (expand(f(t), x.ndim) for f in (self.process.alpha, self.process.sigma))
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    mean = (alpha * DEVIATION**2 * x + sigma**2 * MEAN) / variance
    shift = 0.0 if given.pooled is None else given.pooled[:, None, None]
    mean = mean + shift
    return jnp.concatenate([mean, jnp.ones_like(mean)], -1) if self.learned_variance else mean


@dataclasses.dataclass(frozen=True, eq=False)
class Observer(base.System):
  """log p(y | x_t) of a noisy observation y of x_0, by the same Gaussian."""

  text: TextConditioner = NO_TEXT
  schedule: str = "cosine"
  spread: float = 0.3
  dtype: Any = jnp.float32
  players = ()
  ema_groups = ()

  @cached_property
  def process(self):
    return make_process(self.schedule, 100)

  def batch_spec(self):
    return {}

  def init(self, rng, batch, frozen=NO_VARIABLES):
    return {"params": {"seen": {"y": jnp.float32(0.0)}}}

  def read(self, variables, batch):
    return {"y": jnp.full(3, variables["params"]["seen"]["y"])}

  def log_prob(self, variables, x_t, t, conditioning):
    t = t.astype(jnp.int32)
    alpha, sigma = (expand(f(t), x_t.ndim) for f in (self.process.alpha, self.process.sigma))
    variance = (alpha * DEVIATION) ** 2 + sigma**2
    mean = (alpha * DEVIATION**2 * x_t + sigma**2 * MEAN) / variance
    left = (DEVIATION * sigma) ** 2 / variance + self.spread**2
    y = expand(conditioning.extra["y"], x_t.ndim)
    return -0.5 * jnp.sum(jnp.square(y - mean) / left, axis=(1, 2, 3))


Y = 0.8
OBSERVED = {"params": {GUIDE: {"seen": {"y": jnp.float32(Y)}}}}
PLAIN = Gaussian(NO_TEXT)
GUIDED = Gaussian(NO_TEXT, components={GUIDE: Observer()})
KEYS = jax.random.split(jax.random.key(0), 3)


def draw(system, conditioning=None, variables=NO_VARIABLES, **options):
  given = Conditioning() if conditioning is None else conditioning
  chosen = make_options(system, {"clip": False, "steps": 50, **options})
  return jax.jit(system.sample)(dict(variables), given, KEYS, chosen)


def reading():
  return GUIDED.condition(OBSERVED, {})


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m"])
def test_a_guide_gives_the_posterior(solver):
  # Of N(m, s^2) and an observation with deviation r: precision 1/s^2 + 1/r^2. 2,304 draws. The mean
  # shift is of first order in the step, and of the variances the larger is the closer.
  precision = DEVIATION**-2 + Observer().spread**-2
  mean = (MEAN / DEVIATION**2 + Y / Observer().spread**2) / precision
  x = draw(GUIDED, reading(), OBSERVED, solver=solver, steps=100, variance="large")
  np.testing.assert_allclose(x.mean(), mean, atol=0.02)
  np.testing.assert_allclose(x.std(), precision**-0.5, atol=0.02)
  plain = draw(PLAIN, solver=solver, steps=100)
  np.testing.assert_allclose((plain.mean(), plain.std()), (MEAN, DEVIATION), atol=0.02)


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_a_guide_of_scale_0_is_no_guide(solver):
  guided = draw(GUIDED, reading(), OBSERVED, solver=solver, guide_scale=0.0)
  # Two programs, whose sums are fused in other ways.
  np.testing.assert_allclose(guided, draw(PLAIN, solver=solver), atol=1e-5)


def test_what_a_guide_is_shown_reaches_it():
  class Reader(Observer):
    def read(self, variables, batch):
      return {name: x for name, x in batch.items() if x is not None}

  system = Gaussian(NO_TEXT, components={GUIDE: Reader()})
  shown = {"image": np.ones((2, SIDE, SIDE, 3), np.uint8), "weights": np.ones((2, 4), np.float32)}
  assert system.condition(OBSERVED, {GUIDE: shown}).extra[GUIDE] == shown


def test_a_guide_of_another_process_is_refused():
  with pytest.raises(UserError, match="noised by another process"):
    Gaussian(NO_TEXT, components={GUIDE: Observer(schedule="linear")})
  with pytest.raises(UserError, match="takes no component 'other'"):
    Gaussian(NO_TEXT, components={"other": Observer()})


def text(value):
  """A condition that moves the prediction by `value`, and a null that does not."""
  null = Conditioning(pooled=jnp.zeros((3, 1)))
  return Conditioning(pooled=jnp.full((3, 1), value), null=null)


def test_guidance_of_scale_1_is_the_condition_alone_and_of_0_the_null():
  alone = draw(PLAIN, text(0.1).replace(null=None))
  for options in ({}, {"rescale": 0.7}, {"guidance_kind": "projected"}):
    np.testing.assert_allclose(draw(PLAIN, text(0.1), guidance=1.0, **options), alone, atol=1e-5)
  np.testing.assert_allclose(draw(PLAIN, text(0.1), guidance=0.0), draw(PLAIN), atol=1e-5)


def test_guidance_is_left_out_outside_its_interval():
  alone = draw(PLAIN, text(0.1).replace(null=None))
  everywhere = draw(PLAIN, text(0.1), guidance=3.0)
  nowhere = draw(PLAIN, text(0.1), guidance=3.0, guidance_low=1e8)
  some = draw(PLAIN, text(0.1), guidance=3.0, guidance_low=0.2, guidance_high=2.0)
  np.testing.assert_allclose(nowhere, alone, atol=1e-5)
  assert np.all(some.mean() > alone.mean()) and np.all(some.mean() < everywhere.mean())


def test_a_known_part_stays_and_the_rest_is_drawn():
  start = jnp.full((3, SIDE, SIDE, 3), -0.5)
  known = jnp.zeros((3, SIDE, SIDE, 1)).at[:, :4].set(1.0)
  given = Conditioning(extra={START: start, KNOWN: known})
  x = draw(PLAIN, given)
  np.testing.assert_allclose(x[:, :4], -0.5, atol=1e-6)
  np.testing.assert_allclose((x[:, 4:].mean(), x[:, 4:].std()), (MEAN, DEVIATION), atol=0.04)


def test_a_picture_to_begin_with_is_kept_the_more_the_less_strength():
  start = jnp.full((3, SIDE, SIDE, 3), -0.5)
  given = Conditioning(extra={START: start})
  far = [
    float(jnp.abs(draw(PLAIN, given, strength=strength) - start).mean())
    for strength in (0.1, 0.5, 1.0)
  ]
  assert far[0] < 0.5 * far[1] < 0.5 * far[2]
  # With all steps nothing is left of it.
  np.testing.assert_allclose(draw(PLAIN, given, strength=1.0), draw(PLAIN), atol=0.02)


def test_a_learned_variance_draws_with_its_share():
  # This one's network says the larger variance everywhere.
  learned = Gaussian(NO_TEXT, learned_variance=True)
  np.testing.assert_allclose(
    draw(learned, solver="ddpm", variance="learned", steps=4),
    draw(PLAIN, solver="ddpm", variance="large", steps=4), atol=1e-5,
  )


def test_the_loss_has_the_bound_of_a_learned_variance():
  image = np.random.default_rng(0).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
  batch, key = {"image": jnp.asarray(image)}, jax.random.key(4)
  variables = {"params": {"denoiser": {"unused": jnp.zeros(())}}}
  plain, learned = (
    s.evaluation_loss(variables, batch, key)["loss"]
    for s in (PLAIN, Gaussian(NO_TEXT, learned_variance=True))
  )
  assert np.all(learned > plain)


def test_offset_noise_is_the_same_over_a_picture():
  seen = []

  class Spy(Gaussian):
    def output(self, variables, x, t, given, **kwargs):
      seen.append(x)
      return super().output(variables, x, t, given, **kwargs)

  batch, key = {"image": jnp.zeros((3, SIDE, SIDE, 3), jnp.uint8)}, jax.random.key(5)
  variables = {"params": {"denoiser": {"unused": jnp.zeros(())}}}
  for offset in (0.0, 0.5):
    Spy(NO_TEXT, offset_noise=offset).evaluation_loss(variables, batch, key)
  added = seen[1] - seen[0]
  np.testing.assert_allclose(added, jnp.broadcast_to(added[:, :1, :1], added.shape), atol=1e-5)
  assert np.abs(added).max() > 0.01


@pytest.mark.parametrize(
  "options, message",
  [
    ({"variance": "learned", "solver": "ddpm"}, "has learned none"),
    ({"guidance_kind": "other"}, "guidance_kind"),
    ({"dynamic": 1.5}, "no quantile"),
    ({"height": 32}, "alone, not of 32 x"),
    ({"solver": "flow_euler"}, "of the process 'flow' alone"),
  ],
)
def test_options_that_make_no_sense_are_refused(options, message):
  with pytest.raises(UserError, match=message):
    draw(PLAIN, **options)
