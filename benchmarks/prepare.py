"""Pictures a second of preparing a data set and of reading it, against a plain loop over its files.

  python benchmarks/prepare.py                     # 640x480 JPEGs, cut to 256
  python benchmarks/prepare.py --width=64 --height=64 --resolution=64
  python benchmarks/prepare.py --pictures=20000 --width=320 --height=256 --prepare-rounds=1

Makes JPEGs in the layout of MS COCO and as tar shards, prepares them with each number of
processes, and reads both through the loader: by threads, and by each number of grain's worker
processes. The plain loop opens, converts, resizes and crops each file with Pillow, one after the
other, as ours does: antialiased bicubic, the middle cut out; files of the wanted shorter side are
decoded and cut alone by both. Printed: the median of several rounds, and how many times the plain
loop's rate that is. In each way of reading, a loader that is given another's state has to go on
with the same batches, bit for bit.
"""

import argparse
import json
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from t2i_jax.data import open_source, prepare
from t2i_jax.data.loader import Loader
from t2i_jax.data.sets import preparable, webdataset


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--pictures", type=int, default=2000)
  parser.add_argument("--width", type=int, default=640)
  parser.add_argument("--height", type=int, default=480)
  parser.add_argument("--resolution", type=int, default=256, help="that they are cut to")
  parser.add_argument("--batch-size", type=int, default=32)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--prepare-rounds", type=int, default=0,
                      help="of preparing, where it is long (as many as --rounds)")
  parser.add_argument("--seconds", type=float, default=5.0, help="of a round")
  parser.add_argument("--workers", type=int, nargs="*", default=(1, 2), help="processes")
  flags = parser.parse_args()
  print(f"{flags.pictures} JPEGs of {flags.width}x{flags.height}, cut to {flags.resolution}, "
        f"median of {flags.rounds} rounds")
  with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    files = make(folder, flags)
    plain = _median(lambda: _plain(files, flags), flags.rounds)
    _print("plain loop", plain, plain)
    for workers in (0, *(n for n in flags.workers if n > 1)):
      rate = _median(lambda workers=workers: _prepared(folder, workers),
                     flags.prepare_rounds or flags.rounds)
      _print(f"prepare, {workers or 1} process{'es' if workers else ''}", rate, plain)
    options = {"data_dir": str(folder / "out")}
    webdataset.write_index(folder / "tars", folder / "out", 0, lambda *_: None)
    tars = open_source("webdataset", "train", flags.resolution, 0,
                       options | {"path": str(folder / "tars")})
    coco = open_source("coco", "train", flags.resolution, 0, options)
    for name, source in (("prepared", coco), ("tar shards", tars)):
      for workers in (0, *flags.workers):
        rate = _loaded(source, workers, flags)
        way = f"{workers} workers" if workers else "threads"
        _print(f"{name}, {way}", rate, plain, ", resumes exactly")


def _print(name: str, rate: float, plain: float, more: str = "") -> None:
  print(f"{name:28} {rate:9.0f} pictures/s  {rate / plain:6.2f} times the plain loop{more}",
        flush=True)


def _median(measure: Callable[[], float], rounds: int) -> float:
  return statistics.median(measure() for _ in range(rounds))


def make(folder: Path, flags) -> list[Path]:
  """MS COCO's layout and two tar shards; returns the training pictures' files."""
  rng = np.random.default_rng(0)
  sizes = {"train": flags.pictures, "val": 1}
  files = []
  for split, count in sizes.items():
    part, images, captions = f"{split}2014", [], []
    (folder / part).mkdir()
    for n in range(count):
      # Noise that is resized has about as many bytes as a photograph.
      small = rng.integers(0, 255, (flags.height // 16 + 1, flags.width // 16 + 1, 3), np.uint8)
      file = folder / part / f"COCO_{part}_{n:012d}.jpg"
      Image.fromarray(small).resize((flags.width, flags.height)).save(file, quality=90)
      images.append({"id": n, "file_name": file.name})
      captions += [{"image_id": n, "id": 5 * n + k, "caption": f"picture {n}, {k}"}
                   for k in range(5)]
      files += [file] if split == "train" else []
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / f"captions_{part}.json").write_text(
      json.dumps({"images": images, "annotations": captions}))
  (folder / "tars").mkdir()
  for shard in range(2):
    with tarfile.open(folder / "tars" / f"{shard:05d}.tar", "w") as archive:
      for n, file in enumerate(files[shard::2]):
        (folder / "caption.txt").write_text(f"picture {n}")
        archive.add(file, f"{n:09d}.jpg")
        archive.add(folder / "caption.txt", f"{n:09d}.txt")
  return files


def _plain(files: list[Path], flags) -> float:
  start, count = time.monotonic(), 0
  for file in _endless(files):
    with Image.open(file) as image:
      image = image.convert("RGB")
    scale = flags.resolution / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if image.size != (width, height):
      image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - flags.resolution) // 2, (height - flags.resolution) // 2
    np.asarray(image.crop((left, top, left + flags.resolution, top + flags.resolution)))
    count += 1
    if time.monotonic() - start > flags.seconds:
      return count / (time.monotonic() - start)
  raise AssertionError


def _endless(files: list[Path]) -> Iterator[Path]:
  while True:
    yield from files


def _prepared(folder: Path, workers: int) -> float:
  """All of it, from reading the captions to the finished data set."""
  read, module = preparable("coco").load()
  with tempfile.TemporaryDirectory(dir=folder) as out:
    start = time.monotonic()
    listing = read(folder)
    prepare.write("coco", listing, module, Path(out), workers=workers, bar=False)
    rate = sum(map(len, listing.splits.values())) / (time.monotonic() - start)
    if not (folder / "out").exists():
      Path(out).rename(folder / "out")
      Path(out).mkdir()  # which the context deletes
  return rate


def _tokens(captions: list[str]) -> dict:
  return {"text": {}}


def _loaded(source, workers: int, flags) -> float:
  loader = Loader(source, _tokens, flags.batch_size, 0, workers=workers)
  for _ in range(3):
    next(loader)

  def measure() -> float:
    start, count = time.monotonic(), 0
    while time.monotonic() - start < flags.seconds:
      next(loader)
      count += flags.batch_size
    return count / (time.monotonic() - start)

  rate = _median(measure, flags.rounds)
  loader.close()
  _check_resumes(source, workers, flags)
  return rate


def _check_resumes(source, workers: int, flags) -> None:
  """Raises unless another loader goes on from a state with the same batches, bit for bit."""

  def made() -> Loader:
    return Loader(source, _tokens, flags.batch_size, 0, workers=workers)

  whole, other = made(), made()
  for _ in range(3):
    next(whole)
  other.restore(json.loads(json.dumps(whole.state())))
  for _ in range(3):
    ours, theirs = next(whole), next(other)
    for name in ("image", "index"):
      if ours[name].tobytes() != theirs[name].tobytes():
        raise SystemExit(f"error: with {workers} workers, '{name}' of a batch after a resume is "
                         "not that of a loader which went on")
  whole.close()
  other.close()


if __name__ == "__main__":
  main()
