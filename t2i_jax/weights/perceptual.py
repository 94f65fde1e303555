"""Key maps of LPIPS's two public files: torchvision's VGG16, and the weights of its channels."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError
from t2i_jax.networks.vgg import VGG16
from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.rules import Layout, Rule, conv
from t2i_jax.weights.stored import open_weights

VGG16_FILE, WEIGHTS_FILE = "vgg16-397923af.pth", "vgg.pth"
# Each file, and where it is published.
FILES = {
  VGG16_FILE: "https://download.pytorch.org/models/vgg16-397923af.pth (torchvision's VGG16)",
  WEIGHTS_FILE: "lpips/weights/v0.1/vgg.pth of https://github.com/richzhang/PerceptualSimilarity",
}

# A 1x1 convolution to one channel there, a vector here.
_channels = Layout(lambda x: x.reshape(-1), lambda x: x.reshape(1, -1, 1, 1))
CHANNEL_WEIGHTS = KeyMap([Rule("block_{i}", "lin{i}.model.1.weight", _channels)])


def vgg16_map(blocks: Sequence[tuple[int, int]]) -> KeyMap:
  """Names of torchvision's VGG16, whose layers are counted with ReLUs and pooling among them.

  Args:
    blocks: of the network, (channels, convolutions) pairs.
  """
  rules, index = [], 0
  for i, (_, convolutions) in enumerate(blocks):
    for j in range(convolutions):
      ours, theirs = f"conv_{i}_{j}", f"features.{index}"
      rules += [Rule(f"{ours}/kernel", f"{theirs}.weight", conv),
                Rule(f"{ours}/bias", f"{theirs}.bias")]
      index += 2
    index += 1
  return KeyMap(rules, [r"^classifier\."])


def load_lpips(folder: str | os.PathLike) -> tuple[tuple[tuple[int, int], ...], dict[str, Any]]:
  """The network's blocks, and its parameters and the channels' weights: {"vgg", "weights"}.

  Args:
    folder: holds `FILES` under their own names.

  Raises:
    UserError: one of them is missing, with where it is published, or holds something else.
  """
  folder = Path(folder).expanduser()
  tensors = {}
  for name, where in FILES.items():
    if not (folder / name).is_file():
      raise UserError(f"no {name} in '{folder}'; it is published as {where}, and nothing is "
                      "downloaded: put it there")
    tensors[name] = open_weights(folder / name)
  network, channels = tensors.values()
  blocks = _blocks_of({name: tensor.shape for name, tensor in network.items()})
  if not blocks:
    raise UserError(f"{folder / VGG16_FILE} does not hold VGG16: none of its names is that of a "
                    "layer, such as features.0.weight; take another copy of it")
  abstract = jax.eval_shape(VGG16(blocks).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
  vgg = vgg16_map(blocks).load(network, abstract["params"], source=str(folder / VGG16_FILE))
  wanted = {
    f"block_{i}": jax.ShapeDtypeStruct((width,), "float32") for i, (width, _) in enumerate(blocks)
  }
  weights = CHANNEL_WEIGHTS.load(channels, wanted, source=str(folder / WEIGHTS_FILE))
  if min(float(weight.min()) for weight in weights.values()) < 0:
    raise UserError(f"{folder / WEIGHTS_FILE} holds negative weights, which LPIPS has not; take "
                    "another copy of it")
  return blocks, {"vgg": vgg, "weights": weights}


def _blocks_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[int, int], ...]:
  """(channels, convolutions) of each block, by the numbers of the layers in torchvision's names."""
  layers = sorted(
    (int(name.split(".")[1]), shape[0]) for name, shape in shapes.items()
    if name.startswith("features.") and name.endswith(".weight")
  )  # fmt: skip
  blocks: list[tuple[int, int]] = []
  last = -3
  for index, channels in layers:
    # A ReLU lies between two convolutions of a block, pooling besides between blocks.
    if index - last == 2:
      blocks[-1] = (channels, blocks[-1][1] + 1)
    else:
      blocks.append((channels, 1))
    last = index
  return tuple(blocks)
