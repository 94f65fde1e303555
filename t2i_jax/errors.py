"""The one exception that a user is meant to see."""

import difflib
import sys
from collections.abc import Iterable
from typing import NoReturn


class UserError(Exception):
  """Something a user can get wrong: what, where and what to do, in one line.

  Commands print it without a traceback and exit with status 2.
  """


def nearest(word: str, valid: Iterable[str]) -> str:
  """`; did you mean 'x'?` for the valid name closest to `word`, else the list."""
  valid = sorted(str(v) for v in valid)
  close = difflib.get_close_matches(str(word), valid, n=1, cutoff=0.5)
  if close:
    return f"; did you mean '{close[0]}'?"
  return f"; valid: {', '.join(valid)}" if valid else ""


def unknown(kind: str, word: str, valid: Iterable[str]) -> UserError:
  """The error for a name that is not among `valid`."""
  return UserError(f"unknown {kind} '{word}'{nearest(word, valid)}")


def exit_with(error: UserError) -> NoReturn:
  """Prints the error on stderr, in one line whatever it quotes, and exits with status 2."""
  print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
  sys.exit(2)
