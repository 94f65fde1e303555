"""The U-Net of a system, from the options that the system's fields are."""

import dataclasses
from typing import Any

from t2i_jax.errors import UserError, unknown
from t2i_jax.networks.unet import ATTENTIONS, UNet
from t2i_jax.systems.checks import check_levels, check_positive


def make_unet(values: Any, out_channels: int, classes: int = 0) -> UNet:
  """The U-Net of the options that `values` has as attributes, with that many labels."""
  given = {"parent", "name", "out_channels", "classes"}
  names = {field.name for field in dataclasses.fields(UNet)} - given
  own = {name: getattr(values, name) for name in names if hasattr(values, name)}
  return UNet(out_channels=out_channels, classes=classes, **own)


def check_network(values: Any) -> None:
  """Raises UserError for U-Net options that make no network."""
  check_positive("model", values, "channels", "blocks", "groups", "middle_depth")
  if not values.multipliers or min(values.multipliers) <= 0:
    raise UserError(f"model.multipliers={values.multipliers}: give a positive one for each level")
  if values.heads < 0 or (not values.heads and values.head_channels < 1):
    raise UserError(f"model.heads={values.heads} and model.head_channels={values.head_channels} "
                    "make no attention; set one of them to 1 or more")
  if values.attention not in ATTENTIONS:
    raise unknown("model.attention", values.attention, ATTENTIONS)
  if values.depths and len(values.depths) != len(values.multipliers):
    raise UserError(f"model.depths={values.depths} has {len(values.depths)} entries, "
                    f"model.multipliers {len(values.multipliers)}; give one a level")
  # The middle, which is as wide as the last level, always attends.
  always, positions = (len(values.multipliers) - 1,), values.attention == "compact"
  check_levels(values, always, positions and values.positions)
  if not 0.0 <= values.dropout < 1.0:
    raise UserError(f"model.dropout={values.dropout} is out of range; use 0 to below 1")
