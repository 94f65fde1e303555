"""A system that a test can train in a second, with every part that a real one may have.

Dense networks on pictures of 16x16 shrunk to 4x4; two players, of which the first rests at every
other step, a collection with statistics of the batch, a text encoder, a sampler and an evaluation
loss. Loaded as a config it makes the system known: `--config=tests/toy.py:size=tiny`.
"""

import dataclasses
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from t2i_jax import recipe, systems
from t2i_jax.config import choose, parse_arg
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Aux, Field, Player
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES

SIDE = 16
SIZES = {"tiny": dict(width=32)}
# Splits the wide kernels over every axis that a mesh may have.
RULES = (("hidden/kernel", "tensor(-1)+fsdp"), ("out/kernel", "tensor(0)+fsdp"), (".*", "fsdp"))


def get_config(arg=None):
  arg = parse_arg(arg, size="tiny", dataset="scenes")
  systems.SYSTEMS["toy"] = "toy:Toy"
  config = recipe.base("toy", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.text.update(width=16, layers=1, heads=2, length=40, vocab_size=300)
  config.train.update(duration="6 steps", batch_size=16)
  config.optimizer.update(learning_rate=1e-2, schedule="cosine", warmup="2 steps")
  config.checkpoint.every = "2 steps"
  config.log.every = "1 steps"
  config.sample.update(every="3 steps", count=4)
  config.evaluate.update(every="3 steps", batches=2)
  config.sharding.rules = RULES
  return config


class Dense(nn.Module):
  """[B, n] -> [B, outputs]."""

  width: int
  outputs: int

  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.outputs, name="out")(nn.tanh(nn.Dense(self.width, name="hidden")(x)))


class Critic(nn.Module):
  """[B, n] -> [B], with a running mean of what it sees."""

  width: int

  @nn.compact
  def __call__(self, x, train: bool):
    mean = self.variable("stats", "mean", jnp.zeros, x.shape[-1])
    if train and not self.is_initializing():
      mean.value = 0.9 * mean.value + 0.1 * jnp.mean(x, axis=0)
    return Dense(self.width, 1, name="net")(x - mean.value)[:, 0]


@struct.dataclass
class Options:
  temperature: float = 1.0
  mode: str = struct.field(pytree_node=False, default="plain")


@dataclasses.dataclass(frozen=True, eq=False)
class Toy(base.System):
  """A least-squares GAN whose generator is also told the picture."""

  Options = Options

  text: TextConditioner
  width: int = 32
  dtype: Any = jnp.float32

  @cached_property
  def drawer(self):
    return Dense(self.width, SIDE * SIDE * 3)

  @cached_property
  def critic(self):
    return Critic(self.width)

  @property
  def players(self):
    return (
      Player("critic", ("critic",), self.critic_loss, start=1, every=2,
             couples_examples="approximate"),
      Player("drawer", (*self.text.groups, "drawer"), self.drawer_loss),
    )

  @property
  def ema_groups(self):
    return (*self.text.groups, "drawer")

  @property
  def frozen_groups(self):
    return self.text.frozen_groups

  def batch_spec(self):
    return {"image": Field((SIDE, SIDE, 3), "uint8"), **self.text.batch_spec()}

  def init(self, rng, batch, frozen=NO_VARIABLES):
    text = self.text.init(fold_name(rng, "text_encoder"), batch, frozen)
    pooled = self.text(trees.merge(text, frozen), batch).pooled
    drawer = self.drawer.init(fold_name(rng, "drawer"), _with_noise(rng, pooled))
    critic = self.critic.init(
      fold_name(rng, "critic"), _features(normalize_images(batch["image"]), pooled), True
    )
    return trees.merge(text, trees.as_group("drawer", drawer), trees.as_group("critic", critic))

  def critic_loss(self, variables, batch, rng, step):
    image, pooled, drawn = self._drawn(variables, batch, rng)
    real, _ = self._judge(variables, image, pooled)
    fake, stats = self._judge(variables, drawn, pooled)
    return jnp.mean((real - 1) ** 2 + fake**2), Aux({"real": jnp.mean(real)}, stats)

  def drawer_loss(self, variables, batch, rng, step):
    image, pooled, drawn = self._drawn(variables, batch, rng)
    fake, _ = self._judge(variables, drawn, pooled)
    return jnp.mean((fake - 1) ** 2) + jnp.mean((drawn - image) ** 2), Aux()

  def evaluation_loss(self, variables, batch, rng):
    image, _, drawn = self._drawn(variables, batch, rng, train=False)
    return {"error": jnp.mean((drawn - image) ** 2, axis=(1, 2, 3))}

  def condition(self, variables, batch):
    return self.text(variables, batch)

  def sample(self, variables, conditioning, keys, options):
    if options.mode != "plain":
      raise base.UserError(f"mode={options.mode} cannot be drawn")
    noise = options.temperature * jax.vmap(lambda key: jax.random.normal(key, (8,)))(keys)
    return self._draw(variables, jnp.concatenate([noise, conditioning.pooled], axis=1))

  def _drawn(self, variables, batch, rng, train=True):
    pooled = self.text(variables, batch, rng if train else None).pooled
    drawn = self._draw(variables, _with_noise(rng, pooled))
    return normalize_images(batch["image"]), pooled, drawn

  def _draw(self, variables, x):
    flat = self.drawer.apply(trees.group(variables, "drawer"), x)
    return nn.tanh(flat).reshape(len(x), SIDE, SIDE, 3)

  def _judge(self, variables, image, pooled):
    own = trees.group(variables, "critic")
    score, stats = self.critic.apply(own, _features(image, pooled), True, mutable=["stats"])
    return score, trees.as_group("critic", stats)


def _with_noise(rng, pooled):
  return jnp.concatenate([jax.random.normal(rng, (len(pooled), 8)), pooled], axis=1)


def _features(image, pooled):
  """Pictures as 4x4, beside the text."""
  small = image.reshape(len(image), 4, SIDE // 4, 4, SIDE // 4, 3).mean((2, 4))
  return jnp.concatenate([small.reshape(len(image), -1), pooled], axis=1)
