"""Text encoders: prompts a second against PyTorch, memory while loading, bytes a chip on a slice.

  python benchmarks/text_encoders.py speed                     # needs the extra "parity"
  python benchmarks/text_encoders.py memory --gigabytes=4
  python benchmarks/text_encoders.py slice --topology=v5e:2x4   # needs jax[tpu]
"""

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.text import clip, t5
from t2i_jax.weights import text_encoders as maps


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("what", choices=("speed", "memory", "slice", "load"))
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--gigabytes", type=float, default=4.0)
  parser.add_argument("--topology", default="v5e:2x4")
  parser.add_argument("--path", type=Path)
  flags = parser.parse_args()
  {"speed": speed, "memory": memory, "slice": compile_for_slice, "load": load}[flags.what](flags)


def speed(flags) -> None:
  """Encoders of the published sizes with random weights, both sides warm, in turns."""
  import torch
  import transformers

  torch.manual_seed(0)
  clip_config = transformers.CLIPTextConfig(
    hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768,
    eos_token_id=49407,
  )  # fmt: skip
  t5_config = transformers.T5Config(
    d_model=768, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu"
  )
  cases = {
    "CLIP-L": (transformers.CLIPTextModel(clip_config),
               clip.CLIPText(clip.TEXT["L"], project=False), maps.CLIP_TEXT),
    "T5-v1.1-base": (transformers.T5EncoderModel(t5_config), t5.T5Encoder(t5.SIZES["B"]), maps.T5),
  }  # fmt: skip
  ids = np.random.default_rng(0).integers(3, 30000, (flags.batch_size, 77))
  ids[:, -1] = 49407 if ids.max() < 49407 else ids[:, -1]
  print(f"batches of {flags.batch_size} prompts of 77 tokens, median of {flags.rounds} rounds, "
        f"{torch.get_num_threads()} threads, jax {jax.__version__}, torch {torch.__version__}")
  for name, (reference, network, key_map) in cases.items():
    given = ids % (t5_config.vocab_size if name.startswith("T5") else 49408)
    reference = reference.eval()
    abstract = jax.eval_shape(network.init, jax.random.key(0), given)["params"]
    params = key_map.load(_stored(reference), abstract, source=name)
    run = jax.jit(lambda params, ids, network=network: network.apply({"params": params}, ids))

    def ours(run=run, params=params, given=given):
      jax.block_until_ready(run(params, given))

    def theirs(reference=reference, given=given):
      with torch.inference_mode():
        reference(torch.from_numpy(given))

    times = {"t2i_jax": [], "transformers": []}
    for side in (ours, theirs):
      side()
    for _ in range(flags.rounds):
      for side, found in zip((ours, theirs), times.values(), strict=True):
        started = time.perf_counter()
        side()
        found.append(time.perf_counter() - started)
    rates = {side: flags.batch_size / statistics.median(found) for side, found in times.items()}
    print(f"{name:14} " + ", ".join(f"{side} {rate:.2f} prompts/s" for side, rate in rates.items())
          + f", ratio {rates['t2i_jax'] / rates['transformers']:.2f}", flush=True)


def _stored(model):
  from t2i_jax.weights.stored import Stored

  tensors = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  return {k: Stored(v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()}


# A T5 that has about a gigabyte of float32 numbers in eight layers.
def _sized(gigabytes: float) -> t5.Config:
  return t5.Config(1024, max(round(gigabytes * 8), 1), 16, 8192, vocab_size=2048)


def memory(flags) -> None:
  """Writes a random checkpoint and loads it in a new process, whose peak memory is read."""
  from t2i_jax.weights.safetensors_file import write_safetensors

  config = _sized(flags.gigabytes)
  abstract = _abstract(config)
  with tempfile.TemporaryDirectory(dir=flags.path) as folder:
    path = Path(folder) / "model.safetensors"
    random = np.random.default_rng(0)
    empty = maps.T5.save(abstract)
    write_safetensors(path, {
      name: (shape, kind, lambda s=shape: random.standard_normal(s, np.float32))
      for name, (shape, kind, _) in empty.items()
    })  # fmt: skip
    size = path.stat().st_size
    print(f"checkpoint {size / 2**30:.2f} GiB, {len(empty)} tensors, the largest "
          f"{max(np.prod(s) * 4 for s, _, _ in empty.values()) / 2**20:.0f} MiB")
    base, peak = (
      int(subprocess.run(
        [sys.executable, __file__, "load", f"--path={p}", f"--gigabytes={flags.gigabytes}"],
        check=True, capture_output=True, text=True,
      ).stdout) for p in ("/dev/null", path)
    )  # fmt: skip
  print(f"peak memory of a process that loads it: {peak / 2**30:.2f} GiB, without loading "
        f"{base / 2**30:.2f} GiB; the difference is {(peak - base) / size:.3f} times the file")


def load(flags) -> None:
  """Loads the checkpoint of `memory` onto the device and prints the process's peak in bytes."""
  from t2i_jax.weights.stored import open_weights

  abstract = _abstract(_sized(flags.gigabytes))
  device = jax.devices()[0]
  if flags.path != Path("/dev/null"):
    put = lambda path, array: jax.device_put(array, device)  # noqa: E731
    jax.block_until_ready(maps.T5.load(open_weights(flags.path), abstract, source="it", put=put))
  print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def _abstract(config: t5.Config):
  ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
  return jax.eval_shape(t5.T5Encoder(config).init, jax.random.key(0), ids)["params"]


def compile_for_slice(flags) -> None:
  """T5-XXL's encoding of 64 prompts of 128 tokens, parameters in bfloat16 over all chips."""
  from t2i_jax.parallel.mesh import batch_sharding
  from t2i_jax.parallel.sharding import parse_rules, shardings
  from t2i_jax.parallel.topology import bytes_a_chip, chip_of, slice_mesh

  mesh = slice_mesh(flags.topology, {"fsdp": -1})
  network = t5.T5Encoder(t5.SIZES["XXL"], jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((64, 128), jnp.int32, sharding=batch_sharding(mesh))
  mask = jax.ShapeDtypeStruct((64, 128), bool, sharding=batch_sharding(mesh))
  params = jax.eval_shape(network.init, jax.random.key(0), ids)["params"]
  placed = shardings(params, parse_rules(((".*", "fsdp"),)), mesh)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s), params, placed
  )
  started = time.perf_counter()
  with jax.set_mesh(mesh):
    encode = jax.jit(
      lambda params, ids, mask: network.apply({"params": params}, ids, mask),
      out_shardings=batch_sharding(mesh),
    )
    compiled = encode.lower(params, ids, mask).compile()
  needed = bytes_a_chip(compiled)
  chip = chip_of(flags.topology).memory
  print(f"T5-XXL on {flags.topology}, fsdp={mesh.shape['fsdp']}, 64 prompts of 128 tokens: "
        + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in needed.items())
        + f" a chip of {chip / 2**30:.0f} GiB; compiled in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
  main()
