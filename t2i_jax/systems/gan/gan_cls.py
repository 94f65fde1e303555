"""GAN-INT-CLS: a text-conditional DCGAN with a matching-aware discriminator.

Reed et al. 2016: algorithm 1 and section 4.2 (matching-aware discriminator, CLS),
section 4.3 (learning with manifold interpolation, INT). The text encoder, there
pre-trained to match captions with pictures, is trained here with the
discriminator, whose {real, mismatching} pairs teach it just that: the generator
would gain from captions that cannot be told apart.
"""

import dataclasses
import math
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from t2i_jax.errors import UserError, unknown
from t2i_jax.networks.dcgan import SIDE, Discriminator, Generator
from t2i_jax.parallel.flops import every
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Aux, Batch, Conditioning, Field, Player
from t2i_jax.systems.checks import check_positive
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables

GENERATOR = "generator"
DISCRIMINATOR = "discriminator"


@struct.dataclass
class Options:
  """Sampling options.

  Attributes:
    temperature: factor of the noise; below 1 pictures are closer to the typical.
  """

  temperature: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class GANCLS(base.System):
  """See the module's docstring.

  Attributes:
    text: turns captions into conditioning, of which the pooled vector is used.
    resolution: side of the pictures, a power of two.
    noise_size: of z.
    text_size: units to which each network projects the text.
    generator_channels, discriminator_channels: of the map next to the picture.
    interpolation: weight of the generator's loss on interpolated captions (INT);
      0 for none.
    mixing: beta, the first caption's share of an interpolation.
    label_smoothing: the target for {real, match} is 1 less this (one-sided,
      Salimans et al. 2016, section 3.4).
    r1_weight: gamma of the penalty gamma / 2 |grad_x D|^2 on real pictures
      (Mescheder et al. 2018, section 4.1); 0 for none.
    r1_every: steps between penalties, which then weigh as many times more
      (Karras et al. 2020, section 3.1).
    play: "alternating", the discriminator first; or "simultaneous", both
      gradients from one forward pass.
    dtype: type of the computation.
  """

  Options = Options

  text: TextConditioner
  resolution: int = 64
  noise_size: int = 100
  text_size: int = 128
  generator_channels: int = 64
  discriminator_channels: int = 64
  interpolation: float = 1.0
  mixing: float = 0.5
  label_smoothing: float = 0.0
  r1_weight: float = 0.0
  r1_every: int = 16
  play: str = "alternating"
  dtype: Any = jnp.float32

  def __post_init__(self):
    if self.resolution < 4 * SIDE or not math.log2(self.resolution).is_integer():
      raise UserError(f"model.resolution={self.resolution}: use a power of two from {4 * SIDE} up")
    if self.play not in ("alternating", "simultaneous"):
      raise unknown("model.play", self.play, ("alternating", "simultaneous"))
    if not 0.0 <= self.label_smoothing < 1.0:
      raise UserError(f"model.label_smoothing={self.label_smoothing} is not in [0, 1)")
    check_positive(
      "model", self, "noise_size", "text_size", "generator_channels", "discriminator_channels",
      "r1_every",
    )  # fmt: skip

  @cached_property
  def generator(self) -> Generator:
    return Generator(self.resolution, self.generator_channels, self.text_size, self.dtype)

  @cached_property
  def discriminator(self) -> Discriminator:
    return Discriminator(self.resolution, self.discriminator_channels, self.text_size, self.dtype)

  @property
  def players(self) -> tuple[Player, ...]:
    trained = (*self.text.groups, DISCRIMINATOR)
    return (
      Player(DISCRIMINATOR, trained, self.discriminator_loss, couples_examples="approximate"),
      Player(GENERATOR, (GENERATOR,), self.generator_loss, couples_examples="approximate"),
    )

  @property
  def simultaneous(self) -> bool:
    return self.play == "simultaneous"

  @property
  def ema_groups(self) -> tuple[str, ...]:
    return (*self.text.groups, GENERATOR)

  @property
  def frozen_groups(self) -> tuple[str, ...]:
    return self.text.frozen_groups

  def batch_spec(self) -> dict[str, Field]:
    image = Field((self.resolution, self.resolution, 3), "uint8")
    return {"image": image, **self.text.batch_spec()}

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    text = self.text.init(fold_name(rng, "text_encoder"), batch, frozen)
    sentence = self._sentence(trees.merge(text, frozen), batch)
    image = normalize_images(batch["image"])
    noise = jnp.zeros((len(image), self.noise_size))
    init = lambda name, network, *args: trees.as_group(  # noqa: E731
      name, network.init(fold_name(rng, name), *args, train=True)
    )
    return trees.merge(
      text,
      init(GENERATOR, self.generator, noise, sentence),
      init(DISCRIMINATOR, self.discriminator, image, sentence),
    )

  def discriminator_loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """Algorithm 1, line 8: real pairs against mismatching and generated ones."""
    sentence = self._sentence(variables, batch)
    fake, _ = self._generate(variables, sentence, rng)
    logits, stats = self._triplet(variables, batch, jax.lax.stop_gradient(fake), sentence, rng)
    loss, metrics = self._discriminator_terms(batch, logits, rng)
    loss, metrics = self._with_penalty(variables, batch, sentence, step, loss, metrics)
    return loss, Aux(metrics, stats)

  def generator_loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """Line 10, not saturating (Goodfellow et al. 2014, section 3), and equation 5."""
    sentence = self._sentence(variables, batch)
    fake, stats = self._generate(variables, sentence, rng)
    logits, _ = self._judge(variables, fake, sentence)
    loss, metrics = self._generator_terms(variables, logits, sentence, rng)
    return loss, Aux(metrics, stats)

  def joint_losses(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """Both losses on the same generated pictures and the same logits of them."""
    sentence = self._sentence(variables, batch)
    fake, generator_stats = self._generate(variables, sentence, rng)
    logits, stats = self._triplet(variables, batch, fake, sentence, rng)
    d_loss, d_metrics = self._discriminator_terms(batch, logits, rng)
    d_loss, d_metrics = self._with_penalty(variables, batch, sentence, step, d_loss, d_metrics)
    g_loss, g_metrics = self._generator_terms(variables, logits["fake"], sentence, rng)
    metrics = {f"{DISCRIMINATOR}/{k}": v for k, v in d_metrics.items()}
    metrics |= {f"{GENERATOR}/{k}": v for k, v in g_metrics.items()}
    losses = {DISCRIMINATOR: d_loss, GENERATOR: g_loss}
    return losses, Aux(metrics, trees.merge(stats, generator_stats))

  def evaluation_loss(self, variables: Variables, batch: Batch, rng: Array) -> dict[str, Array]:
    """The discriminator's terms and the generator's loss [B], with running averages.

    A row whose mismatching caption happens to be its own gets the others' mean
    there, which leaves the average over the batch as it should be.
    """
    sentence = self._sentence(variables, batch)
    fake, _ = self._generate(variables, sentence, rng, train=False)
    logits, _ = self._triplet(variables, batch, fake, sentence, rng, train=False)
    mismatch, differs = _bce(logits["mismatch"], 0.0), self._differs(batch, rng)
    return {
      "real": _bce(logits["real"], 1.0),
      "mismatch": jnp.where(differs, mismatch, _mean(mismatch, differs)),
      "fake": _bce(logits["fake"], 0.0),
      "generator": _bce(logits["fake"], 1.0),
    }

  def condition(self, variables: Variables, batch: Batch) -> Conditioning:
    return self.text(variables, batch)

  def sample(
    self, variables: Variables, conditioning: Conditioning, keys: Array, options: Options
  ) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1], with batch norm's running averages."""
    noise = options.temperature * jax.vmap(self._noise)(keys)
    return self.generator.apply(
      trees.group(variables, GENERATOR), noise, conditioning.pooled, train=False
    )

  def _sentence(self, variables: Variables, batch: Batch) -> Array:
    """The captions' vectors [B, P]."""
    pooled = self.text(variables, batch).pooled
    if pooled is None:
      raise UserError("gan_cls needs one vector a caption; this text encoder gives none")
    return pooled

  def _noise(self, key: Array) -> Array:
    return jax.random.normal(key, (self.noise_size,))

  def _generate(self, variables, sentence, rng, train=True):
    """Pictures [B, H, W, 3], and the statistics that training changed.

    The text is constant here: its encoder learns from the discriminator alone.
    """
    noise = jax.vmap(self._noise)(jax.random.split(fold_name(rng, "noise"), len(sentence)))
    sentence = jax.lax.stop_gradient(sentence)
    return _apply(variables, GENERATOR, self.generator, noise, sentence, train=train)

  def _judge(self, variables, fake, sentence):
    return _apply(variables, DISCRIMINATOR, self.discriminator, fake, sentence, train=True)

  def _triplet(self, variables, batch, fake, sentence, rng, train=True):
    """Logits [B] of {real, match}, {real, mismatch} and {fake, match}, and statistics."""
    real, roll = normalize_images(batch["image"]), _roll(rng, "mismatch", len(sentence))

    def judge(network: Discriminator, real, fake, sentence):
      # Real and generated pictures keep batch statistics of their own.
      seen, text = network.features(real, train), network.project(sentence, train)
      return {
        "real": network.judge(seen, text),
        "mismatch": network.judge(seen, jnp.roll(text, roll, axis=0)),
        "fake": network.judge(network.features(fake, train), text),
      }

    return _apply(
      variables, DISCRIMINATOR, self.discriminator, real, fake, sentence, train=train, method=judge
    )

  def _discriminator_terms(self, batch: Batch, logits: dict[str, Array], rng: Array):
    differs = self._differs(batch, rng)
    real = jnp.mean(_bce(logits["real"], 1.0 - self.label_smoothing))
    mismatch = _mean(_bce(logits["mismatch"], 0.0), differs)
    fake = jnp.mean(_bce(logits["fake"], 0.0))
    metrics = {"real": real, "mismatch": mismatch, "fake": fake}
    return real + 0.5 * (mismatch + fake), metrics

  def _generator_terms(self, variables, logits: Array, sentence: Array, rng: Array):
    fooled = jnp.mean(_bce(logits, 1.0))
    if not self.interpolation:
      return fooled, {"fake": fooled}
    other = jnp.roll(sentence, _roll(rng, "interpolation", len(sentence)), axis=0)
    between = self.mixing * sentence + (1.0 - self.mixing) * other
    fake, _ = self._generate(variables, between, rng)
    logits, _ = self._judge(variables, fake, between)
    interpolated = jnp.mean(_bce(logits, 1.0))
    metrics = {"fake": fooled, "interpolated": interpolated}
    return fooled + self.interpolation * interpolated, metrics

  def _with_penalty(self, variables, batch, sentence, step, loss, metrics):
    """Adds the lazy gradient penalty on {real, match}.

    It takes the running averages: with statistics of the batch, a picture's
    gradient would be of the others' scores too.
    """
    if not self.r1_weight:
      return loss, metrics

    def penalty(own, image, sentence):
      def score(image):
        return jnp.sum(self.discriminator.apply(own, image, sentence, train=False))

      squares = jnp.sum(jnp.square(jax.grad(score)(image)), axis=(1, 2, 3))
      return 0.5 * self.r1_weight * jnp.mean(squares)

    image = normalize_images(batch["image"])
    r1 = self.r1_every * every(
      self.r1_every, step % self.r1_every == 0, penalty, lambda *_: jnp.float32(0.0),
      trees.group(variables, DISCRIMINATOR), image, sentence,
    )
    return loss + r1, {**metrics, "r1": r1}

  def _differs(self, batch: Batch, rng: Array) -> Array:
    """bool [B], whether the caption rolled to each row is another than its own."""
    leaves = jax.tree.leaves(batch["text_embedding" if "text_embedding" in batch else "text"])
    roll = _roll(rng, "mismatch", len(leaves[0]))
    changed = [x != jnp.roll(x, roll, axis=0) for x in leaves]
    return jnp.any(jnp.stack([jnp.any(c.reshape(len(c), -1), axis=1) for c in changed]), axis=0)


def _apply(variables, name, network, *args, train: bool, method=None):
  """A network's output, and its new statistics when it trains."""
  kwargs = {"train": train} if method is None else {"method": method}
  own = trees.group(variables, name)
  if not train:
    return network.apply(own, *args, **kwargs), {}
  output, stats = network.apply(own, *args, mutable=["batch_stats"], **kwargs)
  return output, trees.as_group(name, stats)


def _roll(rng: Array, name: str, rows: int) -> Array:
  """By how many rows to roll a batch, so that no row keeps its place."""
  return jax.random.randint(fold_name(rng, name), (), 1, max(rows, 2))


def _bce(logits: Array, target: float) -> Array:
  return optax.sigmoid_binary_cross_entropy(logits, jnp.full_like(logits, target))


def _mean(values: Array, kept: Array) -> Array:
  """The mean of the values that are kept; zero where none is."""
  return jnp.sum(values * kept) / jnp.maximum(jnp.sum(kept), 1)
