"""The first stage of latent diffusion: an autoencoder with a weak divergence from a Gaussian.

Rombach et al. 2022, section 3.1 and appendix G, after Esser et al. 2021, section
3.1: reconstruction, perceptual distance, a divergence of so little weight that it
only keeps the latents near zero, and a discriminator of patches that joins late.
The latents are no prior to draw from: another system models them.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError, unknown
from t2i_jax.networks.autoencoder import LAST, Decoder, Encoder, last_layer
from t2i_jax.networks.patch_discriminator import PatchDiscriminator
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Aux, Batch, Field, Player
from t2i_jax.systems.capabilities import Perceptual, require
from t2i_jax.systems.checks import check_levels, check_positive
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables
from t2i_jax.systems.vae.adversarial import GAMES, adaptive_weight
from t2i_jax.systems.vae.distributions import Gaussian
from t2i_jax.weights.perceptual import FILES

ENCODER, DECODER, DISCRIMINATOR = "encoder", "decoder", "discriminator"
AUTOENCODER, LIKELIHOOD, PERCEPTUAL = "autoencoder", "likelihood", "perceptual"
ERRORS = {"l1": jnp.abs, "l2": jnp.square}
# Bounds of the log-variances.
LOWEST, HIGHEST = -30.0, 20.0
_PEAK = 2.0  # of pictures in [-1, 1], for the signal-to-noise ratio


@dataclasses.dataclass(frozen=True, eq=False)
class KLAutoencoder(base.System):
  """See the module's docstring.

  Attributes:
    text: of the config; nothing of it is used.
    resolution: side of the pictures that it is trained on.
    latent_channels, channels, multipliers, blocks, attention_levels, middle_attention,
      pointwise, groups, remat: of the networks, see `networks.autoencoder.Level`.
    scale, shift: published latents z are (z - shift) * scale where another system models
      them; a scale of 0 is to be measured.
    error: of the reconstruction, "l1" or "l2".
    perceptual_weight: of the perceptual distance, which counts at every value of a picture,
      as in the published code; 0 for none, and then no component is needed.
    kl_weight: of the divergence, in nats a picture.
    log_variance: of the likelihood: the error is divided by its exponential, and it is added.
    learn_log_variance: whether it is trained; it is where it starts then.
    adversarial: "hinge" or "vanilla".
    adversarial_weight: factor of the adaptive weight; 0 for no discriminator.
    adversarial_start: the step at which the discriminator begins to move and to count.
    discriminator_channels, discriminator_layers: of the discriminator.
    components: `perceptual`, whose name the metrics bear.
    dtype: type of the computation.
  """

  text: TextConditioner
  resolution: int = 256
  latent_channels: int = 4
  channels: int = 128
  multipliers: tuple[int, ...] = (1, 2, 4, 4)
  blocks: int = 2
  attention_levels: tuple[int, ...] = ()
  middle_attention: bool = True
  pointwise: bool = True
  groups: int = 32
  remat: bool = False
  scale: float = 0.0
  shift: float = 0.0
  error: str = "l1"
  perceptual_weight: float = 1.0
  kl_weight: float = 1e-6
  log_variance: float = 0.0
  learn_log_variance: bool = False
  adversarial: str = "hinge"
  adversarial_weight: float = 0.5
  adversarial_start: int = 50001
  discriminator_channels: int = 64
  discriminator_layers: int = 3
  components: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  dtype: Any = jnp.float32

  reads_text = False
  ema_groups = (ENCODER, DECODER)

  def __post_init__(self):
    check_positive(
      "model", self, "resolution", "latent_channels", "channels", "multipliers", "blocks",
      "groups", "discriminator_channels", "discriminator_layers",
    )  # fmt: skip
    for name, valid in (("error", ERRORS), ("adversarial", GAMES)):
      if getattr(self, name) not in valid:
        raise unknown(f"model.{name}", getattr(self, name), valid)
    for name in (
      "scale", "perceptual_weight", "kl_weight", "adversarial_weight", "adversarial_start"
    ):  # fmt: skip
      if getattr(self, name) < 0:
        raise UserError(f"model.{name}={getattr(self, name)} is negative; use 0 or more")
    check_levels(self)
    self.latent_shape(self.resolution)
    self._check_patches()
    self._check_components()

  def _check_patches(self):
    least = 3 * 2**self.discriminator_layers
    if self.adversarial_weight and self.resolution < least:
      raise UserError(f"model.resolution={self.resolution} is too small for a discriminator of "
                      f"{self.discriminator_layers} layers, which takes {least} pixels or more; "
                      "lower model.discriminator_layers")

  def _check_components(self):
    for name in self.components:
      if name != PERCEPTUAL:
        raise unknown("component of kl_autoencoder", name, (PERCEPTUAL,))
    if self.components:
      require(self.perceptual, Perceptual, f"components.{PERCEPTUAL}")
    elif self.perceptual_weight:
      files = " and ".join(f"{name} (published as {where})" for name, where in FILES.items())
      raise UserError(
        f"kl_autoencoder learns by LPIPS and has no components.{PERCEPTUAL}=PATH: put {files} into "
        "one FOLDER, and make the export with python -m t2i_jax.convert --source=FOLDER "
        "--output=PATH; where there are no such files, the export of configs/feature_net.py stands "
        "in, and what it gives is called feature_net; or set model.perceptual_weight=0"
      )

  @property
  def perceptual(self) -> Any:
    """The network of the perceptual distance, or None."""
    return self.components.get(PERCEPTUAL)

  @property
  def _networks(self) -> dict[str, Any]:
    return dict(
      latent_channels=self.latent_channels, channels=self.channels, multipliers=self.multipliers,
      blocks=self.blocks, attention_levels=self.attention_levels,
      middle_attention=self.middle_attention, pointwise=self.pointwise, groups=self.groups,
      remat=self.remat, dtype=self.dtype,
    )  # fmt: skip

  @cached_property
  def encoder(self) -> Encoder:
    return Encoder(**self._networks)

  @cached_property
  def decoder(self) -> Decoder:
    return Decoder(**self._networks)

  @cached_property
  def discriminator(self) -> PatchDiscriminator:
    return PatchDiscriminator(self.discriminator_channels, self.discriminator_layers, self.dtype)

  @property
  def players(self) -> tuple[Player, ...]:
    trained = (ENCODER, DECODER, *(LIKELIHOOD,) * self.learn_log_variance)
    autoencoder = Player(
      AUTOENCODER, trained, self.autoencoder_loss,
      couples_examples="approximate" if self.adversarial_weight else "no",
      custom_gradients=self.autoencoder_gradients,
    )  # fmt: skip
    if not self.adversarial_weight:
      return (autoencoder,)
    # First, while the autoencoder is as it was: both then see the same reconstructions.
    return (
      Player(
        DISCRIMINATOR, (DISCRIMINATOR,), self.discriminator_loss, start=self.adversarial_start,
        couples_examples="approximate", shares_forward=True,
      ),
      autoencoder,
    )

  @property
  def frozen_groups(self) -> tuple[str, ...]:
    return tuple(self.components)

  def batch_spec(self) -> dict[str, Field]:
    return {"image": Field((self.resolution, self.resolution, 3), "uint8")}

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    image = jnp.zeros((1, self.resolution, self.resolution, 3))
    latents = jnp.zeros((1, *self.latent_shape(self.resolution)))
    init = lambda name, network, *args: trees.as_group(  # noqa: E731
      name, network.init(fold_name(rng, name), *args)
    )
    parts = [init(ENCODER, self.encoder, image), init(DECODER, self.decoder, latents)]
    if self.learn_log_variance:
      log_variance = jnp.float32(self.log_variance)
      parts.append({"params": {LIKELIHOOD: {"log_variance": log_variance}}})
    if self.adversarial_weight:
      parts.append(init(DISCRIMINATOR, self.discriminator, image, True))
    return trees.merge(*parts)

  def latent_shape(self, resolution: int) -> tuple[int, int, int]:
    """(h, w, c) of the latents of square pictures; UserError for a side that does not divide."""
    factor = 2 ** (len(self.multipliers) - 1)
    if resolution % factor:
      raise UserError(f"pictures of {resolution} pixels do not divide by {factor} (2 for each of "
                      "the autoencoder's levels but the first); use another resolution")
    return resolution // factor, resolution // factor, self.latent_channels

  def encode(self, variables: Variables, images: Array) -> Array:
    """[B, H, W, 3] in [-1, 1] -> moments [B, h, w, 2c]: mean, then log-variance in [-30, 20]."""
    moments = self.encoder.apply(trees.group(variables, ENCODER), images)
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return jnp.concatenate([mean, jnp.clip(log_variance, LOWEST, HIGHEST)], axis=-1)

  def decode(self, variables: Variables, latents: Array) -> Array:
    """Latents [B, h, w, c], neither shifted nor scaled -> pictures [B, H, W, 3], about [-1, 1]."""
    return self.decoder.apply(trees.group(variables, DECODER), latents)

  def autoencoder_gradients(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """The gradients of all its losses by group, the adversarial one's as strong as it should be.

    The losses are told apart at the reconstruction: there each has its own
    derivative, of which the last layer's gradients are had cheaply; what is below
    is gone through once, with their weighted sum.
    """
    image = normalize_images(batch["image"])
    params = variables["params"]

    def up_to_last(trained):
      features, divergence = self._features(trees.with_params(variables, trained), image, rng)
      return features, jnp.mean(divergence)

    trained = {name: params[name] for name in (ENCODER, DECODER)}
    (features, divergence), pull_back = jax.vjp(up_to_last, trained)
    picture, pull_last = jax.vjp(_picture, params[DECODER][LAST], features)

    def unlikelihood(picture, log_variance):
      return self._unlikelihood(variables, image, picture, log_variance)

    log_variance = self._log_variance(variables)
    (cost, metrics), (slope, log_variance_slope) = jax.value_and_grad(
      unlikelihood, (0, 1), has_aux=True
    )(picture, log_variance)
    loss = cost + self.kl_weight * divergence
    metrics = {**metrics, "kl": divergence, "log_variance": log_variance}
    if self.adversarial_weight:
      fooled, fooling = jax.value_and_grad(lambda y: self._fooled(variables, y))(picture)
      weight = adaptive_weight(pull_last(slope)[0]["kernel"], pull_last(fooling)[0]["kernel"])
      weight = self.adversarial_weight * weight * (step >= self.adversarial_start)
      slope = slope + weight * fooling
      loss = loss + weight * fooled
      metrics |= {"fooled": fooled, "adversarial_weight": weight}
    last, features_slope = pull_last(slope)
    (gradients,) = pull_back((features_slope, jnp.float32(self.kl_weight)))
    gradients = {**gradients, DECODER: {**gradients[DECODER], LAST: last}}
    if self.learn_log_variance:
      gradients[LIKELIHOOD] = {"log_variance": log_variance_slope}
    return gradients, Aux({"loss": loss, **metrics})

  def autoencoder_loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """The scalar that `autoencoder_gradients` reports; it does not derive the adaptive weight."""
    _, aux = self.autoencoder_gradients(variables, batch, rng, step)
    return aux.metrics["loss"], aux

  def discriminator_loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """Of pictures against their reconstructions, each with its own batch statistics."""
    image = normalize_images(batch["image"])
    features, _ = self._features(variables, image, rng)
    fake = jax.lax.stop_gradient(_picture(variables["params"][DECODER][LAST], features))
    real_logits, stats = self._judge(variables, image)
    fake_logits, stats = self._judge(trees.merge(variables, stats), fake)
    loss = GAMES[self.adversarial].discriminate(real_logits, fake_logits)
    return loss, Aux({"real": jnp.mean(real_logits), "fake": jnp.mean(fake_logits)}, stats)

  def evaluation_loss(self, variables: Variables, batch: Batch, rng: Array) -> dict[str, Array]:
    """Of the reconstructions from the mean latents [B]; the divergence in nats a picture.

    The peak signal-to-noise ratio is in decibels, of each picture by itself.
    """
    image = normalize_images(batch["image"])
    posterior = _gaussian(self.encode(variables, image))
    picture = jnp.clip(self.decode(variables, posterior.mean), -1.0, 1.0)
    square = jnp.mean(jnp.square(picture - image), axis=(1, 2, 3))
    scores = {
      "error": jnp.mean(ERRORS[self.error](picture - image), axis=(1, 2, 3)),
      "psnr": 10.0 * jnp.log10(_PEAK**2 / jnp.maximum(square, 1e-10)),
      "kl": _divergence(posterior),
    }
    if self.perceptual:
      scores[self.perceptual.name] = self._distance(variables, image, picture)
    return scores

  def _features(self, variables: Variables, image: Array, rng: Array) -> tuple[Array, Array]:
    """What the last layer sees of pictures whose latents are drawn, and their divergence [B]."""
    posterior = _gaussian(self.encode(variables, image))
    noise = jax.random.normal(fold_name(rng, "latent"), posterior.mean.shape)
    latents = posterior.sample(noise)
    features = self.decoder.apply(trees.group(variables, DECODER), latents, features=True)
    return features, _divergence(posterior)

  def _unlikelihood(self, variables: Variables, image: Array, picture: Array, log_variance: Array):
    """The negative log-likelihood of the pictures, summed over one and averaged over all."""
    error = jnp.mean(ERRORS[self.error](picture - image))
    total, metrics = error, {"error": error}
    if self.perceptual:
      distance = jnp.mean(self._distance(variables, image, picture))
      total, metrics = total + self.perceptual_weight * distance, {
        **metrics, self.perceptual.name: distance
      }
    values = image[0].size
    return values * (total * jnp.exp(-log_variance) + log_variance), metrics

  def _distance(self, variables: Variables, a: Array, b: Array) -> Array:
    return self.perceptual.distance(trees.group(variables, PERCEPTUAL), a, b)

  def _log_variance(self, variables: Variables) -> Array:
    if self.learn_log_variance:
      return variables["params"][LIKELIHOOD]["log_variance"]
    return jnp.float32(self.log_variance)

  def _judge(self, variables: Variables, image: Array) -> tuple[Array, dict[str, Any]]:
    """Logits of each patch by the batch's own statistics, and the new running ones."""
    logits, stats = self.discriminator.apply(
      trees.group(variables, DISCRIMINATOR), image, True, mutable=["batch_stats"]
    )
    return logits, trees.as_group(DISCRIMINATOR, stats)

  def _fooled(self, variables: Variables, picture: Array) -> Array:
    logits, _ = self._judge(variables, picture)
    return GAMES[self.adversarial].fool(logits)


def _picture(last: Mapping[str, Any], features: Array) -> Array:
  return last_layer().apply({"params": last}, features)


def _gaussian(moments: Array) -> Gaussian:
  return Gaussian(*jnp.split(moments, 2, axis=-1))


def _divergence(posterior: Gaussian) -> Array:
  """KL from the standard normal distribution, summed over a picture's latents, [B]."""
  zeros = jnp.zeros_like(posterior.mean)
  return jnp.sum(posterior.kl(Gaussian(zeros, zeros)), axis=(1, 2, 3))
