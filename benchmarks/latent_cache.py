"""Rows a second from a latent cache, against drawing the pictures and encoding them.

  python benchmarks/latent_cache.py
  python benchmarks/latent_cache.py --rows=200000 --pictures=0   # more than the page cache holds

Moments of 256-px pictures, 32 x 32 x 8, as random numbers in a cache of their own: batches of
random rows as they are stored; the same through the loader, with captions and their tokens; and,
on the other side, pictures of the scenes through the loader, and the published first stage's
encoder with random weights.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import assembly, command, config_files, data
from t2i_jax.data.latent_cache import LatentCache, LatentSource, Writer, about
from t2i_jax.data.loader import Loader
from t2i_jax.data.shards import DTYPES
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.text.tokenizer import train_tokenizer

RESOLUTION, SHAPE = 256, (32, 32, 8)


def run():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=8192, help="of the cache")
  parser.add_argument("--shard-size", type=int, default=1024)
  parser.add_argument("--batch-size", type=int, default=256)
  parser.add_argument("--dtype", default="float16", choices=DTYPES)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=1.0, help="of a round")
  parser.add_argument("--pictures", type=int, default=2, help="encoded at a time; 0 for none")
  flags = parser.parse_args()
  command.set_up_jax()
  scenes = data.open_source("scenes", "train", RESOLUTION, 0)
  tokenizer = train_tokenizer(scenes.captions(), 512, 16)

  def text(captions):
    return {"text": {"text_encoder": tokenizer.encode(captions)}}

  with tempfile.TemporaryDirectory() as folder:
    write(flags, Path(folder), scenes)
    cache, size = LatentCache(folder, "train"), flags.batch_size
    random = np.random.default_rng(0)
    rate = lambda each, count: median_rate(flags, each, count)  # noqa: E731
    bytes_a_row = int(np.prod(SHAPE)) * DTYPES[flags.dtype].itemsize
    direct = rate(lambda: cache.lookup(random.integers(flags.rows, size=size)), size)
    print(f"random rows of {bytes_a_row / 2**10:.0f} KiB, batches of {size} out of {flags.rows}: "
          f"{direct:,.0f} rows/s, {direct * bytes_a_row / 2**30:.2f} GiB/s")
    batches = Loader(LatentSource(scenes, cache), text, size, 0)
    loaded = rate(lambda: next(batches), size)
    print(f"through the loader, with captions: {loaded:,.0f} rows/s")
  batches = Loader(scenes, text, 32, 0)
  drawn = rate(lambda: next(batches), 32)
  print(f"pictures of {RESOLUTION} px through the loader, drawn on the fly: {drawn:,.0f} rows/s")
  if flags.pictures:
    encoded = rate(encoder(flags.pictures), flags.pictures)
    print(f"the published encoder on {jax.devices()[0].device_kind}, {flags.pictures} at a time: "
          f"{encoded:,.2f} pictures/s; the cache gives {loaded / encoded:,.0f} times as many")


def write(flags, folder: Path, source) -> None:
  """A cache with the same random moments in each shard."""
  random = np.random.default_rng(0)
  moments = random.normal(size=(flags.shard_size, 1, *SHAPE)).astype(np.float32)
  stored = about(source, "scenes", {}, "train", 0, flags.rows)
  writer = Writer(folder, stored, {"fingerprint": ""}, SHAPE, flags.dtype, 1, flags.shard_size)
  started = time.perf_counter()
  for shard in writer.missing():
    count = len(writer.layout.rows_of(shard))
    writer.write(shard, moments[:count], np.ones(count, bool))
  writer.finish()
  writer.close()
  rate = flags.rows / (time.perf_counter() - started)
  print(f"{rate:,.0f} rows/s written as {flags.dtype}, with their statistics")


def encoder(count: int) -> Callable[[], jax.Array]:
  """Encodes a batch of so many pictures."""
  config = config_files.load_config("configs/kl_autoencoder.py:size=f8c4", {
    "model.perceptual_weight": "0.0", "model.adversarial_weight": "0.0",
  })  # fmt: skip
  system = assembly.build_system(config)
  batch = {"image": jnp.zeros((count, RESOLUTION, RESOLUTION, 3), jnp.uint8)}
  variables = jax.jit(system.init)(jax.random.key(0), batch)
  compiled = jax.jit(lambda variables, x: system.encode(variables, normalize_images(x)))
  return lambda: jax.block_until_ready(compiled(variables, batch["image"]))


def median_rate(flags, each: Callable[[], object], count: int) -> float:
  """Of `count` a call, by the second."""
  each()
  rates = []
  for _ in range(flags.rounds):
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < flags.seconds:
      each()
      calls += 1
    rates.append(calls * count / (time.perf_counter() - started))
  return statistics.median(rates)


if __name__ == "__main__":
  run()
