"""Which rows of a data set are for testing, where nobody says."""

import hashlib
from collections.abc import Collection


def _hash(name: str) -> int:
  return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def held_out(names: Collection[str], one_in: int) -> set[str]:
  """The test part of distinct `names`: about one in `one_in`, and at least one of that many.

  Each name decides by its hash, so that rows stay where they are when others are
  added.
  """
  chosen = {name for name in names if _hash(name) % one_in == 0}
  if not chosen and len(names) >= one_in:
    chosen = {min(names, key=_hash)}
  return chosen
