"""Durations as a config has them, "10 epochs" or "5%", and in steps."""

import math
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from t2i_jax.errors import UserError

UNITS = ("steps", "epochs", "examples", "%")
MULTIPLES = {"k": 1e3, "M": 1e6, "B": 1e9}


def parse_duration(value: int | float | str, key: str) -> tuple[float, str]:
  """A duration as (amount, unit).

  An integer is steps. A text is a number with an optional k, M or B and a unit:
  "2000 steps", "10 epochs", "1.5M examples", "5%" (of the run).

  Raises:
    UserError: for anything else.
  """
  if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
    return float(value), "steps"
  if isinstance(value, str):
    text = value.strip()
    number, unit = (text[:-1], "%") if text.endswith("%") else (text.split(" ") + [""])[:2]
    number = number.strip()
    factor = MULTIPLES.get(number[-1:], 1.0)
    unit = {"step": "steps", "epoch": "epochs", "example": "examples"}.get(unit, unit)
    try:
      amount = float(number[:-1] if factor != 1.0 else number) * factor
    except ValueError:
      amount = -1.0
    if unit in UNITS and 0 <= amount < math.inf and len(text.split(" ")) <= 2:
      return amount, unit
  raise UserError(
    f"{key}={value!r} is not a duration; write steps as an integer, or "
    "'2000 steps', '10 epochs', '1.5M examples' or '5%'"
  )


def steps_of(
  value: int | str, key: str, batch_size: int, epoch_size: int | None, total: int | None = None
) -> int:
  """A duration in steps, rounded to the nearest, at least 1 unless it is 0.

  Args:
    value, key: the duration and its config key, for messages.
    batch_size: examples a step.
    epoch_size: examples an epoch, None for a data set without end.
    total: steps of the run, for "%".

  Raises:
    UserError: for a unit that has no meaning here.
  """
  amount, unit = parse_duration(value, key)
  if amount == 0:
    return 0
  if unit == "%":
    if total is None:
      raise UserError(f"{key}={value!r}: the run's own length cannot be a percentage")
    if amount > 100:
      raise UserError(f"{key}={value!r} is more than the whole run")
    steps = amount / 100 * total
  elif unit == "epochs":
    if epoch_size is None:
      raise UserError(f"{key}={value!r}: this data set is made on the fly and has no epochs; "
                      "use steps or examples")
    steps = amount * epoch_size / batch_size
  elif unit == "examples":
    steps = amount / batch_size
  else:
    steps = amount
  if steps > 2**31 - 1:
    raise UserError(f"{key}={value!r} is {steps:.3g} steps; a run has at most 2147483647")
  return max(round(steps), 1)


def of_run(config: ConfigDict, epoch_size: int | None) -> Callable[[Any, str], int]:
  """What turns a duration of a run, and its key, into steps; UserError for a run of none."""
  size = config.train.batch_size
  total = steps_of(config.train.duration, "train.duration", size, epoch_size)
  if total == 0:
    raise UserError("train.duration is 0, so there is nothing to train")

  def of(value: Any, key: str) -> int:
    return steps_of(value, key, size, epoch_size, total)

  return of
