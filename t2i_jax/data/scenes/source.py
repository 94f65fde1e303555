"""The scenes as a data set."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from t2i_jax.data.base import Rows, Source, digest_of
from t2i_jax.data.scenes.grammar import LEVELS, Scene, caption, captions_of
from t2i_jax.data.scenes.labels import labels_of
from t2i_jax.data.scenes.render import mix, render
from t2i_jax.data.scenes.split import (
  SPLITS,
  Random,
  canonical,
  draw_scene,
  one_object_scenes,
  reverse,
  split_of,
  two_object_scenes,
)
from t2i_jax.errors import UserError, unknown

_EPOCH = 100_000  # rows that an infinite split calls an epoch
_HELD_OUT_COUNTS = 2048  # distinct scenes of level "counts", which has too many to list
_CAPTIONS = 20_000  # captions that a tokenizer is trained on
_DIGESTED = 64  # scenes that tell one version of the data set from another
_PICTURE_STREAM = 0x5CE4E5  # separates a row's layout from its scene


class Scenes(Source):
  """Procedural captioned pictures.

  Training rows are made on the fly: row i's scene and picture are a pure
  function of (seed, i), for any i >= 0; its level is uniform over `levels`. A
  held-out split is a finite list of distinct scenes in an order that `seed`
  draws: all there are at levels "one" and "two", 2048 at level "counts". Only
  the phrasing comes from a row's draw.

  Args:
    split: one of `SPLITS`.
    resolution: side of the pictures, at least 16.
    seed: of the rows' order and layouts; the split itself does not depend on it.
    levels: some of `LEVELS`.
    labels: whether rows have a `label`, int32 [attributes] as in `labels.NAMES`; of level "one".
    sizes: whether rows have a `size` and a `crop`: they are made at the resolution, and whole.

  Raises:
    UserError: on an unknown split or level, labels of other levels, or too small a resolution.
  """

  def __init__(
    self,
    split: str = "train",
    resolution: int = 32,
    seed: int = 0,
    levels: tuple[str, ...] = ("one",),
    labels: bool = False,
    sizes: bool = False,
  ):
    if split not in SPLITS:
      raise unknown("split of scenes", split, SPLITS)
    for level in levels:
      if level not in LEVELS:
        raise unknown("level of scenes", level, LEVELS)
    if not levels:
      raise UserError(f"scenes: no levels given; name some of {', '.join(LEVELS)}")
    if labels and set(levels) != {"one"}:
      raise UserError(f"scenes of levels {', '.join(levels)} have no labels, only those of one "
                      "object; set data.options.levels=one")
    if resolution < 16:
      raise UserError(f"scenes: resolution {resolution} is too small to draw; use 16 or more")
    self.split = split
    self.resolution = resolution
    self.seed = seed
    self.levels = tuple(levels)
    self.labels, self.sizes = labels, sizes
    self.infinite = split == "train"
    self.shuffled = True
    self._held_out = () if self.infinite else self._list_held_out()

  def __len__(self) -> int:
    return _EPOCH if self.infinite else len(self._held_out)

  def scenes(self, indices: np.ndarray) -> list[Scene]:
    """The scenes of some rows."""
    if not self.infinite:
      return [self._held_out[int(i) % len(self._held_out)] for i in indices]
    return [self._train_scene(int(i)) for i in indices]

  def fetch(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    indices = np.asarray(indices, np.int64)
    if not self.infinite:
      indices = indices % len(self)
    scenes = self.scenes(indices)
    seed = mix(np.array([self.seed % 2**64], np.uint64), _PICTURE_STREAM)
    layouts = mix(seed ^ indices.astype(np.uint64), 1)
    images = render(scenes, self.resolution, layouts)
    return dataclasses.replace(self._described(scenes, draws), image=images)

  def describe(self, indices: np.ndarray, draws: np.ndarray) -> Rows:
    return self._described(self.scenes(indices), draws)

  def _described(self, scenes: list[Scene], draws: np.ndarray) -> Rows:
    return Rows(
      image=None,
      captions=[caption(s, int(d)) for s, d in zip(scenes, draws, strict=True)],
      extra=self._extra(scenes),
    )

  def digest(self) -> str:
    return digest_of(self.seed, self.split, self.levels, self.scenes(np.arange(_DIGESTED)))

  def _extra(self, scenes: list[Scene]) -> dict[str, np.ndarray]:
    extra = {"label": labels_of(scenes)} if self.labels else {}
    if self.sizes:
      extra["size"] = np.full((len(scenes), 2), self.resolution, np.int32)
      extra["crop"] = np.zeros((len(scenes), 2), np.int32)
    return extra

  def captions(self) -> Iterator[str]:
    random = Random(self.seed, _PICTURE_STREAM)
    for index in range(_CAPTIONS):
      yield caption(self.scenes([index])[0], random.word())

  def every_caption(self) -> Iterator[str]:
    if self.infinite and "counts" in self.levels:
      raise UserError("scenes of level 'counts' have too many captions to list; leave the level "
                      "out of data.options.levels")
    for scene in self._all_scenes() if self.infinite else self._held_out:
      yield from captions_of(scene)

  def _all_scenes(self) -> Iterator[Scene]:
    """Every scene of the split, at levels that can be listed."""
    for level in self.levels:
      for scene in one_object_scenes() if level == "one" else two_object_scenes():
        if split_of(scene) == self.split:
          yield scene
          if level == "two":
            yield reverse(scene)

  def _train_scene(self, index: int) -> Scene:
    random = Random(self.seed, index)
    return draw_scene(random.pick(self.levels), "train", random)

  def _list_held_out(self) -> tuple[Scene, ...]:
    random = Random(self.seed, SPLITS.index(self.split))
    scenes = []
    for level in self.levels:
      if level == "one":
        scenes += [scene for scene in one_object_scenes() if split_of(scene) == self.split]
      elif level == "two":
        listed = [scene for scene in two_object_scenes() if split_of(scene) == self.split]
        scenes += [random.pick((scene, reverse(scene))) for scene in listed]
      else:
        distinct = {}
        while len(distinct) < _HELD_OUT_COUNTS:
          scene = draw_scene(level, self.split, random)
          distinct.setdefault(canonical(scene), scene)
        scenes += distinct.values()
    for last in range(len(scenes) - 1, 0, -1):
      other = random.pick(range(last + 1))
      scenes[last], scenes[other] = scenes[other], scenes[last]
    return tuple(scenes)
