"""How well the verifier judges rendered pictures: true ones, changed captions,
and pictures that show no scene."""

import dataclasses

import numpy as np
from scipy import ndimage

from t2i_jax.data.scenes.grammar import (
  COLOURS,
  MOST_THINGS,
  PLACES,
  RELATIONS,
  SHAPES,
  SIZES,
  Scene,
  caption,
  parse,
)
from t2i_jax.data.scenes.render import BACKGROUND
from t2i_jax.data.scenes.source import Scenes
from t2i_jax.data.scenes.split import SPLITS, Random
from t2i_jax.data.scenes.verifier import verify

# What can be changed in a caption. "binding" gives two things each other's
# colour, or, where these are equal, shape: two attributes, which no sub-score
# but `all` may see.
CHANGES = {
  "one": ("colour", "shape", "size", "position"),
  "two": ("colour", "shape", "position", "binding"),
  "counts": ("colour", "shape", "count", "binding"),
}
DECOYS = ("blank", "white", "uniform noise", "noisy ground", "mean", "two objects", "twins")
NOISE_SIGMA = 25.0


def _changed_thing(thing, attribute: str, random: Random):
  if attribute == "count":
    value = random.pick([n for n in range(1, MOST_THINGS + 1) if n != thing.count])
    return dataclasses.replace(thing, count=value)
  name = "place" if attribute == "position" else attribute
  values = {"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "place": PLACES}[name]
  value = random.pick([v for v in values if v != getattr(thing, name)])
  return dataclasses.replace(thing, **{name: value})


def change(scene: Scene, attribute: str, random: Random) -> Scene | None:
  """A scene that differs from `scene` in one attribute of one thing (see
  `CHANGES`), or None where there is none (the binding of a single kind)."""
  if scene.level == "two" and attribute == "position":
    relation = random.pick([r for r in RELATIONS if r != scene.relation])
    return dataclasses.replace(scene, relation=relation)
  if attribute == "binding":
    return _rebound(scene)
  while True:
    things = list(scene.things)
    which = random.pick(range(len(things)))
    things[which] = _changed_thing(things[which], attribute, random)
    if len({(t.colour, t.shape) for t in things}) == len(things):
      return dataclasses.replace(scene, things=tuple(things))


def _rebound(scene: Scene) -> Scene | None:
  """The first two things with each other's colour or, where equal, shape."""
  if len(scene.things) < 2:
    return None
  a, b, *rest = scene.things
  name = "colour" if a.colour != b.colour else "shape"
  things = (
    dataclasses.replace(a, **{name: getattr(b, name)}),
    dataclasses.replace(b, **{name: getattr(a, name)}),
    *rest,
  )
  kinds = {(t.colour, t.shape) for t in things}
  says_same = scene.relation is None and set(things) == set(scene.things)
  if says_same or len(kinds) < len(things):
    return None
  return dataclasses.replace(scene, things=things)


def true_rows(level: str, resolution: int, n: int, seed: int = 0):
  """n pictures of a level and their captions: up to a third of them from each
  held-out split, the others from training's."""
  images, captions, left = [], [], n
  for split in reversed(SPLITS):
    source = Scenes(split, resolution, seed, (level,))
    indices = np.arange(left if source.infinite else min(n // 3, len(source)))
    left -= len(indices)
    rows = source.fetch(indices, np.array([Random(seed, i).word() for i in indices], np.uint64))
    images.append(rows.image)
    captions += rows.captions
  return np.concatenate(images), captions


def blurred(images: np.ndarray, sigma: float = 1.0) -> np.ndarray:
  """Pictures after a Gaussian blur of `sigma` pixels."""
  soft = ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0), mode="nearest")
  return np.rint(soft).astype(np.uint8)


def noisy(images: np.ndarray, sigma: float = NOISE_SIGMA, seed: int = 0) -> np.ndarray:
  """Pictures after additive Gaussian noise of `sigma` 255ths."""
  noise = np.random.default_rng(seed).normal(0.0, sigma, images.shape)
  return np.clip(np.rint(images + noise), 0, 255).astype(np.uint8)


def accepted_true(level: str, resolution: int, n: int, condition: str) -> dict[str, float]:
  """Share of true pictures that pass, by score. `condition` is "clean", "blur"
  (1 pixel) or "noise" (25/255)."""
  images, captions = true_rows(level, resolution, n)
  images = {"clean": lambda x: x, "blur": blurred, "noise": noisy}[condition](images)
  return {name: float(passed.mean()) for name, passed in verify(images, captions).items()}


def accepted_changed(level: str, resolution: int, n: int, attribute: str) -> dict[str, float]:
  """Share of pictures that pass for a caption changed in one attribute, by score."""
  images, captions = true_rows(level, resolution, n)
  random = Random(1)
  scenes = [change(parse(text), attribute, random) for text in captions]
  rows = [i for i, scene in enumerate(scenes) if scene is not None]
  texts = [caption(scenes[i], random.word()) for i in rows]
  return {name: float(passed.mean()) for name, passed in verify(images[rows], texts).items()}


def accepted_decoys(resolution: int, n: int, decoy: str) -> float:
  """Share of pictures of a kind (see `DECOYS`) that pass for a one-object caption.

  "two objects" shows the captioned object and another elsewhere; "twins" shows
  it and another of the same kind and size.
  """
  images, captions = true_rows("one", resolution, n)
  generator = np.random.default_rng(0)
  if decoy == "blank":
    images = np.full_like(images, BACKGROUND)
  elif decoy == "white":
    images = np.full_like(images, 255)
  elif decoy == "uniform noise":
    images = generator.integers(0, 256, images.shape, np.uint8)
  elif decoy == "noisy ground":
    images = noisy(np.full_like(images, BACKGROUND), 2 * NOISE_SIGMA)
  elif decoy == "mean":
    images = np.broadcast_to(np.rint(images.mean(axis=0)).astype(np.uint8), images.shape)
  elif decoy == "twins":
    # The object's own picture, moved by half a side and wrapped around.
    moved = np.roll(images, (resolution // 2, resolution // 2), (1, 2))
    images = np.where(moved != BACKGROUND, moved, images)
  else:
    other = np.roll(images, 1, axis=0)
    places = [parse(text).things[0].place for text in captions]
    apart = [i for i, place in enumerate(places) if places[i - 1] != place]
    images = np.where((other != BACKGROUND).any(-1, keepdims=True), other, images)[apart]
    captions = [captions[i] for i in apart]
  return float(verify(images, captions)["all"].mean())
