"""Checks of the values of a config's section that several systems make."""

from typing import Any

from t2i_jax.errors import UserError


def check_positive(section: str, values: Any, *names: str) -> None:
  """Raises UserError where one of these attributes, a number or numbers, is not at least 1."""
  for name in names:
    value = getattr(values, name)
    if value == () or min(value if isinstance(value, tuple) else (value,)) < 1:
      raise UserError(f"{section}.{name}={value}: use 1 or more")


def check_levels(values: Any, always: tuple[int, ...] = (), positions: bool = False) -> None:
  """Raises UserError unless levels divide into groups, and those that attend into heads.

  Args:
    values: with `channels`, `multipliers`, `groups` and `attention_levels`; of attention with
      several heads also `heads`, their number, or, without it or where it is 0, `head_channels`.
    always: levels that attend besides.
    positions: whether attention has two-dimensional positions, which come in fours.
  """
  for multiplier in values.multipliers:
    if values.channels * multiplier % values.groups:
      raise UserError(
        f"model.groups={values.groups} does not divide the {values.channels * multiplier} channels "
        "of a level; change one of them"
      )
  for level in values.attention_levels:
    if not 0 <= level < len(values.multipliers):
      raise UserError(
        f"model.attention_levels={values.attention_levels} names level {level}, "
        f"of levels 0 to {len(values.multipliers) - 1}"
      )
  for level in {*values.attention_levels, *always}:
    width = int(values.channels * values.multipliers[level])
    name = "heads" if getattr(values, "heads", 0) else "head_channels"
    parts = getattr(values, name, 1)
    if width % (parts if name == "heads" else min(parts, width)) or (positions and width % 4):
      raise UserError(
        f"the {width} channels of level {level} attend, and do not divide by "
        f"model.{name}={parts}{' or, for positions, by 4' * positions}; change one of them"
      )
