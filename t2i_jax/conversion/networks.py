"""The kinds of denoisers in public models: their configs and their names, in one shape for all."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from t2i_jax.weights import (
  dit,
  mmdit,
  transformer_config,
  u_vit,
  unet,
  unet_config,
  unet_single_file,
)  # fmt: skip
from t2i_jax.weights.key_map import KeyMap

Options = Mapping[str, Any]
LABEL_DROP = 0.1


@dataclasses.dataclass(frozen=True)
class Network:
  """A kind of denoiser.

  Attributes:
    folder: of a pipeline of diffusers, that it lies in.
    from_diffusers: our options of a config.json.
    to_diffusers: a config.json of our options.
    diffusers_map: its names there.
    map_of: its names in a checkpoint of some tensors.
    sizes_of: what of its options only its parameters say.
    settings: of a config's `model`, for its options; may hold more than a system has.
  """

  folder: str
  from_diffusers: Callable[[Options], dict[str, Any]]
  to_diffusers: Callable[[Options], dict[str, Any]]
  diffusers_map: Callable[[Options], KeyMap]
  map_of: Callable[[Mapping[str, Any], Options], KeyMap]
  sizes_of: Callable[[Mapping[str, Any]], dict[str, int]]
  settings: Callable[[Options], dict[str, Any]] = dict


def _of_transformer(tensors: Mapping[str, Any], options: Options) -> KeyMap:
  """By its names, diffusers' or the authors'."""
  if "largest" in options:
    kind, own = mmdit, "joint_blocks.0.x_block.attn.qkv.weight"
    if any(name.endswith(own) for name in tensors):
      return kind.single_file_map(options)
    return kind.diffusers_map(options)
  if "convolution" in options:
    return u_vit.authors_map(options)
  if options["modulation"] == "single":
    return dit.pixart_map(options)
  if "x_embedder.proj.weight" in tensors:
    return dit.authors_map(options)
  return dit.diffusers_map(options)


def _sizes_of_transformer(params: Mapping[str, Any]) -> dict[str, int]:
  widths = {}
  for name in ("context", "pooled"):
    layer = params.get(name, {})
    layer = layer.get("in", layer)
    widths[f"{name}_width"] = layer["kernel"].shape[0] if layer else 0
  return widths


def _settings_of_transformer(options: Options) -> dict[str, Any]:
  classes = options.get("classes", 0)
  # A share of the labels was dropped of all that are published, and that is what guides them.
  told = {"classes": (("class", classes),), "label_drop": LABEL_DROP} if classes else {}
  return {
    **options, "context_width": 0, "classes": (), **told,
    "cross_attention": bool(options["context_width"]), "pooled": bool(options["pooled_width"]),
  }


UNET = Network(
  "unet", unet_config.from_diffusers, unet_config.to_diffusers,
  lambda options: unet.diffusers_map(options, not unet_config.linear_projections(options)),
  unet_single_file.map_of, unet.widths_of,
)  # fmt: skip
TRANSFORMER = Network(
  "transformer", transformer_config.from_diffusers, transformer_config.to_diffusers,
  lambda options: _of_transformer({}, options), _of_transformer, _sizes_of_transformer,
  _settings_of_transformer,
)  # fmt: skip
