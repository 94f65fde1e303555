"""Captioned pictures as a TensorFlow Datasets builder that needs no TensorFlow.

Several processes write the shards, and a run that was stopped goes on with those that are not
there. Beside the shards lies a `table` of each split, from which captions are read without their
pictures.

Prepare it with `file_format="array_record"`; other formats need TensorFlow.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from t2i_jax.data.sets import beam, parallel, shard, table, unfinished
from t2i_jax.data.sets.listing import Listing, Picture
from t2i_jax.data.sets.prepared import SETTINGS, VERSION
from t2i_jax.errors import UserError

SKIPPED = "skipped.txt"
# Pictures a shard: few shards of large sets, and no small set in one.
_SMALLEST_SHARD, _MOST_SHARDS = 1024, 1024


def features(classes: int, boxes: bool) -> tfds.features.FeaturesDict:
  """What a row has: `boxes` are fractions, top, left, bottom, right, one for each caption."""
  row = {
    # The file's own bytes: of any mode, and as the camera lay. `data.images.decode` knows.
    "image": tfds.features.Image(shape=(None, None, 3)),
    "name": tfds.features.Text(),
    "captions": tfds.features.Sequence(tfds.features.Text()),
    "size": tfds.features.Tensor(shape=(2,), dtype=np.int32),
  }
  if classes:
    row["label"] = tfds.features.ClassLabel(num_classes=classes)
  if boxes:
    row["boxes"] = tfds.features.Tensor(shape=(None, 4), dtype=np.float32)
  return tfds.features.FeaturesDict(row)


class PicturesBuilder(tfds.core.ShardBasedBuilder, skip_registration=True):
  """The pictures of a listing with their captions; `builder` makes one under a set's name.

  Args:
    listing: what there is.
    about: a sentence on the set, and its licence.
    classes: how many there are, or 0.
    size: shorter side that larger pictures are shrunk to; 0 takes the files as they are.
    workers: processes; 0 works in this one.
    runner, pipeline: of Apache Beam, as of `beam.run`, in place of processes; "" for none. Its
      workers see the folders of pictures and of prepared sets as this process does.
    progress: called with (pictures done, pictures).
    **kwargs: as of every builder, such as `data_dir`.
  """

  VERSION = tfds.core.Version(VERSION)
  name = "pictures"

  def __init__(self, *, listing: Listing, about: tuple[str, str], classes: int = 0, size: int = 0,
               workers: int = 0, runner: str = "", pipeline: str = "",
               progress: Callable[[int, int], None] | None = None, **kwargs: Any):
    self._listing, self._about, self._classes = listing, about, classes
    self._size, self._workers, self._progress = size, workers, progress
    self._runner, self._pipeline = runner, pipeline
    some = next((p for pictures in listing.splits.values() for p in pictures[:1]), None)
    if some is None:
      raise UserError("not one picture was found")
    self._boxes = some.boxes is not None
    self.skipped = list(listing.skipped)
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self, description=self._about[0], license=self._about[1],
      features=features(self._classes, self._boxes),
    )

  def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Callable]]:
    """As TFDS asks for it; here `_download_and_prepare` does more."""
    return {
      split: [lambda pictures=pictures: self._examples(pictures) for pictures in shards]
      for split, shards in self._shards().items()
    }

  def _examples(self, pictures: Sequence[Picture]) -> Iterator[tuple[str, dict[str, Any]]]:
    for example in shard.examples(pictures, self._size, []):
      yield example["name"], example

  def _shards(self) -> dict[str, list[Sequence[Picture]]]:
    cut = {}
    for split, pictures in self._listing.splits.items():
      rows = max(_SMALLEST_SHARD, -(-len(pictures) // _MOST_SHARDS))
      cut[split] = [pictures[start : start + rows] for start in range(0, len(pictures), rows)]
    return cut

  def _plan(self) -> dict[str, Any]:
    digest = hashlib.sha256()
    for split, pictures in self._listing.splits.items():
      digest.update(f"{split} {len(pictures)}\n".encode())
      for picture in pictures:
        digest.update(repr(picture).encode(errors="surrogatepass"))
    return {"pictures": digest.hexdigest(), "size": self._size, "version": VERSION}

  def download_and_prepare(self, **kwargs: Any) -> None:
    """As TFDS does, by one process at a time; finished shards are kept until all of it is there.

    Raises:
      UserError: another process is at it, or not one picture of a split can be read.
    """
    folder = Path(self.data_dir)
    with unfinished.making(folder, f"'{self.name}'"):
      for path in folder.parent.glob(f"incomplete.*_{folder.name}"):  # TFDS's, of what was killed
        shutil.rmtree(path, ignore_errors=True)
      super().download_and_prepare(**kwargs)

  def _download_and_prepare(self, dl_manager: Any, download_config: Any = None) -> None:
    """Writes what is missing beside, then links all of it into TFDS's own temporary folder."""
    beside = unfinished.beside(Path(self.data_dir_root) / self.name / VERSION)
    self._claim(beside)
    self._collect(self._make_shards(beside))

  def _claim(self, beside: Path) -> None:
    """Forgets what an attempt at something else left, and what one that was killed was at."""
    plan, file = self._plan(), beside / "plan.json"
    try:
      same = json.loads(file.read_text()) == plan
    except (OSError, ValueError):
      same = False
    if not same:
      unfinished.clear(beside)
      _write_text(file, json.dumps(plan))
    elif not self._runner:  # whose workers may still be at it
      unfinished.clear(beside, "*.writing")

  def _make_shards(self, beside: Path) -> dict[str, list[Path]]:
    """Makes the shards that are missing; returns all of them by split."""
    shards = self._shards()
    paths = {split: [beside / f"{split}-{n:05d}" for n in range(len(of))]
             for split, of in shards.items()}
    total = sum(map(len, self._listing.splits.values()))
    missing, done = [], 0
    for split, of in shards.items():
      for path, pictures in zip(paths[split], of, strict=True):
        if shard.is_made(path):
          done += len(pictures)
        else:
          missing.append((path, pictures))
    report = self._progress or (lambda done, total: None)
    report(done, total)
    jobs = [(path, pictures, self._size, self._classes, self._boxes) for path, pictures in missing]
    begun = done

    def tell(number: int) -> None:
      report(begun + sum(len(pictures) for _, pictures in missing[: number + 1]), total)

    if self._runner:
      for job in jobs:
        shard.write_job(*job)
      written = [(path,) for path, *_ in jobs]
      beam.run(shard.make_written, written, self._runner, self._pipeline, tell)
    else:
      parallel.run(shard.make, jobs, self._workers, tell)
    return paths

  def _collect(self, made: Mapping[str, Sequence[Path]]) -> None:
    """Gives finished shards the names that TFDS reads, and writes the tables and the report."""
    folder, infos = Path(self.data_dir), []
    for split, paths in made.items():
      parts = [shard.read(path) for path in paths]
      kept = [n for n, part in enumerate(parts) if len(part.columns["first"]) > 1]
      self.skipped += [tuple(pair) for part in parts for pair in part.skipped]
      if not kept:
        name, reason = self.skipped[-1]
        raise UserError(f"not one picture of split '{split}' can be read, the last is {name}: "
                        f"{reason}")
      template = self._get_filename_template(split_name=split)
      files = [
        Path(template.sharded_filepath(shard_index=n, num_shards=len(kept)))
        for n in range(len(kept))
      ]  # fmt: skip
      for file, n in zip(files, kept, strict=True):
        _link(shard.records(paths[n]), file)  # not moved: this may be stopped and begun again
      table.write(folder / split, [parts[n].columns for n in kept])
      infos.append(tfds.core.SplitInfo(
        name=split, shard_lengths=[len(parts[n].columns["first"]) - 1 for n in kept],
        num_bytes=sum(file.stat().st_size for file in files), filename_template=template,
      ))
    _write_text(folder / SKIPPED, "".join(f"{n}\t{reason}\n" for n, reason in self.skipped))
    _write_text(folder / SETTINGS, json.dumps({"size": self._size}))
    self.info.set_splits(tfds.core.splits.SplitDict(infos))


def _link(path: Path, to: Path) -> None:
  try:
    os.link(path, to)
  except OSError:  # some file systems have no links
    shutil.copyfile(path, to)


def _write_text(path: Path, text: str) -> None:
  beside = path.parent / f".{path.name}.writing"
  beside.write_text(text, encoding="utf-8", errors="replace")
  beside.replace(path)


def builder(name: str, **arguments: Any) -> PicturesBuilder:
  """A builder whose set has this name; arguments as of `PicturesBuilder`."""
  namespace = {"name": name, "__module__": PicturesBuilder.__module__,
               "__doc__": arguments["about"][0]}
  made = type(name.title().replace("_", ""), (PicturesBuilder,), namespace, skip_registration=True)
  return made(**arguments)
