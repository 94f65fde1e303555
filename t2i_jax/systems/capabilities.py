"""What systems can do beside training: protocols, of which each has those that make sense.

That one is absent is a clear error where it is needed; see `require`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import UserError, unknown
from t2i_jax.systems.base import Array, Batch, Conditioning, System
from t2i_jax.systems.pictures import normalize_images, quantize_images
from t2i_jax.systems.trees import Variables


@runtime_checkable
class Sampler(Protocol):
  """A system that draws pictures."""

  Options: ClassVar[type]

  def condition(self, variables: Variables, batch: Batch) -> Conditioning:
    """Encodes `batch["text"]`; a program of its own, null included."""

  def sample(
    self, variables: Variables, conditioning: Conditioning, keys: Array, options: Any
  ) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1], or a `Finisher`'s latents; one key [B] a picture."""


@runtime_checkable
class Editor(Protocol):
  """A sampler that can begin with a picture.

  `condition` then reads of the batch the `image`, uint8 [B, H, W, 3], and, where some of it is to
  stay, `known`, bool [B, H, W, 1]; and its options have `strength`, `height` and `width`.
  """

  def encoded(self, variables: Variables, images: Array) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1] as what is sampled."""


@runtime_checkable
class ManyShapes(Protocol):
  """A system whose pictures need not be squares: data sets may have buckets, drawings a size."""

  def shape_of(self, height: int, width: int) -> tuple[int, int, int]:
    """Of what is modelled of such a picture, (h, w, c); UserError for one that it does not take."""


@runtime_checkable
class Finisher(Protocol):
  """A sampler whose `sample` gives latents, not yet pictures.

  A second program makes pictures of them, so that only one of the two needs the first stage, which
  may be off the devices until then.
  """

  def finish(self, variables: Variables, drawn: Array) -> Array:
    """Pictures [B, H, W, 3] in [-1, 1] of what `sample` gave, [B, ...]."""


@runtime_checkable
class FirstStage(Protocol):
  """An autoencoder whose latents another system models.

  Attributes:
    scale, shift: published latents z are (z - shift) * scale where they are modelled; a scale of 0
      is not given, and is measured.
  """

  scale: float
  shift: float

  def encode(self, variables: Variables, images: Array) -> Array:
    """[B, H, W, 3] in [-1, 1] -> moments [B, h, w, 2c]: mean, then log-variance in [-30, 20]."""

  def decode(self, variables: Variables, latents: Array) -> Array:
    """Latents [B, h, w, c], neither shifted nor scaled -> pictures [B, H, W, 3], about [-1, 1]."""

  def latent_shape(self, resolution: int) -> tuple[int, int, int]:
    """(h, w, c) of square pictures; UserError for a side that does not divide."""


@runtime_checkable
class Perceptual(Protocol):
  """A trained network in whose features pictures are compared.

  Attributes:
    name: how every loss and score that uses it is called, such as "lpips".
  """

  name: str

  def distance(self, variables: Variables, a: Array, b: Array) -> Array:
    """Of pictures [B, H, W, 3] in [-1, 1], [B]; 0 for equal ones."""


@runtime_checkable
class TextEncoder(Protocol):
  """A system that turns token ids into conditioning."""

  def encode(self, variables: Variables, text: Mapping[str, Array]) -> Conditioning:
    """Of `ids` and `mask` [B, L]."""

  def null_text(self) -> Mapping[str, Any]:
    """`ids` and `mask` [L] of the empty caption; L is what the encoder takes."""


@runtime_checkable
class Guide(Protocol):
  """A system whose log-probability steers another's sampler.

  Attributes:
    process: of the noised pictures that it was trained on; the other's is to be the same.
  """

  process: Any

  def read(self, variables: Variables, batch: Batch) -> dict[str, Array]:
    """What it needs of prompts, for `Conditioning.extra`.

    `batch` has their `label`, as far as they have `labels`, of guides that read text `ids` and
    `mask` by the guide's own tokenizer as `text`, and what `PictureGuide.references` gave.
    """

  def log_prob(
    self, variables: Variables, x_t: Array, t: Array, conditioning: Conditioning
  ) -> Array:
    """Of noised pictures [B, ...] at times [B] of the process, [B]; the times may be fractional."""


@runtime_checkable
class PictureGuide(Protocol):
  """A guide that steers towards a picture too.

  Attributes:
    resolution: side of the picture in pixels.
  """

  resolution: int

  def references(
    self, image: np.ndarray | None, weights: Mapping[str, float]
  ) -> dict[str, np.ndarray]:
    """For the batch that `Guide.read` is given, with one row.

    Args:
      image: uint8 [H, W, 3], to be like, if any.
      weights: of kinds of likeness, by name; the guide's own for those that are not there.

    Raises:
      UserError: for a picture of another size, or weights that it does not have or cannot use.
    """


@runtime_checkable
class Evaluated(Protocol):
  """A system with a loss to report on held-out batches."""

  def evaluation_loss(
    self, variables: Variables, batch: Batch, rng: Array
  ) -> dict[str, Array]:
    """Per-example metrics [B], which the caller averages over valid rows."""


def reconstruct(
  first_stage: FirstStage, variables: Variables, images: Array
) -> tuple[Array, Array]:
  """Pictures, uint8 [B, H, W, 3], decoded from their mean latents, as uint8; and their moments."""
  moments = first_stage.encode(variables, normalize_images(images))
  mean, _ = jnp.split(moments, 2, axis=-1)
  return quantize_images(first_stage.decode(variables, mean)), moments


def require(system: System, capability: type, what: str) -> None:
  """Raises UserError unless `system` has the capability that `what` needs."""
  if not isinstance(system, capability):
    raise UserError(
      f"{what} needs a system with {capability.__name__}; {type(system).__name__} has none"
    )


def make_options(system: type[System] | System, overrides: Mapping[str, Any]) -> Any:
  """The system's sampling options with `overrides`.

  Raises:
    UserError: for an option that the system does not have.
  """
  if system.Options is None:
    name = system.__name__ if isinstance(system, type) else type(system).__name__
    raise UserError(f"{name} draws no pictures, so it takes no sampling options")
  valid = {field.name for field in dataclasses.fields(system.Options)}
  for name in overrides:
    if name not in valid:
      raise unknown("sampling option", name, valid)
    value = overrides[name]
    if isinstance(value, float) and not abs(value) <= float(jnp.finfo(jnp.float32).max):
      raise UserError(f"sampling option {name}={value} is no number that a device can hold")
  return system.Options(**overrides)
