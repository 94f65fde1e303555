"""U-Nets in the layout of their authors' files: latent diffusion's and ADM's.

There the blocks are numbered one after the other: `input_blocks.0` is the first convolution, then
come, level by level, the residual blocks with their attention and what halves the size;
`output_blocks` come from the coarsest level to the finest. In a file that holds a whole model all
names stand behind `model.diffusion_model.`. The options are those of `weights/unet.py`.
"""

import re
from collections.abc import Mapping
from typing import Any

from t2i_jax.errors import UserError
from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.rules import (
  Rule,
  convolution,
  dense,
  linear,
  norm,
  pointwise,
  pointwise_1d,
)  # fmt: skip
from t2i_jax.weights.stacked import StackedKeyMap
from t2i_jax.weights.stored import Stored
from t2i_jax.weights.unet import Options, diffusers_map, stacks_of, transformer

SINGLE_FILE = "model.diffusion_model."  # how names begin in a file that holds a whole model
AVERAGES = "model_ema."
_OWN = r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\."
# What else such files hold: first stages, text encoders, averages, schedules.
_OTHERS = rf"^(?!({re.escape(SINGLE_FILE)})?{_OWN})"


def single_file_map(
  options: Options, convolutions: bool = False, new_order: bool = False
) -> KeyMap:
  """Names of a U-Net; reads them with and without `SINGLE_FILE`, writes them without.

  Args:
    options: of the network.
    convolutions: the projections around transformers are convolutions of size 1, as in Stable
      Diffusion 1, and not matrices.
    new_order: of the fused projections of attention=block, as in ADM-64: all queries, all keys, all
      values; otherwise, as in ADM's larger ones, those of the first head, of the second and so on.
  """
  last = len(options["multipliers"]) - 1
  rules = _trunk(options, convolutions, new_order)
  number = 0
  for i in range(last, -1, -1):
    for j in range(options["blocks"] + 1):
      theirs = f"output_blocks.{number}"
      rules += _resblock(f"up_{i}_{j}_block", f"{theirs}.0")
      rules += _attention(options, i, f"up_{i}_{j}_attention", f"{theirs}.1", convolutions,
                          new_order)
      number += 1
    if i:
      behind = 2 if i in options["attention_levels"] else 1
      theirs = f"output_blocks.{number - 1}.{behind}"
      rules += [*convolution(f"up_{i}_sample/conv", f"{theirs}.conv"),
                *_resblock(f"up_{i}_sample", theirs)]
  rules += [*norm("norm_out", "out.0"), *convolution("conv_out", "out.2")]
  return StackedKeyMap(
    rules, stacks_of(options), ignored=[_OTHERS], prefixes=[("", SINGLE_FILE)]
  )


def map_of(tensors: Mapping[str, Stored], options: Options, new_order: bool = False) -> KeyMap:
  """The map of a checkpoint, by its names: diffusers' of either age, or the authors'."""
  convolutions = has_convolutions(tensors)
  if "time_embedding.linear_1.weight" in tensors:
    old = any(name.endswith(".proj_attn.weight") for name in tensors)
    return diffusers_map(options, convolutions, old)
  return single_file_map(options, convolutions, new_order)


def classifier_map(options: Options, new_order: bool = False) -> KeyMap:
  """Names of ADM's noisy classifier; the options are of `networks.encoder_unet.EncoderUNet`."""
  rules = _trunk(options, False, new_order)
  if options["pool"] == "spatial":
    rules += [*dense("hidden", "out.0"), *dense("out", "out.2")]
  else:
    rules += [*norm("norm_out", "out.0"), *convolution("out", "out.3", pointwise)]
    pool = "out.2"
    for index, ours in enumerate(("query", "key", "value")):
      part = (index, 3)
      rules += [Rule(f"pool_out/{ours}/kernel", f"{pool}.qkv_proj.weight", pointwise_1d, part),
                Rule(f"pool_out/{ours}/bias", f"{pool}.qkv_proj.bias", part=part)]
    rules += convolution("pool_out/out", f"{pool}.c_proj", pointwise_1d)
    rules += [Rule("pool_out/positions", f"{pool}.positional_embedding", linear)]
  return KeyMap(rules)


def averages(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
  """The tensors with the U-Net's averages over the training in place of its last state.

  Raises:
    UserError: the file holds none, or not all.
  """
  replaced, missing = dict(tensors), []
  for name in tensors:
    if name.startswith(SINGLE_FILE):
      # The averages are named without any dot.
      average = AVERAGES + name.removeprefix("model.").replace(".", "")
      if average in tensors:
        replaced[name] = tensors[average]
      else:
        missing.append(name)
  if missing:
    held = sum(name.startswith(AVERAGES) for name in tensors)
    raise UserError(f"the file holds no average of '{missing[0]}'"
                    f"{f' and {len(missing) - 1} more' if held else ''}; leave --ema out")
  return replaced


def options_of(tensors: Mapping[str, Stored]) -> dict[str, Any]:
  """Options of our network by the names and shapes of a checkpoint.

  What is not to be seen is taken as it is published: group norms of 32 groups; 8 heads where the
  transformers' projections are convolutions (Stable Diffusion 1, latent diffusion), and else heads
  of 64 channels.

  Args:
    tensors: of `open_weights`.

  Raises:
    UserError: it holds no such U-Net, or one that our network is not.
  """
  shapes = {
    name.removeprefix(SINGLE_FILE): tensor.shape for name, tensor in tensors.items()
    if not re.match(_OTHERS, name)
  }  # fmt: skip
  if "input_blocks.0.0.weight" not in shapes or "out.2.weight" not in shapes:
    raise UserError("these weights hold no U-Net: neither "
                    f"{SINGLE_FILE}input_blocks.0.0.weight nor the name without "
                    f"{SINGLE_FILE} is among theirs, or no out.2.weight")
  try:
    return _options(shapes)
  except (KeyError, IndexError, ValueError) as error:
    raise UserError(f"the U-Net in these weights is not whole ({error}); copy them again"
                    ) from error


def has_convolutions(tensors: Mapping[str, Stored]) -> bool:
  """Whether a checkpoint of either layout has convolutions around its transformers."""
  names = [name for name in tensors if name.endswith(".proj_in.weight")]
  return bool(names) and len(tensors[names[0]].shape) == 4


def _trunk(options: Options, convolutions: bool, new_order: bool) -> list[Rule]:
  """The embedding, the way down and the middle."""
  rules = [
    *dense("time_in", "time_embed.0"), *dense("time_out", "time_embed.2"),
    *dense("pooled", "label_emb.0.0"), *dense("pooled_out", "label_emb.0.2"),
    Rule("label/embedding", "label_emb.weight"),
    *convolution("conv_in", "input_blocks.0.0"),
    *_resblock("middle_block_0", "middle_block.0"),
    *_resblock("middle_block_1", "middle_block.2"),
  ]  # fmt: skip
  levels, blocks = range(len(options["multipliers"])), options["blocks"]
  both = convolutions, new_order
  rules += _attention(options, levels[-1], "middle_attention", "middle_block.1", *both)
  for i in levels:
    for j in range(blocks):
      theirs = f"input_blocks.{1 + i * (blocks + 1) + j}"
      rules += _resblock(f"down_{i}_{j}_block", f"{theirs}.0")
      rules += _attention(options, i, f"down_{i}_{j}_attention", f"{theirs}.1", *both)
    theirs = f"input_blocks.{(i + 1) * (blocks + 1)}.0"
    rules += [*convolution(f"down_{i}_sample/conv", f"{theirs}.op"),
              *_resblock(f"down_{i}_sample", theirs)]
  return rules


def _resblock(ours: str, theirs: str) -> list[Rule]:
  return [
    *norm(f"{ours}/norm_in", f"{theirs}.in_layers.0"),
    *convolution(f"{ours}/conv_in", f"{theirs}.in_layers.2"),
    *dense(f"{ours}/condition", f"{theirs}.emb_layers.1"),
    *norm(f"{ours}/norm_out", f"{theirs}.out_layers.0"),
    *convolution(f"{ours}/conv_out", f"{theirs}.out_layers.3"),
    *convolution(f"{ours}/skip", f"{theirs}.skip_connection"),
  ]  # fmt: skip


def _attention(
  options: Options, level: int, ours: str, theirs: str, convolutions: bool, new_order: bool
) -> list[Rule]:
  if options["attention"] == "transformer":
    return transformer(ours, theirs, convolutions)
  width = int(options["channels"] * options["multipliers"][level])
  heads = options["heads"] or max(width // options["head_channels"], 1)
  rules = norm(f"{ours}/norm", f"{theirs}.norm")
  for index, name in enumerate(("query", "key", "value")):
    fused = {"part": (index, 3), "runs": 1 if new_order else heads}
    rules += [
      Rule(f"{ours}/attention/{name}/kernel", f"{theirs}.qkv.weight", pointwise_1d, **fused),
      Rule(f"{ours}/attention/{name}/bias", f"{theirs}.qkv.bias", **fused),
    ]
  return rules + convolution(f"{ours}/attention/out", f"{theirs}.proj_out", pointwise_1d)


def _options(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
  sides = ("input_blocks", "output_blocks")
  # Numbers of the blocks of each side, and of those that attend.
  blocks, attending = (
    [{int(m[1]) for m in map(re.compile(rf"{side}\.(\d+)\.{inner}").match, shapes) if m}
     for side in sides]
    for inner in ("", r"1\.(norm|proj_in)\.")
  )  # fmt: skip
  count = _blocks(shapes, len(blocks[1]))
  levels = len(blocks[1]) // (count + 1)
  if blocks != [set(range(levels * (count + 1)))] * 2:
    raise ValueError("blocks are missing")
  first = lambda i: 1 + i * (count + 1)  # noqa: E731
  channels = shapes["time_embed.0.weight"][1]
  widths = [shapes[f"input_blocks.{first(i)}.0.in_layers.2.weight"][0] for i in range(levels)]
  levels_attending = tuple(i for i in range(levels) if first(i) in attending[0])
  mirrored = tuple(i for i in range(levels) if (levels - 1 - i) * (count + 1) in attending[1])
  if levels_attending != mirrored:
    raise ValueError(f"levels {levels_attending} attend on the way down, {mirrored} on the way up")
  transformers = "middle_block.1.proj_in.weight" in shapes
  heads = 8 if transformers and len(shapes["middle_block.1.proj_in.weight"]) == 4 else 0
  depth = lambda block: len({  # noqa: E731
    m[1] for m in map(re.compile(rf"{block}\.1\.transformer_blocks\.(\d+)\.").match, shapes) if m
  })
  depths = tuple(depth(rf"input_blocks\.{first(i)}") for i in range(levels))
  cross = shapes.get("middle_block.1.transformer_blocks.0.attn2.to_k.weight")
  condition = shapes["middle_block.0.emb_layers.1.weight"][0]
  pooled = shapes.get("label_emb.0.0.weight")
  return {
    "resolution": 0,
    "in_channels": shapes["input_blocks.0.0.weight"][1],
    "out_channels": shapes["out.2.weight"][0],
    "channels": channels,
    "multipliers": tuple(w // channels if w % channels == 0 else w / channels for w in widths),
    "blocks": count,
    "attention": "transformer" if transformers else "block",
    "attention_levels": levels_attending,
    "depths": () if set(depths) <= {0, 1} else depths,
    "middle_depth": depth("middle_block") or 1,
    "heads": heads,
    "head_channels": 64,
    "groups": 32,
    "epsilon": 1e-5,
    "scale_shift": condition == 2 * shapes["middle_block.0.in_layers.2.weight"][0],
    "dropout": 0.0,
    "block_resample": levels > 1 and f"input_blocks.{count + 1}.0.in_layers.2.weight" in shapes,
    "symmetric": True,
    "sine_first": False,
    "classes": shapes.get("label_emb.weight", (0,))[0],
    "pooled_mlp": pooled is not None,
    "context_width": cross[1] if cross else 0,
    "pooled_width": pooled[1] if pooled else 0,
  }


def _blocks(shapes: Mapping[str, tuple[int, ...]], number: int) -> int:
  """Residual blocks of a level: on the way up one more, the last with what doubles the size."""
  doubling = re.compile(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers\.2)\.weight")
  numbers = [int(m[1]) for m in map(doubling.fullmatch, shapes) if m]
  return min(numbers, default=number - 1)
