"""A variational autoencoder of pictures given text, with a prior given text.

Kingma and Welling 2014 (the bound and its estimator); Sohn, Lee and Yan 2015,
section 4.1 (all of encoder q(z|x,c), prior p(z|c) and decoder p(x|z,c) are
conditional). Free bits: Kingma et al. 2016, appendix C.8. The weight of the
divergence: Higgins et al. 2017; its warm-up: Bowman et al. 2016, section 3.1.
"""

import dataclasses
import math
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from t2i_jax.errors import UserError, unknown
from t2i_jax.networks.conv_vae import Decoder, Encoder, Prior
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Aux, Batch, Conditioning, Field, Player
from t2i_jax.systems.checks import check_levels, check_positive
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables
from t2i_jax.systems.vae.distributions import LIKELIHOODS, Gaussian

ENCODER, PRIOR, DECODER = "encoder", "prior", "decoder"


@struct.dataclass
class Options:
  """Sampling options.

  Attributes:
    temperature: factor of the prior's standard deviation; 0 draws its mean.
  """

  temperature: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class ConditionalVAE(base.System):
  """See the module's docstring.

  Attributes:
    text: turns captions into conditioning: the vector conditions encoder, prior
      and decoder, the decoder also attends to the sequence.
    resolution: side of the pictures, in pixels.
    latent_size: dimensions of z.
    likelihood: "gaussian" or "discretized_logistic", independent for all values.
    scale: of the likelihood, in units of the pictures' [-1, 1]; 0 learns one.
    beta: weight of the divergence; the bound is at 1.
    beta_warmup: steps over which beta grows linearly from 0.
    free_bits: nats a latent dimension below which its divergence costs nothing.
    prior_width, prior_layers: of the prior's MLP.
    channels, multipliers, blocks, groups, patch, coordinates: of the encoder and
      the decoder; attention_levels, head_channels: of the decoder.
    dtype: type of the computation.
  """

  Options = Options

  text: TextConditioner
  resolution: int = 32
  latent_size: int = 32
  likelihood: str = "gaussian"
  scale: float = 0.0
  beta: float = 1.0
  beta_warmup: int = 0
  free_bits: float = 0.0
  prior_width: int = 256
  prior_layers: int = 2
  channels: int = 64
  multipliers: tuple[int, ...] = (1, 2, 2)
  blocks: int = 1
  attention_levels: tuple[int, ...] = (1,)
  head_channels: int = 32
  groups: int = 16
  patch: int = 2
  coordinates: int = 3
  dtype: Any = jnp.float32

  def __post_init__(self):
    check_positive(
      "model", self, "resolution", "latent_size", "prior_width", "channels", "multipliers",
      "blocks", "head_channels", "groups", "patch",
    )  # fmt: skip
    coarsest = self.patch * 2 ** (len(self.multipliers) - 1)
    if self.resolution % coarsest:
      raise UserError(
        f"model.resolution={self.resolution} does not divide by {coarsest} "
        "(model.patch times 2 for each level but the first); change one of them"
      )
    check_levels(self)
    if self.likelihood not in LIKELIHOODS:
      raise unknown("model.likelihood", self.likelihood, LIKELIHOODS)
    for name in ("scale", "beta", "beta_warmup", "free_bits"):
      if getattr(self, name) < 0:
        raise UserError(f"model.{name}={getattr(self, name)} is negative; use 0 or more")

  @cached_property
  def encoder(self) -> Encoder:
    return Encoder(
      self.latent_size, self.channels, self.multipliers, self.blocks, self.groups, self.patch,
      self.coordinates, self.dtype,
    )  # fmt: skip

  @cached_property
  def prior(self) -> Prior:
    return Prior(self.latent_size, self.prior_width, self.prior_layers, self.dtype)

  @cached_property
  def decoder(self) -> Decoder:
    side = self.resolution // self.patch // 2 ** (len(self.multipliers) - 1)
    return Decoder(
      side, self.channels, self.multipliers, self.blocks, self.attention_levels,
      self.head_channels, self.groups, self.patch, self.coordinates, self.scale, self.dtype,
    )  # fmt: skip

  @property
  def players(self) -> tuple[Player, ...]:
    coupled = "approximate" if self.free_bits else "no"
    return (Player("vae", self.ema_groups, self.loss, couples_examples=coupled),)

  @property
  def ema_groups(self) -> tuple[str, ...]:
    return (*self.text.groups, ENCODER, PRIOR, DECODER)

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
    given = self._given(trees.merge(text, frozen), batch)
    image = normalize_images(batch["image"])
    latent = jnp.zeros((len(image), self.latent_size))
    init = lambda name, network, *args: trees.as_group(  # noqa: E731
      name, network.init(fold_name(rng, name), *args)
    )
    return trees.merge(
      text,
      init(ENCODER, self.encoder, image, given.pooled),
      init(PRIOR, self.prior, given.pooled),
      init(DECODER, self.decoder, latent, given.pooled, given.sequence, given.mask),
    )

  def loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """The negative bound in bits a dimension of the picture, its divergence times beta.

    The log-likelihood is summed over the picture and the divergence over the
    latent, both averaged over the batch; the sum is then divided by a constant.
    """
    log_likelihood, divergence, log_scale = self._bound(variables, batch, rng)
    beta = jnp.float32(self.beta)
    if self.beta_warmup:
      beta = beta * jnp.minimum(step / self.beta_warmup, 1.0)
    a_dimension = jnp.mean(divergence, axis=0)
    cost = jnp.sum(jnp.maximum(a_dimension, self.free_bits))
    kl = jnp.sum(a_dimension)
    error = -jnp.mean(log_likelihood)
    metrics = {
      "bits_per_dim": self._bits(error + kl),
      "reconstruction": self._bits(error),
      "kl": kl,
      "scale": jnp.exp(log_scale),
      "beta": beta,
    }
    return self._bits(error + beta * cost), Aux(metrics)

  def evaluation_loss(self, variables: Variables, batch: Batch, rng: Array) -> dict[str, Array]:
    """The bound (beta 1) and its parts [B], from one draw of the posterior each.

    `bits_per_dim` and `reconstruction` are in bits a dimension, `kl` is in nats
    a picture. For the Gaussian, which is a density, a bit counts per bin of the
    8-bit values.
    """
    log_likelihood, divergence, _ = self._bound(variables, batch, rng)
    kl = jnp.sum(divergence, axis=-1)
    return {
      "bits_per_dim": self._bits(kl - log_likelihood),
      "reconstruction": self._bits(-log_likelihood),
      "kl": kl,
    }

  def condition(self, variables: Variables, batch: Batch) -> Conditioning:
    return self._given(variables, batch)

  def sample(
    self, variables: Variables, conditioning: Conditioning, keys: Array, options: Options
  ) -> Array:
    """The decoder's means [B, H, W, 3] in [-1, 1] at latents drawn from the text's prior."""
    noise = jax.vmap(lambda key: jax.random.normal(key, (self.latent_size,)))(keys)
    latent = self._prior(variables, conditioning).sample(noise, options.temperature)
    mean, _ = self._decode(variables, latent, conditioning)
    return jnp.clip(mean, -1.0, 1.0)

  def _bound(self, variables: Variables, batch: Batch, rng: Array):
    """log p(x|z,c) [B] and KL(q||p) [B, Z], in nats, and the likelihood's log-scale."""
    given = self._given(variables, batch)
    image = normalize_images(batch["image"])
    posterior = Gaussian(
      *self.encoder.apply(trees.group(variables, ENCODER), image, given.pooled)
    )
    noise = jax.random.normal(fold_name(rng, "latent"), posterior.mean.shape)
    mean, log_scale = self._decode(variables, posterior.sample(noise), given)
    log_likelihood = LIKELIHOODS[self.likelihood](image, mean, log_scale)
    divergence = posterior.kl(self._prior(variables, given))
    return jnp.sum(log_likelihood, axis=(1, 2, 3)), divergence, log_scale

  def _given(self, variables: Variables, batch: Batch) -> Conditioning:
    given = self.text(variables, batch)
    if given.pooled is None:
      raise UserError("conditional_vae needs one vector a caption; this text encoder gives none")
    return given

  def _prior(self, variables: Variables, given: Conditioning) -> Gaussian:
    return Gaussian(*self.prior.apply(trees.group(variables, PRIOR), given.pooled))

  def _decode(self, variables: Variables, latent: Array, given: Conditioning):
    return self.decoder.apply(
      trees.group(variables, DECODER), latent, given.pooled, given.sequence, given.mask
    )

  def _bits(self, nats: Array) -> Array:
    """Nats a picture to bits a dimension of the picture."""
    return nats / (3 * self.resolution**2 * math.log(2.0))
