"""The batches that a system reads: as shapes, and whether a data set gives them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from t2i_jax import bucketing
from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.base import Field, System


def resolution_of(system: System) -> int:
  """Side of the pictures that a system trains on, or whose latents it does."""
  image = system.batch_spec().get("image")
  return system.resolution if image is None else image.shape[0]


def abstract_batch(system: System, rows: int) -> dict[str, Any]:
  """A batch of what the system reads, as shapes."""
  return trees.unflatten({
    name: jax.ShapeDtypeStruct((rows, *field.shape), field.dtype)
    for name, field in system.batch_spec().items()
  })


def check_batch_spec(system: System, batch: Mapping[str, Any], where: str,
                     shapes: Sequence[tuple[int, int]] = ()) -> None:
  """Raises UserError unless the batch has what the system reads.

  Args:
    system: whose `batch_spec` is asked for.
    batch: arrays with leading batch axis.
    where: the data set's name, for the message.
    shapes: (height, width) of the pictures of batches, where they have several.
  """
  given = {
    name: Field(tuple(leaf.shape[1:]), str(leaf.dtype))
    for name, leaf in trees.flatten(batch).items()
  }
  spec = system.batch_spec()
  if shapes:
    bucketing.check(system, shapes)
    spec["image"] = Field((*batch["image"].shape[1:3], 3), "uint8")
  for name, field in spec.items():
    if name not in given:
      raise UserError(
        f"{type(system).__name__} needs '{name}' in its batches, which the data set '{where}' does "
        f"not give; it gives {', '.join(sorted(given))}"
      )
    if given[name] != field:
      raise UserError(f"{type(system).__name__} needs '{name}' as {field.dtype}{list(field.shape)},"
                      f" the data set '{where}' gives {given[name].dtype}{list(given[name].shape)}")
