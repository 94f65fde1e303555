"""Data sets by name. A set's module is imported when the set is opened.

A data set is a class whose constructor takes `split`, `resolution` and `seed`,
then its own options, each with a default; `log_dir` if it names skipped files
there. Its `SPLITS`, or its module's, are the names that `split` may have.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from t2i_jax.data.base import Source
from t2i_jax.data.buckets import shapes_of
from t2i_jax.errors import UserError, unknown

DATASETS = {
  "cc12m": "t2i_jax.data.sets.conceptual:Conceptual12M",
  "cc3m": "t2i_jax.data.sets.conceptual:ConceptualCaptions",
  "coco": "t2i_jax.data.sets.coco:Coco",
  "coco_2017": "t2i_jax.data.sets.coco:Coco2017",
  "coco_karpathy": "t2i_jax.data.sets.coco:CocoKarpathy",
  "cub": "t2i_jax.data.sets.cub:Cub",
  "emoji": "t2i_jax.data.emoji:Emoji",
  "flickr30k": "t2i_jax.data.sets.flickr30k:Flickr30k",
  "flowers": "t2i_jax.data.sets.flowers:Flowers",
  "folder": "t2i_jax.data.folder:Folder",
  "mixture": "t2i_jax.data.mixture:Mixture",
  "scenes": "t2i_jax.data.scenes:Scenes",
  "visual_genome": "t2i_jax.data.sets.visual_genome:VisualGenome",
  "webdataset": "t2i_jax.data.sets.webdataset:WebDataset",
}

# Data sets whose pictures can be judged: (images uint8 [n, R, R, 3], captions) to
# {attribute: bool [n]}, "all" among them.
VERIFIERS = {"scenes": "t2i_jax.data.scenes:verify"}
# Modules of those whose rows can have labels: `CLASSES`, {attribute: number of classes}, and
# `read_labels`, captions to int32 [n, attributes].
LABELLED = {
  "cub": "t2i_jax.data.sets.cub",
  "flowers": "t2i_jax.data.sets.flowers",
  "scenes": "t2i_jax.data.scenes.labels",
}
ATTRIBUTES = ("colour", "shape", "size", "count", "position", "all")

_COMMON = ("split", "resolution", "seed", "log_dir")
# The option of all sets that have `FileSource.has_buckets`: see `buckets.shapes_of`.
BUCKETS = "buckets"


def _find(name: str) -> tuple[ModuleType, type[Source]]:
  if name not in DATASETS:
    raise unknown("data set", name, DATASETS)
  path, attribute = DATASETS[name].split(":")
  module = importlib.import_module(path)
  return module, getattr(module, attribute)


def splits(name: str) -> tuple[str, ...]:
  """Splits of a data set, the one to train on first.

  Raises:
    UserError: no such data set.
  """
  module, dataset = _find(name)
  return getattr(dataset, "SPLITS", None) or module.SPLITS


def verifier(name: str) -> Callable[..., dict[str, np.ndarray]] | None:
  """The function that judges pictures of a data set, or None where there is none."""
  if name not in VERIFIERS:
    return None
  module, attribute = VERIFIERS[name].split(":")
  return getattr(importlib.import_module(module), attribute)


def labels(name: str) -> dict[str, int] | None:
  """Numbers of classes of a data set's attributes, in the order of `label`; None without labels.

  Batches bring `label`, int32 [B, attributes], with the set's option `labels`.
  """
  if name not in LABELLED:
    return None
  return dict(importlib.import_module(LABELLED[name]).CLASSES)


def read_labels(name: str, captions: Sequence[str]) -> np.ndarray:
  """Labels, int32 [n, attributes], of captions of a data set for which `labels` gives some.

  Raises:
    UserError: the set has no labels, or a text is no caption that has them.
  """
  if name not in LABELLED:
    raise UserError(f"data set '{name}' has no labels; those that have: {', '.join(LABELLED)}")
  return importlib.import_module(LABELLED[name]).read_labels(captions)


def default_options(name: str) -> dict[str, Any]:
  """A data set's own options with their defaults.

  Raises:
    UserError: no such data set.
  """
  dataset = _find(name)[1]
  parameters = inspect.signature(dataset).parameters
  options = {k: p.default for k, p in parameters.items() if k not in _COMMON}
  return options | ({BUCKETS: ()} if getattr(dataset, "has_buckets", False) else {})


def open_source(
  name: str,
  split: str,
  resolution: int,
  seed: int,
  options: dict[str, Any] | None = None,
  log_dir: str | None = None,
) -> Source:
  """Opens one split of a data set.

  Args:
    name: key of `DATASETS`.
    split: one of `splits(name)`.
    resolution: side of the square pictures, in pixels.
    seed: of whatever the set draws when it is opened.
    options: some of `default_options(name)`, with other values.
    log_dir: where sets that read files name those they skip. On one host only.

  Raises:
    UserError: an unknown name, split or option, or what the set itself finds.
  """
  dataset = _find(name)[1]
  known = default_options(name)
  for option in options or {}:
    if option not in known:
      raise unknown(f"option of data set '{name}'", option, known)
  arguments = dict(options or {})
  buckets = arguments.pop(BUCKETS, ())
  if "log_dir" in inspect.signature(dataset).parameters:
    arguments["log_dir"] = log_dir
  source = dataset(split=split, resolution=resolution, seed=seed, **arguments)
  if buckets:
    source.bucket(shapes_of(buckets, resolution))
  return source
