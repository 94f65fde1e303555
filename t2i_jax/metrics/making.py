"""What all metrics are made with: the parts that they share, and the remarks on their results."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from t2i_jax.metrics.network import Features
from t2i_jax.metrics.parts import Collected, Part
from t2i_jax.metrics.reference import Reference

# Pictures, or rows of a subset, below which a result says how few it is of.
MANY = {"is": 50_000, "manifold": 10_000, "cmmd": 1000, "captions": 1000, "subset": 1000,
         "codes": 10}
CLIP_SCORE, CMMD = "clip-vit-b-32@224", "clip-vit-l-14@336"


@dataclasses.dataclass
class Making:
  """What metrics are made of.

  Attributes:
    references: by kind of network.
    seed: of all draws.
    options: of `registry.OPTIONS`.
    parts: what was made so far; what two metrics keep is kept once.
    described: of the networks in use, by kind and preprocessing.
  """

  references: dict[str, Reference]
  seed: int
  options: Mapping[str, int]
  parts: dict[str, Part] = dataclasses.field(default_factory=dict)
  described: dict[str, Any] = dataclasses.field(default_factory=dict)

  def part(self, key: str, make: Callable[[], Part], features: Features | None = None):
    """{key: part} and the part, made unless it is there."""
    if features is not None:
      key = f"{key}-{self.uses(features)}"
    if key not in self.parts:
      self.parts[key] = make()
    return {key: self.parts[key]}, self.parts[key]

  def uses(self, features: Features) -> str:
    """Notes that a network is used; its kind and preprocessing as one word."""
    words = f"{features.network.kind} {features.preprocessing}"
    self.described[words] = features.described()
    return "".join(c if c.isalnum() else "_" for c in words)

  def rows(self, features: Features, output: str = "features"):
    """One output of every picture."""
    return self.part(
      output, lambda: Collected(lambda batch: batch.of(features)[output]), features
    )


def about_of(features: Features | None, **more: Any) -> dict[str, Any]:
  return {**(features.described() if features else {}), **more}


def named(base: str, features: Features) -> str:
  """A result's name: a network that is no published one gives its own in place of its kind."""
  label = features.network.label
  return base.replace("_feature_net", f"_{label}") if label else base


def meant(features: Features, published: str) -> tuple[str, ...]:
  if features.name == published:
    return ()
  return (f"published with {published}; this is {features.name}",)


def few(n: int, many: int, what: str) -> tuple[str, ...]:
  return (f"{what}, and {many} are usual: compare with as few only",) if n < many else ()


def bias(n: int, width: int, whose: str) -> tuple[str, ...]:
  """Of a Gaussian of `width` features fitted to n pictures."""
  if not n or n >= 5 * width:
    return ()
  rank = "; their covariance has not full rank" if n <= width else ""
  return (f"{n} {whose} for {width} features: biased upwards, compare with the same number only"
          f"{rank}",)  # fmt: skip
