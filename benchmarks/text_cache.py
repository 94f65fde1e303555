"""Training on a frozen text encoder, and on its features computed once: losses and speed.

  python benchmarks/text_cache.py --steps=300

Makes a Hugging Face folder of a T5-v1.1 with random weights and a tokenizer trained on the
captions, converts it, encodes all captions of the data set, and trains the same run twice.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import command, config_files, convert, data, main, precompute_text
from t2i_jax.text import t5
from t2i_jax.text.tokenizer import train_tokenizer
from t2i_jax.weights import text_encoders as maps
from t2i_jax.weights.safetensors_file import write_safetensors

LENGTH = 16


def run():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/ddpm.py")
  parser.add_argument("--size", default="S", choices=tuple(t5.SIZES), help="of the encoder")
  parser.add_argument("--steps", type=int, default=300)
  parser.add_argument("--every", type=int, default=25, help="steps of a window")
  parser.add_argument("--dtype", default="float32,bfloat16", help="of the caches")
  parser.add_argument("--workdir", type=Path, help="kept; a temporary folder by default")
  flags = parser.parse_args()
  command.set_up_jax()
  with tempfile.TemporaryDirectory() as temporary:
    folder = flags.workdir or Path(temporary)
    make_folder(folder / "huggingface", t5.SIZES[flags.size])
    convert.main([f"--source={folder / 'huggingface'}", f"--output={folder / 'encoder'}",
                  f"--length={LENGTH}", "--masked"])  # fmt: skip
    lines = {"encoder": train(flags, folder, "encoder")}
    for dtype in flags.dtype.split(","):
      started = time.perf_counter()
      precompute_text.write_features(
        config_of(flags, folder), str(folder / f"{dtype}_cache"), ("train",), dtype
      )
      print(f"{dtype} cache written in {time.perf_counter() - started:.0f} s")
      lines[dtype] = train(flags, folder, dtype, f"{dtype}_cache")
  report(lines, flags)


def make_folder(folder: Path, config: t5.Config) -> None:
  """What transformers writes of a T5 encoder, with random weights."""
  folder.mkdir(parents=True)
  params = jax.jit(t5.T5Encoder(config).init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  write_safetensors(folder / "model.safetensors", maps.T5.save(jax.device_get(params["params"])))
  (folder / "config.json").write_text(json.dumps({
    "model_type": "t5", "d_model": config.width, "num_layers": config.layers,
    "num_heads": config.heads, "d_ff": config.mlp, "d_kv": config.head_size,
    "vocab_size": config.vocab_size, "feed_forward_proj": config.feed_forward,
  }))  # fmt: skip
  source = data.open_source("scenes", "train", 32, 0, {"levels": ("one",)})
  tokenizer = train_tokenizer(source.captions(), 512, LENGTH)
  (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
  (folder / "special_tokens_map.json").write_text(
    json.dumps({"eos_token": "<end>", "pad_token": "<pad>"})
  )


def config_of(flags, folder: Path, cache: str = ""):
  """The run's config on the encoder, or on one of its caches."""
  return config_files.load_config(flags.config, {
    "text.encoder": "component", "components.text_encoder": str(folder / "encoder"),
    "text.cache": str(folder / cache) if cache else "", "train.duration": str(flags.steps),
    "log.every": str(flags.every), "sample.every": "0", "evaluate.pictures": "0",
  })  # fmt: skip


def train(flags, folder: Path, name: str, cache: str = "") -> list[dict[str, float]]:
  """The lines of metrics.jsonl of a run."""
  main.train(config_of(flags, folder, cache), str(folder / "runs" / name))
  text = (folder / "runs" / name / "metrics.jsonl").read_text()
  return [line for line in map(json.loads, text.splitlines()) if "denoiser/loss" in line]


def report(lines: dict[str, list[dict[str, float]]], flags) -> None:
  base, loss = None, "denoiser/loss"
  print(f"{flags.config} on T5-v1.1 {flags.size}, {flags.steps} steps, medians of windows of "
        f"{flags.every} steps after the first")
  for name, run_lines in lines.items():
    windows = [line["steps_per_second"] for line in run_lines if "steps_per_second" in line]
    speed = statistics.median(windows[1:])
    base = base or speed
    differences = [
      abs(line[loss] / other[loss] - 1)
      for line, other in zip(run_lines, lines["encoder"], strict=True)
    ]
    print(f"  {name:10} {speed:6.2f} steps/s ({speed / base:.2f} times), {loss} at the end "
          f"{run_lines[-1][loss]:.5f}, differs by at most {np.max(differences):.2g} of it from the "
          f"encoder's, at the first window by {differences[0]:.2g}")


if __name__ == "__main__":
  run()
