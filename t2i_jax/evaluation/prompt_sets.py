"""Which prompts are drawn: a split's captions, or those of a file."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from t2i_jax import data, recipe, run_data
from t2i_jax.data.base import Source, digest_of
from t2i_jax.data.loader import fetch_rows
from t2i_jax.errors import UserError
from t2i_jax.prompts import Prompt, read_prompts

PICTURES = 256  # of a split, by default


@dataclasses.dataclass(frozen=True)
class PromptSet:
  """Prompts, and how often each is drawn.

  Attributes:
    name: of the split, or of the file without its ending.
    prompts: in the order in which they are drawn; picture i is of prompt i // each.
    each: pictures of a prompt.
    split: the data set's split that they are captions of, or "".
  """

  name: str
  prompts: tuple[Prompt, ...]
  each: int
  split: str = ""

  @property
  def total(self) -> int:
    """Pictures."""
    return len(self.prompts) * self.each

  @property
  def captions(self) -> list[str]:
    """Of every picture."""
    return [prompt.text for prompt in self.prompts for _ in range(self.each)]

  @property
  def digest(self) -> str:
    return digest_of(self.each, *(prompt.text for prompt in self.prompts))

  def groups(self) -> dict[str, dict[str, np.ndarray]]:
    """Of each column that is a category: indices of the pictures by its values.

    A category has texts for values, two at least and fewer than a fourth of the prompts.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    names = dict.fromkeys(name for prompt in self.prompts for name in prompt.about)
    for name in names:
      values = [prompt.about.get(name) for prompt in self.prompts]
      if not all(isinstance(value, str) and value for value in values):
        continue
      if not 1 < len(set(values)) < len(values) / 4:
        continue
      rows = np.repeat(np.array(values), self.each)
      found[name] = {value: np.flatnonzero(rows == value) for value in dict.fromkeys(values)}
    return found


def of_split(source: Source, split: str, pictures: int, each: int) -> PromptSet:
  """Captions of a split's `rows_of`; past its end the same rows again, with their next captions."""
  count = _prompts_of(pictures, each)
  rows = source.describe(rows_of(source, count), np.arange(count, dtype=np.uint64))
  return PromptSet(split, tuple(map(Prompt, rows.captions)), each, split)


def of_file(path: str, pictures: int | None, each: int) -> PromptSet:
  """A file's prompts, all of them unless fewer `pictures` are asked for.

  Raises:
    UserError: it cannot be read, or holds fewer.
  """
  prompts = read_prompts(path)
  count = len(prompts) if pictures is None else _prompts_of(pictures, each)
  if count > len(prompts):
    raise UserError(f"--pictures={pictures} asks for {count} prompts, and --prompts={path} holds "
                    f"{len(prompts)}; draw fewer, or several of each with --each")
  name = path.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
  return PromptSet(name or "prompts", tuple(prompts[:count]), each)


def _prompts_of(pictures: int, each: int) -> int:
  if pictures % each:
    raise UserError(f"--pictures={pictures} does not divide by --each={each}; draw a multiple")
  return pictures // each


def rows_of(source: Source, count: int) -> np.ndarray:
  """The rows of a split that `count` captions or real pictures are of, int64 [count], ascending.

  Where a split that is not shuffled has more, they are spread evenly over it: sets lie in the order
  of their classes, of the parts of a mixture, or of pictures with many rows each, and the first
  rows would be of a few of those. Past the end of a split come the same rows again.
  """
  if source.infinite or source.shuffled or count >= len(source):
    return np.arange(count) % len(source)
  return np.arange(count) * len(source) // count


def real_pictures(source: Source, count: int, batch_size: int) -> Iterator[np.ndarray]:
  """Pictures of a split, in the order of as many captions, uint8 [n, R, R, 3] each."""
  for start in range(0, count, batch_size):
    yield pictures_of(source, np.arange(start, min(start + batch_size, count)), count)


def pictures_of(source: Source, index: np.ndarray, count: int) -> np.ndarray:
  """Some of the `count` real pictures of a split, by their numbers, uint8 [n, R, R, 3]."""
  return fetch_rows(source, rows_of(source, count)[index], index.astype(np.uint64))[1].image


class Sources:
  """The splits of a data set, opened once for a resolution."""

  def __init__(self, config: Any):
    self.config = config
    self._open: dict[tuple[str, int, bool], Source] = {}

  def of(self, split: str, resolution: int, bucketed: bool = False) -> Source:
    """A split, whose pictures are squares unless they shall be as `bucketed` as in training."""
    check_splits(self.config.data.name, [split])
    key = (split, resolution, bucketed)
    if key not in self._open:
      config = self.config
      if not bucketed and data.BUCKETS in config.data.options:
        config = copy.deepcopy(config)
        with config.unlocked():
          config.data.options[data.BUCKETS] = ()
      self._open[key] = run_data.open_data(config, split, resolution)
    return self._open[key]


def check_splits(name: str, splits: list[str] | tuple[str, ...]) -> None:
  """Raises UserError for a split that a data set does not have."""
  from t2i_jax.errors import unknown

  for split in splits:
    if split not in data.splits(name):
      raise unknown(f"split of data set '{name}'", split, data.splits(name))


def set_data(config: Any, name: str, pairs: list[str]) -> None:
  """Sets what a config is evaluated on.

  Args:
    config: to be changed.
    name: of another data set than the training's; "" for the same.
    pairs: options of it, as texts "NAME=VALUE".

  Raises:
    UserError: for a data set or an option that does not exist, or a bad value.
  """
  from t2i_jax.errors import unknown
  from t2i_jax.values import typed

  if name:
    with config.unlocked():
      config.data.name, config.data.options = recipe.dataset_of("--data", name)
      config.evaluate.splits = ()  # which are of the other one
  defaults = data.default_options(config.data.name)
  with config.unlocked():
    for text in pairs:
      name, equals, value = text.partition("=")
      if not equals or name not in defaults:
        raise unknown(f"option of data set '{config.data.name}'", name, defaults)
      config.data.options[name] = typed(f"data option {name}", value, defaults[name])
