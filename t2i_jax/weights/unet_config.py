"""Our options of a U-Net as diffusers' config.json has them, and back.

The options are those of `weights/unet.py`.
"""

from collections.abc import Mapping
from typing import Any

from t2i_jax.errors import UserError
from t2i_jax.weights.unet import Options
from t2i_jax.weights.unet_settings import CONDITIONED, FIXED, FIXED_OF, KINDS, PLAIN, checked

SIZE_WIDTH = 256  # of the embedding of one of SDXL's numbers
HEAD_CHANNELS = 64  # where a number of heads is given, and this is not read


def from_diffusers(published: Mapping[str, Any]) -> dict[str, Any]:
  """Our options of a config.json.

  Raises:
    UserError: for what our network has not, by the name of its setting.
  """
  kind = published.get("_class_name")
  if kind not in KINDS:
    raise UserError(f"a U-Net of class {kind} is not known; known: {', '.join(KINDS)}")
  given = checked(kind, published)
  channels = given["block_out_channels"]
  base = channels[0]
  multipliers = tuple(width // base if width % base == 0 else width / base for width in channels)
  if [int(base * multiple) for multiple in multipliers] != list(channels):
    raise UserError(f"a U-Net with block_out_channels={list(channels)} is not known, only with "
                    "multiples of the first")
  if given["time_embedding_dim"] not in (None, 4 * base):
    raise UserError(f"a U-Net with time_embedding_dim={given['time_embedding_dim']} is not known, "
                    f"only with four times its first channels, {4 * base}")
  order = given["flip_sin_to_cos"], given["freq_shift"]
  if order not in ((True, 0), (False, 1)):
    raise UserError("a U-Net with flip_sin_to_cos={} and freq_shift={} is not known, only with "
                    "true and 0 or false and 1".format(*order))
  attending = _attending(kind, given)
  heads = _heads if kind == CONDITIONED else _plain_heads
  return {
    "resolution": _side(given["sample_size"]),
    "in_channels": given["in_channels"],
    "out_channels": given["out_channels"],
    "channels": base,
    "multipliers": multipliers,
    "blocks": _same(given, "layers_per_block"),
    "attention": "block" if kind == PLAIN else "transformer",
    "attention_levels": attending,
    "groups": given["norm_num_groups"],
    "epsilon": given["norm_eps"],
    "scale_shift": _one_of(given, "resnet_time_scale_shift", ("default", "scale_shift")) == 1,
    "dropout": given["dropout"],
    "block_resample": _block_resample(kind, given),
    "symmetric": _one_of(given, "downsample_padding", (0, 1)) == 1,
    "sine_first": order == (False, 1),
    "classes": given["num_class_embeds"] or 0,
    **heads(given, attending),
    **(_text(given, attending) if kind == CONDITIONED else _NO_TEXT),
  }


def to_diffusers(options: Options) -> dict[str, Any]:
  """The inverse of `from_diffusers`: config.json of the U-Net that diffusers builds alike.

  Raises:
    UserError: diffusers' U-Nets have no such options.
  """
  _check_options(options)
  kind = CONDITIONED if options["attention"] == "transformer" else PLAIN
  channels = [int(options["channels"] * multiple) for multiple in options["multipliers"]]
  levels = range(len(channels))
  number = lambda i: (  # noqa: E731
    1 if i in options["attention_levels"]
    else 2 if kind == PLAIN and options["block_resample"] else 0
  )  # fmt: skip
  down, up = KINDS[kind]
  config = {
    "_class_name": kind, **FIXED, **FIXED_OF[kind],
    "sample_size": options["resolution"] or None,
    "in_channels": options["in_channels"],
    "out_channels": options["out_channels"],
    "block_out_channels": channels,
    "layers_per_block": options["blocks"],
    "down_block_types": [down[number(i)] for i in levels],
    "up_block_types": [up[number(i)] for i in reversed(levels)],
    "norm_num_groups": options["groups"],
    "norm_eps": options["epsilon"],
    "resnet_time_scale_shift": "scale_shift" if options["scale_shift"] else "default",
    "dropout": options["dropout"],
    "downsample_padding": int(options["symmetric"]),
    "flip_sin_to_cos": not options["sine_first"],
    "freq_shift": int(options["sine_first"]),
    "num_class_embeds": options["classes"] or None,
  }  # fmt: skip
  heads = [options["heads"] or max(width // options["head_channels"], 1) for width in channels]
  if kind == CONDITIONED:
    return config | _written_text(options, heads)
  sample = "resnet" if options["block_resample"] else "conv"
  return config | {
    "attention_head_dim": _head_width(options, channels, heads),
    "attn_norm_num_groups": options["groups"],
    "downsample_type": sample,
    "upsample_type": sample,
  }


def linear_projections(options: Options) -> bool:
  """Whether the projections around transformers are matrices, as published: where heads have one
  width (Stable Diffusion 2, XL), and not where they have one number (Stable Diffusion 1)."""
  return not options["heads"]


def _same(given: Mapping[str, Any], name: str) -> Any:
  value = given[name]
  if not isinstance(value, tuple):
    return value
  if len(set(value)) > 1:
    raise UserError(f"a U-Net with {name}={list(value)} is not known, only with the same at every "
                    "level")
  return value[0]


def _one_of(given: Mapping[str, Any], name: str, known: tuple) -> int:
  if given[name] not in known:
    raise UserError(f"a U-Net with {name}={given[name]} is not known, only with "
                    f"{' or '.join(map(str, known))}")
  return known.index(given[name])


def _side(sample_size: Any) -> int:
  if isinstance(sample_size, tuple):
    return sample_size[0] if len(set(sample_size)) == 1 else 0
  return sample_size or 0


def _attending(kind: str, given: Mapping[str, Any]) -> tuple[int, ...]:
  levels = []
  for name, known, ordered in zip(
    ("down_block_types", "up_block_types"), KINDS[kind], (1, -1), strict=True
  ):
    unknown = [block for block in given[name] if block not in known]
    if unknown:
      raise UserError(f"a U-Net with {unknown[0]} in {name} is not known, only with "
                      f"{', '.join(known)}")
    levels.append([i for i, block in enumerate(given[name][::ordered]) if "Attn" in block])
  if levels[0] != levels[1]:
    raise UserError(f"a U-Net that attends at levels {levels[0]} on the way down and {levels[1]} "
                    "on the way up is not known, only with the same")
  return tuple(levels[0])


def _block_resample(kind: str, given: Mapping[str, Any]) -> bool:
  """Whether residual blocks change the size, at all levels but the coarsest or at none."""
  if kind == CONDITIONED:
    return False
  found = set()
  for name, sampler, ordered in (
    ("down_block_types", "downsample_type", 1), ("up_block_types", "upsample_type", -1)
  ):
    _one_of(given, sampler, ("conv", "resnet"))
    for i, block in enumerate(given[name][::ordered]):
      # Nothing is halved at the coarsest level, and nothing doubled at the finest.
      if i != (len(given[name]) - 1 if ordered == 1 else 0):
        found.add(block.startswith("Resnet") or "Attn" in block and given[sampler] == "resnet")
  if len(found) > 1:
    raise UserError("a U-Net whose levels change the size both by residual blocks and by "
                    "convolutions is not known")
  return found == {True}


def _heads(given: Mapping[str, Any], attending: tuple[int, ...]) -> dict[str, int]:
  """Of `UNet2DConditionModel`, whose `attention_head_dim` is a number of heads."""
  name = "num_attention_heads" if given["num_attention_heads"] else "attention_head_dim"
  heads, channels = given[name], given["block_out_channels"]
  if not isinstance(heads, tuple):
    return {"heads": heads, "head_channels": HEAD_CHANNELS}
  # The middle is as wide as the coarsest level, and attends.
  used = sorted({*attending, len(channels) - 1})
  widths = {channels[i] / heads[i] for i in used}
  if len(widths) == 1 and widths == {channels[-1] // heads[-1]}:
    return {"heads": 0, "head_channels": channels[-1] // heads[-1]}
  if len({heads[i] for i in used}) == 1:
    return {"heads": heads[-1], "head_channels": HEAD_CHANNELS}
  raise UserError(f"a U-Net with {name}={list(heads)} is not known, only with one number of heads "
                  "or one width of a head")


def _plain_heads(given: Mapping[str, Any], attending: tuple[int, ...]) -> dict[str, int]:
  """Of `UNet2DModel`, whose `attention_head_dim` is the width of a head."""
  width, channels = given["attention_head_dim"], given["block_out_channels"]
  groups = (given["norm_num_groups"], *(
    () if given["resnet_time_scale_shift"] == "scale_shift" else (None,)
  ))  # fmt: skip
  _one_of(given, "attn_norm_num_groups", groups)
  if width is None:
    return {"heads": 1, "head_channels": HEAD_CHANNELS}
  bad = [channels[i] for i in {*attending, len(channels) - 1} if channels[i] % width]
  if bad:
    raise UserError(f"a U-Net with attention_head_dim={width} is not known, which does not divide "
                    f"its {bad[0]} channels")
  return {"heads": 0, "head_channels": width}


_NO_TEXT = {
  "context_width": 0, "pooled_width": 0, "pooled_mlp": False, "depths": (), "middle_depth": 1,
}


def _text(given: Mapping[str, Any], attending: tuple[int, ...]) -> dict[str, Any]:
  depths = given["transformer_layers_per_block"]
  levels = len(given["block_out_channels"])
  depths = depths if isinstance(depths, tuple) else (depths,) * levels
  if any(isinstance(depth, (tuple, list)) for depth in depths):
    raise UserError(f"a U-Net with transformer_layers_per_block={list(depths)} is not known, only "
                    "with one number a level")
  _one_of(given, "addition_embed_type", (None, "text_time"))
  pooled = given["addition_embed_type"] is not None
  if pooled and given["addition_time_embed_dim"] != SIZE_WIDTH:
    raise UserError(f"a U-Net with addition_time_embed_dim={given['addition_time_embed_dim']} is "
                    f"not known, only with {SIZE_WIDTH}")
  return {
    "context_width": _same(given, "cross_attention_dim"),
    "pooled_width": given["projection_class_embeddings_input_dim"] if pooled else 0,
    "pooled_mlp": pooled,
    "depths": () if set(depths) == {1} else tuple(
      depth if i in attending else 0 for i, depth in enumerate(depths)
    ),
    "middle_depth": depths[-1],
  }


def _written_text(options: Options, heads: list[int]) -> dict[str, Any]:
  depths = [depth or 1 for depth in options["depths"] or [1] * len(heads)]
  last = len(heads) - 1
  if last in options["attention_levels"] and depths[last] != options["middle_depth"]:
    raise UserError(f"diffusers has no U-Net whose middle is {options['middle_depth']} transformer "
                    f"blocks deep and its coarsest level {depths[last]}")
  depths[last] = options["middle_depth"]
  pooled = options["pooled_width"]
  return {
    "cross_attention_dim": options["context_width"],
    "transformer_layers_per_block": depths if len(set(depths)) > 1 else depths[0],
    "attention_head_dim": options["heads"] or heads,
    "use_linear_projection": linear_projections(options),
    "addition_embed_type": "text_time" if pooled else None,
    "addition_time_embed_dim": SIZE_WIDTH if pooled else None,
    "projection_class_embeddings_input_dim": pooled or None,
  }


def _head_width(options: Options, channels: list[int], heads: list[int]) -> int | None:
  used = {*options["attention_levels"], len(channels) - 1}
  if all(heads[i] == 1 for i in used):
    return None
  widths = {channels[i] // heads[i] for i in used}
  if len(widths) > 1:
    raise UserError(f"diffusers' {PLAIN} has one width of all heads, and this network one number, "
                    f"{options['heads']}")
  return widths.pop()


def _check_options(options: Options) -> None:
  """Raises for what is of our network alone."""
  own = {"patch": 1, "coordinates": 0}
  for name, value in own.items():
    if options.get(name, value) != value:
      raise UserError(f"diffusers has no U-Net with {name}={options[name]}, only with {value}")
  if options["attention"] not in ("block", "transformer"):
    raise UserError(f"diffusers has no U-Net with attention={options['attention']}, only with "
                    "block or transformer")
  if options["attention"] == "block" and (options["context_width"] or options["pooled_width"]):
    raise UserError("diffusers has no U-Net with attention=block that reads a text")
  if options["attention"] == "transformer" and options["block_resample"]:
    raise UserError("diffusers has no U-Net with attention=transformer and block_resample")
  if options["attention"] == "transformer" and not options["context_width"]:
    raise UserError("diffusers has no U-Net with attention=transformer and no text")
  if options["pooled_width"] and not options["pooled_mlp"]:
    raise UserError("diffusers has no U-Net with a pooled text and pooled_mlp=False")
