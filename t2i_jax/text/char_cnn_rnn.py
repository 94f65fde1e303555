"""The character CNN-RNN of the first text-to-image GANs (Reed et al. 2016, CVPR, section 4.2).

Reed et al. 2016 (ICML), StackGAN and others took captions' vectors from it, frozen.
"""

import dataclasses
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
LENGTH = 201
THRESHOLD = 1e-6


def encode(captions: Sequence[str]) -> dict[str, np.ndarray]:
  """`ids` int32 [n, 201] and `mask` bool [n, 201]: letters are 1 to 70, 0 is behind the caption.

  What the alphabet lacks is a space. The hyphen is in it twice, and the second place is its own.
  """
  number = {letter: i + 1 for i, letter in enumerate(ALPHABET)}
  ids = np.zeros((len(captions), LENGTH), np.int32)
  for row, caption in zip(ids, captions, strict=True):
    letters = caption.lower()[:LENGTH]
    row[: len(letters)] = [number.get(letter, number[" "]) for letter in letters]
  return {"ids": ids, "mask": ids > 0}


@dataclasses.dataclass(frozen=True)
class Config:
  """What differs between the published models.

  Attributes:
    width: of the last convolution and the state.
    gated: a gated recurrent unit, or a plain one with ReLU.
    shorten: whether positions are pooled once more before it.
    outputs: of the caption's vector.
    channels: of the first two convolutions.
  """

  width: int = 512
  gated: bool = False
  shorten: bool = True
  outputs: int = 1024
  channels: tuple[int, int] = (384, 512)


# "cvpr" is of both data sets; the GANs use the others.
MODELS = {
  "cvpr": Config(width=256),
  "flowers": Config(),
  "birds": Config(gated=True, shorten=False),
}


class CharCNNRNN(nn.Module):
  """Convolutions over letters, a recurrence, the mean of its states, a projection.

  The first state has no share of a state before it, not even its bias.

  Attributes:
    config: which model.
    dtype: type of the computation.
  """

  config: Config = Config()
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: Array) -> Array:
    """ids int [B, 201] -> [B, outputs]."""
    config = self.config
    letters = jax.nn.one_hot(ids - 1, len(ALPHABET), dtype=self.dtype)
    x = self._conv(letters, config.channels[0], 1, (3, 3))
    x = self._conv(x, config.channels[1], 2, (3, 3))
    x = self._conv(x, config.width, 3, (3, 2) if config.shorten else None)
    states = self._gated(x) if config.gated else self._plain(x)
    return nn.Dense(config.outputs, dtype=self.dtype, name="projection")(jnp.mean(states, axis=0))

  def _conv(self, x: Array, features: int, i: int, pool: tuple[int, int] | None) -> Array:
    x = nn.Conv(features, (4,), padding="VALID", dtype=self.dtype, name=f"conv_{i}")(x)
    x = jnp.where(x > THRESHOLD, x, 0)
    return nn.max_pool(x, (pool[0],), (pool[1],)) if pool else x

  def _parts(self, x: Array, name: str) -> tuple[Array, Array, Array]:
    """The inputs' share [L, B, W] of a gate, and the matrix and bias of the state's share."""
    width = x.shape[-1]
    given = nn.Dense(width, dtype=self.dtype, name=f"input{name}")(x).swapaxes(0, 1)
    kernel = self.param(f"state{name}_kernel", nn.initializers.orthogonal(), (width, width))
    bias = self.param(f"state{name}_bias", nn.initializers.zeros, (width,))
    return given, kernel.astype(self.dtype), bias.astype(self.dtype)

  def _plain(self, x: Array) -> Array:
    given, kernel, bias = self._parts(x, "")

    def step(state: Array, inputs: Array):
      state = nn.relu(inputs + state @ kernel + bias)
      return state, state

    first = nn.relu(given[0])
    _, states = jax.lax.scan(step, first, given[1:])
    return jnp.concatenate([first[None], states])

  def _gated(self, x: Array) -> Array:
    parts = [self._parts(x, name) for name in ("", "_update", "_reset")]
    given, kernels, biases = zip(*parts, strict=True)

    def step(state: Array, inputs: tuple[Array, ...]):
      candidate, update, reset = inputs
      update = nn.sigmoid(update + state @ kernels[1] + biases[1])
      reset = nn.sigmoid(reset + state @ kernels[2] + biases[2])
      candidate = nn.tanh(candidate + (reset * state) @ kernels[0] + biases[0])
      state = update * candidate + (1 - update) * state
      return state, state

    first = nn.tanh(given[0][0])
    _, states = jax.lax.scan(step, first, tuple(g[1:] for g in given))
    return jnp.concatenate([first[None], states])
