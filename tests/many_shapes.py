"""Trains on pictures of any shape, and compiles at once: one convolution that takes noise away.

Loaded as a config it makes the system known: `--config=tests/many_shapes.py:size=tiny`.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax import recipe, systems
from t2i_jax.config import choose, parse_arg
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Aux, Field, Player
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.trees import NO_VARIABLES

SIDE = 16
SIZES = {"tiny": dict(width=2)}


def get_config(arg=None):
  arg = parse_arg(arg, size="tiny", dataset="folder")
  systems.SYSTEMS["many_shapes"] = "many_shapes:ManyShapes"
  config = recipe.base("many_shapes", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.text.encoder = "none"
  recipe.tiny(config)
  return config


@dataclasses.dataclass(frozen=True, eq=False)
class ManyShapes(base.System):
  text: TextConditioner
  width: int = 2
  dtype: Any = jnp.float32
  resolution = SIDE
  ema_groups = ("denoiser",)

  @property
  def network(self):
    return nn.Conv(3, (3, 3))

  @property
  def players(self):
    return (Player("denoiser", self.ema_groups, self.loss),)

  def batch_spec(self):
    return {"image": Field((SIDE, SIDE, 3), "uint8")}

  def shape_of(self, height, width):
    return height, width, 3

  def init(self, rng, batch, frozen=NO_VARIABLES):
    made = self.network.init(rng, normalize_images(batch["image"]))
    return trees.as_group("denoiser", made)

  def loss(self, variables, batch, rng, step):
    return jnp.mean(self.evaluation_loss(variables, batch, rng)["error"]), Aux()

  def evaluation_loss(self, variables, batch, rng):
    image = normalize_images(batch["image"])
    noisy = image + jax.random.normal(rng, image.shape)
    made = self.network.apply(trees.group(variables, "denoiser"), noisy)
    return {"error": jnp.mean((made - image) ** 2, axis=(1, 2, 3))}
