"""Rules: which tensor of a public checkpoint is which parameter of ours, said for both directions.

A rule pairs two templates, `Rule("layers_{i}/attention/query/kernel",
"encoder.layers.{i}.self_attn.q_proj.weight", linear)`: a name in braces stands for the same text
on both sides.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the other side lays out the numbers of one of our arrays.

  Attributes:
    theirs, ours: each from the other side's array to this side's; views where possible.
  """

  ours: Callable[[np.ndarray], np.ndarray]
  theirs: Callable[[np.ndarray], np.ndarray]


same = Layout(lambda x: x, lambda x: x)
# PyTorch's Linear has [out, in], Flax's Dense [in, out].
linear = Layout(lambda x: x.T, lambda x: x.T)
# PyTorch's convolutions have [out, in, (height,) width], Flax's [(height,) width, in, out].
conv = Layout(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
conv_1d = Layout(lambda x: x.transpose(2, 1, 0), lambda x: x.transpose(2, 1, 0))
# A convolution of size 1 there, of two axes or of one, and a Dense here.
pointwise = Layout(lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None])
pointwise_1d = Layout(lambda x: x[:, :, 0].T, lambda x: x.T[:, :, None])


@dataclasses.dataclass(frozen=True)
class Rule:
  """One array of ours, or one for each value of its braces.

  Attributes:
    ours: template of a path in our tree, "/" between its parts.
    theirs: template of the other side's name.
    layout: how the numbers lie.
    part: (index, number) where theirs holds several of ours one behind the other along its first
      axis, such as the fused projections of an attention.
    runs: equal stretches of that axis of which each holds all the parts so, such as the heads of an
      attention.
    plus: template of another of their names, whose numbers are added; written as zeros.
  """

  ours: str
  theirs: str
  layout: Layout = same
  part: tuple[int, int] = (0, 1)
  plus: str = ""
  runs: int = 1


def dense(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
  """Of a Dense and a Linear."""
  rules = [Rule(f"{ours}/kernel", f"{theirs}.weight", linear)]
  return rules + [Rule(f"{ours}/bias", f"{theirs}.bias")] * bias


def norm(ours: str, theirs: str, bias: bool = True) -> list[Rule]:
  """Of a norm with a scale and, unless told, a bias."""
  rules = [Rule(f"{ours}/scale", f"{theirs}.weight")]
  return rules + [Rule(f"{ours}/bias", f"{theirs}.bias")] * bias


def convolution(ours: str, theirs: str, layout: Layout = conv) -> list[Rule]:
  """Of a convolution and its bias; `pointwise` where ours is a Dense."""
  kernel = Rule(f"{ours}/kernel", f"{theirs}.weight", layout)
  return [kernel, Rule(f"{ours}/bias", f"{theirs}.bias")]
