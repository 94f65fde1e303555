"""A first stage, and a system that models its latents, for tests that train one in a second.

Loaded as a config it makes both known: `--config=tests/two_stage.py:size=tiny`.
"""

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from toy import Dense

from t2i_jax import config as configs
from t2i_jax import export, recipe, systems
from t2i_jax.config import choose, parse_arg
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Aux, Field, Player
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES
from t2i_jax.text.tokenizer import Tokenizers

FACTOR = 4
SIZES = {"tiny": dict(width=32)}


def get_config(arg=None):
  arg = parse_arg(arg, size="tiny", dataset="scenes")
  systems.SYSTEMS.update(latents="two_stage:Latents", shrinker="two_stage:Shrinker")
  config = recipe.base("latents", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.text.update(width=16, layers=1, heads=2, length=40, vocab_size=300)
  config.train.update(duration="6 steps", batch_size=16)
  config.optimizer.update(learning_rate=1e-2)
  config.checkpoint.every = "2 steps"
  config.log.every = "1 steps"
  config.sample.update(every="3 steps", count=4)
  return config


@dataclasses.dataclass(frozen=True, eq=False)
class Shrinker(base.System):
  """Every fourth pixel, times a gain; the variance is the same everywhere.

  The arithmetic is exact for gains that are powers of two, so that moments do not depend on the
  program that computes them.
  """

  text: TextConditioner
  resolution: int = 16
  dtype: Any = jnp.float32
  players = ()
  ema_groups = ("shrinker",)
  reads_text = False
  scale, shift = 0.0, 0.0

  def batch_spec(self):
    return {"image": Field((self.resolution, self.resolution, 3), "uint8")}

  def init(self, rng, batch, frozen=NO_VARIABLES):
    return {"params": {"shrinker": {"gain": jnp.ones(()), "log_variance": jnp.zeros(())}}}

  def encode(self, variables, images):
    own = variables["params"]["shrinker"]
    mean = own["gain"] * images[:, ::FACTOR, ::FACTOR]
    return jnp.concatenate([mean, jnp.full_like(mean, own["log_variance"])], axis=-1)

  def decode(self, variables, latents):
    small = latents / variables["params"]["shrinker"]["gain"]
    return jnp.repeat(jnp.repeat(small, FACTOR, axis=1), FACTOR, axis=2)

  def latent_shape(self, resolution):
    return resolution // FACTOR, resolution // FACTOR, 3


def make(path, gain=2.0, log_variance=-2.0):
  """Exports a first stage."""
  systems.SYSTEMS["shrinker"] = "two_stage:Shrinker"
  config = recipe.base("shrinker", "scenes")
  own = {"gain": np.float32(gain), "log_variance": np.float32(log_variance)}
  config = configs.from_json(configs.to_json(config))
  return export.write(path, config, 1, {"params": {"shrinker": own}}, Tokenizers({}))


@struct.dataclass
class Options:
  temperature: float = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Latents(base.System):
  """Regresses latents on the text and a noise."""

  Options = Options

  text: TextConditioner
  resolution: int = 16
  width: int = 32
  components: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  cached_latent: Field | None = None
  latent_statistics: tuple[float, float] | None = None
  dtype: Any = jnp.float32

  @property
  def first_stage(self):
    return self.components["first_stage"]

  @cached_property
  def shape(self):
    return self.first_stage.latent_shape(self.resolution)

  @cached_property
  def drawer(self):
    return Dense(self.width, int(np.prod(self.shape)))

  @property
  def players(self):
    return (Player("drawer", (*self.text.groups, "drawer"), self.loss),)

  @property
  def ema_groups(self):
    return (*self.text.groups, "drawer")

  @property
  def frozen_groups(self):
    return (*self.text.frozen_groups, *self.components)

  def batch_spec(self):
    if self.cached_latent is not None:
      return {"latent": self.cached_latent, **self.text.batch_spec()}
    image = Field((self.resolution, self.resolution, 3), "uint8")
    return {"image": image, **self.text.batch_spec()}

  def init(self, rng, batch, frozen=NO_VARIABLES):
    text = self.text.init(fold_name(rng, "text_encoder"), batch, frozen)
    pooled = self.text(trees.merge(text, frozen), batch).pooled
    noise = jnp.zeros((len(pooled), 8))
    drawer = self.drawer.init(
      fold_name(rng, "drawer"), jnp.concatenate([noise, pooled], axis=1)
    )
    return trees.merge(text, trees.as_group("drawer", drawer))

  def loss(self, variables, batch, rng, step):
    return jnp.mean(self._errors(variables, batch, rng, rng)), Aux()

  def evaluation_loss(self, variables, batch, rng):
    return {"error": self._errors(variables, batch, rng, None)}

  def condition(self, variables, batch):
    return self.text(variables, batch)

  def sample(self, variables, conditioning, keys, options):
    noise = options.temperature * jax.vmap(lambda key: jax.random.normal(key, (8,)))(keys)
    return self._draw(variables, noise, conditioning.pooled)

  def finish(self, variables, drawn):
    return self.first_stage.decode(trees.group(variables, "first_stage"), drawn)

  def _errors(self, variables, batch, rng, text_rng):
    if "latent" in batch:
      moments = batch["latent"].astype(jnp.float32)
    else:
      images = normalize_images(batch["image"])
      moments = self.first_stage.encode(trees.group(variables, "first_stage"), images)
    # Rounded moments are what both ways of getting them begin with.
    mean, log_variance = jnp.split(jax.lax.optimization_barrier(moments), 2, axis=-1)
    noise = jax.random.normal(fold_name(rng, "posterior"), mean.shape)
    latents = mean + jnp.exp(0.5 * log_variance) * noise
    pooled = self.text(variables, batch, text_rng).pooled
    noise = jax.random.normal(rng, (len(pooled), 8))
    return jnp.mean((self._draw(variables, noise, pooled) - latents) ** 2, axis=(1, 2, 3))

  def _draw(self, variables, noise, pooled):
    given = jnp.concatenate([noise, pooled], axis=1)
    flat = self.drawer.apply(trees.group(variables, "drawer"), given)
    return flat.reshape(len(flat), *self.shape)
