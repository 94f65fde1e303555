"""Keys of random draws: by the name of a draw, and by a picture's index."""

import zlib

import jax

Array = jax.Array


def fold_name(rng: Array, name: str) -> Array:
  """A key for the draw called `name`; the same name gives the same draw."""
  return jax.random.fold_in(rng, zlib.crc32(name.encode()))


def picture_keys(seed: Array | int, indices: Array) -> Array:
  """Key i of a sampling call, `fold_in(seed, picture index)`: keys [B].

  A picture thus depends on its seed and index, not on the batch around it.
  """
  base = jax.random.key(seed)
  return jax.vmap(lambda i: jax.random.fold_in(base, i))(indices)
