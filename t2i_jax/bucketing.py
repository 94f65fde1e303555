"""Training on pictures of several shapes: which systems can, and the batches to compile for."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from t2i_jax.data.buckets import Shape
from t2i_jax.errors import UserError
from t2i_jax.systems import base
from t2i_jax.systems.capabilities import ManyShapes

# Whose networks take any shape that divides; a lora takes those of its base.
SYSTEMS = ("ddpm", "adm", "ldm", "stable_diffusion", "sdxl", "dit", "sd3", "lora")


def check(system: base.System, shapes: Sequence[Shape]) -> None:
  """Raises UserError unless a system trains on pictures of all of these shapes, (height, width)."""
  can = f"systems whose networks take several shapes: {', '.join(SYSTEMS)}"
  if not isinstance(system, ManyShapes):
    raise UserError(f"data.options.buckets: {type(system).__name__} trains on squares alone; leave "
                    f"it out ({can})")
  for shape in shapes:
    try:
      system.shape_of(*shape)
    except UserError as error:
      raise UserError(f"data.options.buckets: {error} ({can})") from None


def of_shapes(
  batch: Mapping[str, Any], shapes: Sequence[tuple[Shape, float]]
) -> list[tuple[Mapping[str, Any], float]]:
  """The batches that training will see, abstract where they are not there, and how often each.

  Args:
    batch: on the devices, with `image` [B, H, W, 3].
    shapes: of the pictures, (height, width), and the share of the batches that have each; empty
      where all have that of `batch`.
  """
  if not shapes:
    return [(batch, 1.0)]
  image = batch["image"]
  return [
    ({**batch, "image": jax.ShapeDtypeStruct(
      (len(image), *shape, 3), image.dtype, sharding=image.sharding
    )}, share)
    for shape, share in shapes
  ]  # fmt: skip
