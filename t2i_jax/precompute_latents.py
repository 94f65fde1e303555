"""What a frozen first stage makes of a data set's pictures, computed once: `precompute latents`."""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from t2i_jax import assembly, caches, data, run_data
from t2i_jax.caches import FIRST_STAGE
from t2i_jax.data.base import FileSource, Source
from t2i_jax.data.images import BadImage
from t2i_jax.data.latent_cache import LatentCache, Writer, about, check_folder
from t2i_jax.errors import UserError
from t2i_jax.parallel.compiler_flags import compiler_options
from t2i_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh, replicated
from t2i_jax.parallel.sharding import parse_rules, place, put, shardings
from t2i_jax.systems import trees
from t2i_jax.systems.capabilities import FirstStage, require
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.training.writers import say

# uint8 pictures to their moments, float32 [n, variants, h, w, 2c], which may not be there yet.
Encode = Callable[[np.ndarray], jax.Array]


def write_latents(
  config: ConfigDict, output: str, splits: tuple[str, ...] = (), dtype: str = "float16",
  shard_size: int = 1024, batch_size: int = 64, rows: int | None = None, flips: bool = False,
) -> None:
  """Writes the cache, or what is missing of it; arguments as the command's.

  Raises:
    UserError: for whatever the user can mend.
  """
  resolution = config.model.get("resolution")
  if resolution is None:
    raise UserError(f"system {config.system} has no model.resolution, so it reads no pictures")
  config = caches.to_compute(config, (FIRST_STAGE,))
  chosen = caches.chosen_splits(config, splits)
  trained = run_data.training_split(config)
  if flips and trained not in chosen:
    raise UserError(f"--flips is of the training split '{trained}', which --split leaves out")
  check_folder(output, data.splits(config.data.name))
  given, sources = config.data, {}
  for split in chosen:
    sources[split] = data.open_source(
      given.name, split, resolution, config.seed, given.options.to_dict()
    )
    if sources[split].buckets is not None:
      raise UserError(f"latents are of squares; leave data.options.{data.BUCKETS} out")
    if isinstance(sources[split], FileSource) and sources[split].varies:
      raise UserError(f"data set '{given.name}' shows another part of a picture each time, and "
                      "latents are of one; set data.options.crop=centre (and captions=each)")
  counts = _counts(given.name, sources, rows)
  components = assembly.load_components(config)
  first_stage = components.systems[FIRST_STAGE]
  require(first_stage, FirstStage, f"components.{FIRST_STAGE}")
  stamp = {
    "fingerprint": components.about[FIRST_STAGE]["fingerprint"],
    "frozen": config.precision.frozen, "compute": jnp.dtype(first_stage.dtype).name,
  }  # fmt: skip
  # Every host encodes by itself, with its own devices: none waits for another.
  mesh = make_mesh({"fsdp": -1}, jax.local_devices())
  for split, source in sources.items():
    variants = 2 if flips and split == trained else 1
    encode, size, shape = _encoder(config, components, mesh, batch_size, resolution, variants)
    stored = about(source, given.name, given.options.to_dict(), split, config.seed, counts[split])
    writer = Writer(output, stored, stamp, shape, dtype, variants, shard_size,
                    jax.process_index(), jax.process_count())
    encoded = _write_split(writer, source, encode, size, f"{output}/{split}")
    writer.close()
    if jax.process_index() == 0:
      _report(output, split, encoded)
  if jax.process_index() == 0:
    print(f"train on them with --config.data.latents={output}")


def _counts(name: str, sources: dict[str, Source], rows: int | None) -> dict[str, int]:
  """How many rows of each split are stored."""
  endless = [split for split, source in sources.items() if source.infinite]
  if endless and rows is None:
    raise UserError(f"split '{endless[0]}' of data set '{name}' is made on the fly and has no end; "
                    "say with --rows=N how many of its first rows to store")
  if rows is not None and not endless:
    raise UserError(f"--rows={rows}: all rows of split '{next(iter(sources))}' of data set "
                    f"'{name}' are stored; leave it out")
  return {split: rows if split in endless else len(source) for split, source in sources.items()}


def _write_split(writer: Writer, source: Source, encode: Encode, size: int, where: str) -> int:
  """Writes what this host has to of a split; returns the number of pictures."""
  from tqdm import tqdm

  layout, missing = writer.layout, writer.missing()
  total = sum(len(layout.rows_of(shard)) for shard in missing)
  say(f"{layout.rows} pictures of {layout.bytes_a_row / 2**10:.3g} KiB, "
      f"{layout.rows * layout.bytes_a_row / 2**30:.3g} GiB in all, in {where}; {total} are left to "
      "encode here. Stopped, the same command goes on.")
  with tqdm(total=total, unit="picture", mininterval=1 if sys.stderr.isatty() else 30) as bar:
    for shard in missing:
      rows = np.asarray(layout.rows_of(shard))
      writer.write(shard, *_encoded(source, rows, encode, size, bar.update))
  while jax.process_count() > 1 and writer.missing(of_all=True):
    time.sleep(5)  # A process that ends takes the others with it.
  if jax.process_index() == 0:
    writer.finish()
  while not writer.is_finished():
    time.sleep(1)
  return total


def _report(output: str, split: str, encoded: int) -> None:
  cache = LatentCache(output, split)
  without = cache.data["rows"] - len(cache.rows)
  mean, std = (cache.statistics[name] for name in ("mean", "std"))
  print(f"{split}: {len(cache.rows)} pictures in {output}, {encoded} encoded now"
        + f"{f', {without} more that cannot be read' if without else ''}; their latents have mean "
        f"{mean:.4g} and standard deviation {std:.4g}")


def _encoder(
  config: ConfigDict, components: assembly.Components, mesh: Any, batch_size: int, resolution: int,
  variants: int,
) -> tuple[Encode, int, tuple[int, int, int]]:
  """What encodes a batch of pictures, how many it takes, and the shape of a picture's moments."""
  first_stage = components.systems[FIRST_STAGE]
  rules = parse_rules(config.sharding.rules)
  params = place(components.variables, shardings(components.variables, rules, mesh))
  shards = batch_shards(mesh)
  size = -(-batch_size // shards) * shards

  def moments(variables, images):
    own, images = trees.group(variables, FIRST_STAGE), normalize_images(images)
    pictures = (images, images[:, :, ::-1])[:variants]
    found = jnp.stack([first_stage.encode(own, picture) for picture in pictures], axis=1)
    return found.astype(jnp.float32)

  compiled = jax.jit(
    moments, out_shardings=replicated(mesh),
    compiler_options=compiler_options(mesh.devices.flat[0].platform),
  )

  def encode(images: np.ndarray) -> jax.Array:
    filled = np.zeros((size, *images.shape[1:]), np.uint8)
    filled[: len(images)] = images
    with jax.set_mesh(mesh):
      return compiled(params, put(filled, batch_sharding(mesh)))

  given = jax.ShapeDtypeStruct((size, resolution, resolution, 3), np.uint8)
  shape = jax.eval_shape(moments, params, given).shape[2:]
  return encode, size, shape


def _encoded(
  source: Source, rows: np.ndarray, encode: Encode, size: int, progress: Callable[[int], Any]
) -> tuple[np.ndarray, np.ndarray]:
  """Moments [n, variants, h, w, 2c] of rows, and which of them could be read."""
  found, readable = [], []
  for start in range(0, len(rows), size):
    images, good = _pictures(source, rows[start : start + size])
    found.append(encode(images))
    readable.append(good)
    if len(found) > 1:  # read while the devices are at the next
      found[-2] = jax.device_get(found[-2])
    progress(len(images))
  found[-1] = jax.device_get(found[-1])
  return np.concatenate(found)[: len(rows)], np.concatenate(readable)


def _pictures(source: Source, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """uint8 [n, R, R, 3] of rows, and which could be read; zeros stand for the others."""
  if not isinstance(source, FileSource):
    return source.fetch(rows, np.zeros(len(rows), np.uint64)).image, np.ones(len(rows), bool)
  images = np.zeros((len(rows), source.resolution, source.resolution, 3), np.uint8)

  def decode(n: int) -> bool:
    try:
      images[n] = source.image(int(rows[n]))
    except BadImage:
      return False
    return True

  with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
    return images, np.array(list(pool.map(decode, range(len(rows)))))
