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
  word = str(word)
  # A key of another section that ends alike is meant more often than one that is spelt alike.
  is_key = "." in word and "/" not in word
  close = [v for v in valid if is_key and v.rpartition(".")[2] == word.rpartition(".")[2]]
  close = close or difflib.get_close_matches(word, valid, n=1, cutoff=0.6)
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
