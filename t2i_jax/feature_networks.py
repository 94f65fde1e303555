"""Frozen networks that metrics measure with, read from the files that a user gives.

Nothing is downloaded, and no network has random weights: what is not given is not measured.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t2i_jax import assembly, export, recipe
from t2i_jax.conversion import blamed
from t2i_jax.conversion.clip import open_towers
from t2i_jax.errors import UserError, unknown
from t2i_jax.metrics import dinov2, inception, resize
from t2i_jax.metrics.network import Features, Network
from t2i_jax.metrics.registry import (
  DINOV2,
  FEATURE_NET,
  INCEPTION,
  KINDS,
  PERCEPTUAL,
  TOWERS,
)  # fmt: skip
from t2i_jax.systems import trees
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.text.clip import TOWERS as TOWERS_GROUP
from t2i_jax.text import clip
from t2i_jax.text.public_tokenizer import read_tokenizer
from t2i_jax.weights import text_encoders as maps
from t2i_jax.weights.dinov2 import load_dinov2
from t2i_jax.weights.inception import load_inception
from t2i_jax.weights.perceptual import load_lpips

# What each kind is read from, for people.
SOURCES = {
  INCEPTION: "pt_inception-2015-12-05-6726825d.pth, or torch-fidelity's copy of it",
  DINOV2: "a folder of transformers, such as facebook/dinov2-large",
  TOWERS: "a folder of transformers, such as openai/clip-vit-base-patch32, or an export of clip",
  PERCEPTUAL: "an export of lpips, or the folder of its two public files",
  FEATURE_NET: "an export of feature_net",
}


class Networks:
  """Networks by kind; each is read when it is first asked for, and kept.

  Attributes:
    paths: by kind, of what `SOURCES` says.
    preprocessing: of the Inception, a key of `resize.MODES`.
  """

  def __init__(self, paths: Mapping[str, str | os.PathLike], mesh: Mesh, batch_size: int = 64,
               preprocessing: str = "clean"):
    for kind in paths:
      if kind not in KINDS:
        raise unknown("kind of network", kind, KINDS)
    if preprocessing not in resize.MODES:
      raise unknown("preprocessing of the Inception", preprocessing, resize.MODES)
    self.paths = {kind: Path(path).expanduser() for kind, path in paths.items() if path}
    self.preprocessing, self._mesh, self._batch_size = preprocessing, mesh, batch_size
    self._found: dict[tuple[str, str], Features] = {}

  def has(self, kind: str) -> bool:
    """Whether a file of it was given."""
    return kind in self.paths

  def of(self, kind: str, preprocessing: str = "") -> Features:
    """The network of a kind.

    Args:
      kind: one of `KINDS`.
      preprocessing: "cmmd" for CLIP's towers with pictures prepared as CMMD's are; otherwise the
        usual one.

    Raises:
      UserError: none was given, or what was given is not whole or something else.
    """
    if kind not in self.paths:
      raise UserError(f"no network {kind} was given; it is read from {SOURCES[kind]}")
    if (kind, preprocessing) not in self._found:
      path = self.paths[kind]
      if kind == INCEPTION:
        network = inception_network(path, self.preprocessing)
      elif kind == TOWERS:
        network = towers_network(path, preprocessing == "cmmd")
      else:
        network = {DINOV2: dinov2_network, PERCEPTUAL: perceptual_network,
                   FEATURE_NET: feature_net_network}[kind](path)  # fmt: skip
      self._found[kind, preprocessing] = Features(network, self._mesh, self._batch_size)
    return self._found[kind, preprocessing]


def inception_network(path: str | os.PathLike, mode: str = "clean", divisor: int = 1) -> Network:
  """The Frechet distance's Inception; arguments as of `load_inception` and `inception_input`."""
  module = inception.Inception(divisor)

  def outputs(variables, images):
    return module.apply(variables, resize.inception_input(images, inception.SIDE, mode))

  name = "inception-2015-12-05" if divisor == 1 else f"inception-2015-12-05/{divisor}"
  return Network(
    INCEPTION, name, f"{mode}: {resize.MODES[mode]}", load_inception(path, divisor), outputs
  )


def dinov2_network(path: str | os.PathLike) -> Network:
  """DINOv2, of pictures of 224 px as Stein et al. 2023 prepare them."""
  config, variables = load_dinov2(path)
  if dinov2.SIDE % config.patch:
    raise UserError(f"'{path}' has patches of {config.patch} px, which do not divide the "
                    f"{dinov2.SIDE} px of its pictures")

  def outputs(variables, images):
    x = resize.antialiased(images.astype(jnp.float32), dinov2.SIDE)
    x = (jnp.clip(x, 0, 255) / 255 - jnp.asarray(dinov2.MEAN)) / jnp.asarray(dinov2.DEVIATION)
    return {"features": dinov2.DINOv2(config).apply(variables, x)}

  words = f"{dinov2.SIDE} px, bicubic, antialiased; ImageNet's mean and deviation"
  return Network(DINOV2, f"dinov2-{config.title}", words, variables, outputs)


def towers_network(path: str | os.PathLike, on_device: bool = False) -> Network:
  """CLIP with both towers, whose `features` are unit vectors.

  Args:
    path: a folder of transformers or OpenCLIP with its tokenizer, or an export of system clip.
    on_device: resize pictures as CMMD does, in floating point; otherwise as CLIP's authors do, by
      Pillow.
  """
  path = Path(path).expanduser()
  if (path / export.VARIABLES).is_file():
    exported = _exported(path, "clip")
    module = _system(exported).network
    variables = trees.group(exported.variables, TOWERS_GROUP)
    (tokenizer,) = exported.tokenizers.of.values()
  else:
    module, variables, tokenizer = _public_towers(path)
  vision = module.vision_config
  side = vision.resolution

  def outputs(variables, images):
    x = clip.prepared(normalize_images(images), side)
    return {"features": module.apply(variables, x, method="embed_images")}

  def texts(variables, ids):
    return module.apply(variables, ids, method="embed_text")

  host: Callable[[np.ndarray], np.ndarray] = lambda images: images  # noqa: E731
  words = f"{side} px, bicubic on the device; CLIP's mean and deviation"
  if not on_device:
    host = lambda images: resize.shorter_side(images, side)  # noqa: E731
    words = f"{side} px, Pillow's bicubic, the middle; CLIP's mean and deviation"
  return Network(
    TOWERS, _title(vision), words, variables, outputs, host, texts=texts,
    tokens=lambda captions: tokenizer.encode(captions)["ids"],
  )  # fmt: skip


def _public_towers(path: Path) -> tuple[clip.CLIP, dict[str, Any], Any]:
  towers = open_towers(str(path))
  sizes = towers.sizes
  module = clip.CLIP(sizes, towers.vision)
  with blamed(towers.text.source):
    abstract = jax.eval_shape(
      module.init, jax.random.key(0),
      jnp.zeros((1, towers.vision.resolution, towers.vision.resolution, 3)),
      jnp.zeros((1, sizes.length), jnp.int32),
    )
  names = maps.OPEN_CLIP if towers.text.names is maps.OPEN_CLIP_TEXT else maps.CLIP
  params = names.load(
    towers.text.tensors, abstract["params"], source=towers.text.weights, dtype=np.float32
  )
  with blamed(f"the tokenizer in {path}"):
    tokenizer = read_tokenizer(path, "clip", sizes.length)
  return module, {"params": params}, tokenizer


def _title(vision: clip.VisionConfig) -> str:
  """`clip-vit-b-32@224`: the tower's size, patch and pictures; and what OpenAI's have not."""
  known = {(768, 12): "b", (1024, 24): "l", (1280, 32): "h", (1664, 48): "bigg"}
  size = known.get((vision.width, vision.layers), f"{vision.width}x{vision.layers}")
  other = "" if vision.activation == "quick_gelu" else f"-{vision.activation}"
  return f"clip-vit-{size}-{vision.patch}@{vision.resolution}{other}"


def perceptual_network(path: str | os.PathLike) -> Network:
  """LPIPS: an export, or the folder of the two public files."""
  path = Path(path).expanduser()
  if (path / export.VARIABLES).is_file():
    exported = _exported(path, "lpips")
    system = _system(exported)
    variables = exported.variables
  else:
    blocks, params = load_lpips(path)
    config = recipe.base("lpips", "scenes")
    config.model.blocks = blocks
    system, variables = assembly.build_with(config, {}), {"params": params}
  return Network(
    PERCEPTUAL, "lpips-vgg16", "[-1, 1]; ImageNet's mean and deviation", variables,
    distances=_distances(system), smallest=16,
  )  # fmt: skip


def feature_net_network(path: str | os.PathLike) -> Network:
  """A small classifier that was trained here, whose scores are called by its data set."""
  exported = _exported(Path(path).expanduser(), "feature_net")
  system = _system(exported)
  trained_on = exported.config.data.name

  def outputs(variables, images):
    return {"features": system.features(variables, normalize_images(images))}

  return Network(
    FEATURE_NET, f"feature_net-{trained_on}", "[-1, 1], not resized", exported.variables, outputs,
    distances=_distances(system), label=trained_on,
    remarks=(f"in the features of a small classifier of {trained_on}: comparable with scores of "
             "the same digest only",),
  )  # fmt: skip


def _distances(system: Any) -> Callable:
  def distances(variables, a, b):
    return system.distance(variables, normalize_images(a), normalize_images(b))

  return distances


def _exported(path: Path, system: str) -> export.Export:
  exported = export.read(path)
  if exported.config.system != system:
    raise UserError(f"'{path}' is an export of {exported.config.system}, not of {system}")
  return exported


def _system(exported: export.Export) -> Any:
  """The system of an export; UserError where its arrays are not those that it has now."""
  system = assembly.build_with(exported.config, exported.components)
  assembly.check_fits(system, exported)
  return system
