"""Pictures a second from each data source, against what a training step needs.

  python benchmarks/loader.py --need=125

Sources: scenes (drawn on the fly, each level), emoji (in memory, and decoded
by grain, if the font is installed), and a folder of JPEGs made for the
purpose. Printed: the median of several rounds, in pictures a second, tokenized
and batched, and how many times the need that is.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from t2i_jax import data
from t2i_jax.data.loader import Loader
from t2i_jax.data.memory import in_memory
from t2i_jax.errors import UserError
from t2i_jax.text.tokenizer import train_tokenizer


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--resolution", type=int, default=32)
  parser.add_argument("--batch-size", type=int, default=32)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--seconds", type=float, default=1.0, help="of a round")
  parser.add_argument("--workers", type=int, default=2, help="grain processes for decoding")
  parser.add_argument("--need", type=float, default=0.0, help="pictures a second of the step")
  flags = parser.parse_args()
  print(f"{flags.resolution} px, batches of {flags.batch_size}, median of {flags.rounds} rounds")
  with tempfile.TemporaryDirectory() as folder:
    for name, source, workers in _sources(flags, Path(folder)):
      rate = _rate(source, workers, flags)
      times = f", {rate / flags.need:.1f} times the need" if flags.need else ""
      print(f"{name:32} {rate:10.0f} pictures/s{times}", flush=True)


def _sources(flags, folder: Path):
  open_ = lambda name, **options: data.open_source(  # noqa: E731
    name, "train", flags.resolution, 0, options
  )
  for level in ("one", "two", "counts"):
    yield f"scenes, level {level}", open_("scenes", levels=(level,)), 0
  try:
    emoji = open_("emoji")
    yield "emoji, in memory", in_memory(emoji), 0
    yield "emoji, decoded", emoji, 0
    yield f"emoji, decoded by {flags.workers} workers", emoji, flags.workers
  except UserError as error:
    print(f"emoji left out: {error}")
  _make_pictures(folder)
  jpegs = open_("folder", path=str(folder))
  yield "folder of 640x480 JPEGs, decoded", jpegs, 0
  yield f"the same by {flags.workers} workers", jpegs, flags.workers


def _make_pictures(folder: Path, count: int = 64) -> None:
  from PIL import Image

  rng = np.random.default_rng(0)
  lines = []
  for i in range(count):
    small = rng.integers(0, 255, (30, 40, 3), np.uint8)
    Image.fromarray(small).resize((640, 480)).save(folder / f"{i}.jpg", quality=90)
    lines.append(json.dumps({"file": f"{i}.jpg", "caption": f"picture number {i}"}))
  (folder / "captions.jsonl").write_text("\n".join(lines))


def _rate(source, workers: int, flags) -> float:
  tokenizer = train_tokenizer(list(source.captions())[:2000], 512, 32)
  read_text = lambda captions: {"text": {"text_encoder": tokenizer.encode(captions)}}  # noqa: E731
  loader = Loader(source, read_text, flags.batch_size, 0,
                  workers=workers)
  for _ in range(3):
    next(loader)
  rates = []
  for _ in range(flags.rounds):
    start, count = time.monotonic(), 0
    while time.monotonic() - start < flags.seconds:
      next(loader)
      count += flags.batch_size
    rates.append(count / (time.monotonic() - start))
  loader.close()
  return statistics.median(rates)


if __name__ == "__main__":
  main()
