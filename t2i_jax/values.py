"""Values of a config and of options, read from the text that a command line gives."""

import ast
import math
from typing import Any

from t2i_jax.errors import UserError


def typed(what: str, text: str, old: Any) -> Any:
  """`text` as a value of `old`'s type; None takes any literal."""
  if isinstance(old, str):
    return text
  if isinstance(old, tuple):
    return _typed_tuple(what, text, old)
  value = literal(text)
  if isinstance(old, bool):
    if isinstance(value, bool):
      return value
  elif isinstance(old, float):
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
      return float(value)
  elif isinstance(old, int):
    if isinstance(value, int) and not isinstance(value, bool):
      return value
  elif old is None:
    return value
  raise UserError(f"{what}={text}: expected {type(old).__name__}, such as {old!r}")


def literal(text: str) -> Any:
  """The Python literal that `text` spells, else `text` itself."""
  try:
    return ast.literal_eval(text)
  except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
    return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _typed_tuple(what: str, text: str, old: tuple) -> tuple:
  """`1,2`, `a, b`, `'one, with a comma'` or any literal, with elements like `old`'s."""
  value = literal(text)
  if isinstance(value, list | tuple):
    parts = list(value)
  elif isinstance(value, str) and value != text:  # it was quoted
    parts = [value]
  else:
    parts = [part.strip() for part in text.split(",") if part.strip()]
  nested = any(isinstance(part, list | tuple) for part in parts)
  if nested or (old and isinstance(old[0], tuple)):
    return as_tuples(parts)
  return tuple(typed(what, str(part), old[0] if old else "") for part in parts)


def as_tuples(value: Any) -> Any:
  """A value with its lists as tuples, nested ones too."""
  if isinstance(value, list):
    return tuple(as_tuples(v) for v in value)
  if isinstance(value, dict):
    return {k: as_tuples(v) for k, v in value.items()}
  return value
