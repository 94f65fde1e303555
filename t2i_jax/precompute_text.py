"""What frozen text encoders make of a data set's captions, computed once: `precompute text`."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from t2i_jax import assembly, caches, data, systems, tokenizing
from t2i_jax.data.text_cache import DTYPES, Features, Fields, Writer
from t2i_jax.parallel.compiler_flags import compiler_options
from t2i_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh, replicated
from t2i_jax.parallel.sharding import parse_rules, place, put, shardings
from t2i_jax.systems.conditioning import encoder_names
from t2i_jax.text.tokenizer import Tokenizers
from t2i_jax.training.writers import say


def write_features(
  config: ConfigDict, output: str, splits: tuple[str, ...] = (), dtype: str = "bfloat16",
  shard_size: int = 1024, batch_size: int = 64,
) -> None:
  """Writes the cache, or what is missing of it; arguments as the command's.

  Raises:
    UserError: for whatever the user can mend.
  """
  from tqdm import tqdm

  names = encoder_names(config.text.encoders)
  config = caches.to_compute(config, names)
  components = assembly.load_components(config)
  # Every host encodes by itself, with its own devices: none waits for another.
  mesh = make_mesh({"fsdp": -1}, jax.local_devices())
  tokenizers = tokenizing.component_tokenizers(config, components.tokenizers)
  encode, fields = _encoder(config, components, tokenizers, mesh, batch_size, DTYPES[dtype])
  captions = list(_captions(config, splits))
  for line in tokenizing.truncated_captions(config, tokenizers, captions):
    say(f"warning: {line}")
  about = {
    "frozen": config.precision.frozen, "compute": jnp.dtype(assembly.compute_dtype(config)).name
  }
  writer = Writer(
    output, captions,
    {name: {"fingerprint": components.about[name]["fingerprint"], **about} for name in names},
    fields, dtype, shard_size, jax.process_index(), jax.process_count(),
  )
  missing = writer.missing()
  total = sum(len(writer.captions(shard)) for shard in missing)
  size = len(writer) * writer.bytes_a_caption
  say(f"{len(writer)} captions of {writer.bytes_a_caption / 2**10:.3g} KiB, {size / 2**30:.3g} GiB "
      f"in all, in {output}; {total} are left to encode here. Stopped, the same command goes on.")
  with tqdm(total=total, unit="caption", mininterval=1 if sys.stderr.isatty() else 30) as bar:
    for shard in missing:
      writer.write(shard, encode(writer.captions(shard), bar.update))
  while jax.process_count() > 1 and writer.missing(of_all=True):
    time.sleep(5)  # A process that ends takes the others with it.
  writer.close()
  if jax.process_index() == 0:
    print(f"{len(writer)} captions in {output}, {total} of them encoded now; train on them with "
          f"--config.text.cache={output}")


def _captions(config: ConfigDict, splits: tuple[str, ...]) -> Iterator[str]:
  for split in caches.chosen_splits(config, splits):
    # Pictures are not looked at, so their size does not matter.
    source = data.open_source(
      config.data.name, split, config.model.get("resolution", 64), config.seed,
      config.data.options.to_dict(),
    )
    yield from source.every_caption()


def _encoder(
  config: ConfigDict, components: assembly.Components, tokenizers: Tokenizers, mesh: Any,
  batch_size: int, dtype: np.dtype,
) -> tuple[Callable[[list[str], Callable[[int], Any]], Features], Fields]:
  """A function of captions and a progress bar to features, and what it makes of one caption."""
  text = systems.build_text(config, components.systems, assembly.compute_dtype(config))
  params = place(
    components.variables, shardings(components.variables, parse_rules(config.sharding.rules), mesh)
  )
  shards = batch_shards(mesh)
  size = -(-batch_size // shards) * shards

  def features(variables, given):
    return {
      name: {
        field: value if value.dtype == bool else value.astype(dtype)
        for field in ("sequence", "mask", "pooled")
        if (value := getattr(part, field)) is not None
      }
      for name, part in text.each(variables, {"text": given}).items()
    }

  compiled = jax.jit(
    features, out_shardings=replicated(mesh),
    compiler_options=compiler_options(mesh.devices.flat[0].platform),
  )

  def encode(captions, progress):
    found = []
    for start in range(0, len(captions), size):
      part = captions[start : start + size]
      given = tokenizers.encode(part + [""] * (size - len(part)))
      with jax.set_mesh(mesh):
        found.append(compiled(params, put(given, batch_sharding(mesh))))
      if len(found) > 1:  # read while the devices are at the next
        found[-2] = jax.device_get(found[-2])
      progress(len(part))
    found = jax.device_get(found)
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(captions)], *found)

  one = jax.eval_shape(features, params, tokenizers.encode([""]))
  kind = lambda x: "bool" if x.dtype == bool else "float"  # noqa: E731
  return encode, {
    name: {field: (x.shape[1:], kind(x)) for field, x in fields.items()}
    for name, fields in one.items()
  }
