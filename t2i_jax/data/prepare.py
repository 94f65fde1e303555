"""`python -m t2i_jax.data.prepare NAME --source=DIR`: a download becomes a data set to train on."""

import collections
import contextlib
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from t2i_jax import command, data
from t2i_jax.data import sets
from t2i_jax.data.sets import unfinished, webdataset
from t2i_jax.data.sets.listing import Listing
from t2i_jax.data.sets.prepared import default_root, folder_of, size_in
from t2i_jax.data.sets.table import Table
from t2i_jax.data.sets.webdataset import WebDataset
from t2i_jax.errors import UserError

# Reasons that are printed, the most frequent first; the file has all names.
_REASONS = 8


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.data.prepare",
    "reads the folder that a data set's download leaves, once unpacked, and writes it as\n"
    "array_record, with its captions beside, for --config=...:dataset=NAME. Pictures that cannot\n"
    "be read are left out and named. Stopped, it goes on where it was when the same command is\n"
    "given again. Data sets: " + ", ".join(sets.PREPARABLE) + ";\nand webdataset, folders of tar "
    "shards, which stay as they are and get an index.",
    "python -m t2i_jax.data.prepare coco --source=COCO",
    "python -m t2i_jax.data.prepare cub --source=birds --output=/data/prepared --size=304",
    "python -m t2i_jax.data.prepare webdataset --source=laion/shards",
    "python -m t2i_jax.data.prepare cc12m --source=/shared/cc12m --output=/shared/prepared "
    "--runner=FlinkRunner --pipeline='--flink_master=HOST:8081 --parallelism=64'",
  )
  parser.add_argument("name", metavar="NAME", help="of the data set")
  parser.add_argument("--source", required=True, metavar="DIR", help="the download, unpacked")
  parser.add_argument("--output", default="", metavar="DIR",
                      help=f"folder of all prepared sets ({default_root()}); "
                           "data.options.data_dir of a config")
  parser.add_argument("--size", type=int, default=0, metavar="PIXELS",
                      help="shrink larger pictures to this shorter side (0: keep the files as they "
                           "are)")
  parser.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                      help="processes (%(default)s)")
  parser.add_argument("--runner", default="", metavar="NAME",
                      help="have an Apache Beam runner do the work in place of processes here: "
                           "DirectRunner, FlinkRunner, SparkRunner...; its workers must see DIR "
                           "and --output under the same paths")
  parser.add_argument("--pipeline", default="", metavar="OPTIONS",
                      help="Beam's options, such as --pipeline='--flink_master=HOST:8081'")
  command.run(parser, argv, _prepare)


def _prepare(flags) -> None:
  if flags.name in data.DATASETS and flags.name not in (*sets.PREPARABLE, webdataset.NAME):
    raise UserError(f"data set '{flags.name}' is not prepared; train on it as it is, with "
                    f"--config=...:dataset={flags.name}")
  preparable = None if flags.name == webdataset.NAME else sets.preparable(flags.name)
  if flags.size < 0 or flags.workers < 0:
    raise UserError("--size and --workers are not negative; use 0 for files as they are, and for "
                    "no further processes")
  if flags.pipeline and not flags.runner:
    raise UserError(f"--pipeline={flags.pipeline} is of a Beam runner; name it with --runner")
  source = Path(flags.source).expanduser()
  if not source.is_dir():
    raise UserError(f"no directory --source={flags.source}")
  folder = folder_of(flags.name, flags.output) if preparable else webdataset.index_of(
    flags.source, flags.output
  )
  if folder.exists():
    shutil.rmtree(unfinished.beside(folder), ignore_errors=True)  # of what was killed at its end
    size = size_in(folder)
    if size not in (None, flags.size):
      raise UserError(f"'{flags.name}' is prepared in {folder} with --size={size}, not "
                      f"{flags.size}; delete that folder, or name another --output")
    print(f"'{flags.name}' is prepared in {folder}; to prepare it again, delete that folder")
    return
  if preparable is None:
    _index(flags, source)
    return
  read, module = preparable.load()
  print(f"reading {source}", flush=True)
  listing = read(source)
  skipped = write(flags.name, listing, module, folder.parent.parent, flags.size, flags.workers,
                  runner=flags.runner, pipeline=flags.pipeline)
  report(folder, skipped, listing.notes)


def _index(flags, source: Path) -> None:
  if flags.size:
    raise UserError("--size is of sets that are written anew; tar shards are read where they are")
  with _bar(0, " shards", True) as show:
    folder, skipped = webdataset.write_index(source, flags.output, flags.workers, show,
                                             flags.runner, flags.pipeline)
  counts = ", ".join(f"{split} {len(Table(folder / split))}" for split in WebDataset.SPLITS)
  print(f"{folder}: {counts} pictures")
  _report_skipped(folder, skipped)


@contextlib.contextmanager
def _bar(total: int, unit: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
  """A progress bar, told (done, of how many)."""
  from tqdm import tqdm

  with tqdm(total=total, unit=unit, file=sys.stderr, disable=not shown) as bar:

    def show(done: int, of: int) -> None:
      bar.total = of
      bar.update(done - bar.n)

    yield show


def write(name: str, listing: Listing, module, root: Path, size: int = 0, workers: int = 0,
          bar: bool = True, runner: str = "", pipeline: str = "") -> list[tuple[str, str]]:
  """Prepares a listing below `root`; returns (name, reason) of the pictures that were skipped.

  Args:
    name: of the set.
    listing: its pictures.
    module: of the set, with `ABOUT` and perhaps `CLASSES`.
    root: folder of all prepared sets.
    size, workers, runner, pipeline: as of `PicturesBuilder`.
    bar: whether to show progress.

  Raises:
    UserError: not one picture of a split can be read, a package is missing.
  """
  try:
    from t2i_jax.data.sets.builder import builder
  except ImportError as error:
    raise UserError("data sets are prepared with tensorflow-datasets and array_record: "
                    f"{error}") from None
  logging.getLogger("absl").setLevel(logging.WARNING)  # TFDS tells each step there
  total = sum(map(len, listing.splits.values()))
  with _bar(total, " pictures", bar) as show:
    made = builder(
      name, listing=listing, about=module.ABOUT, size=size, workers=workers, runner=runner,
      pipeline=pipeline, progress=show,
      classes=sum(getattr(module, "CLASSES", {}).values()), data_dir=os.fspath(root),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS says there that it downloads
      made.download_and_prepare(file_format="array_record")
  return made.skipped


def report(folder: Path, skipped: list[tuple[str, str]], notes: list[str]) -> None:
  """Prints what a prepared set has, and what was left out and why."""
  import tensorflow_datasets as tfds

  splits = tfds.builder_from_directory(folder).info.splits
  parts = ", ".join(f"{split} {info.num_examples}" for split, info in splits.items())
  print(f"{folder}: {parts} pictures")
  for note in notes:
    print(note)
  _report_skipped(folder, skipped)


def _report_skipped(folder: Path, skipped: list[tuple[str, str]]) -> None:
  if skipped:
    print(f"{len(skipped)} left out, named in {folder / 'skipped.txt'}:")
    for reason, count in collections.Counter(r for _, r in skipped).most_common(_REASONS):
      print(f"  {count:8}  {reason}")


if __name__ == "__main__":
  main()
