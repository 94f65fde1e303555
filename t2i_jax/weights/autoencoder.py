"""Key maps of the autoencoders of latent diffusion, and their options as others write them.

Paths are `encoder/...` and `decoder/...` of the networks in `networks/autoencoder.py`. The other
side is a folder of diffusers (`AutoencoderKL`), or the layout of the authors' own files, which is
also that of the autoencoder inside a whole model in one file, there behind `first_stage_model.`.
"""

import re
from collections.abc import Mapping
from typing import Any

from t2i_jax.errors import UserError
from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.rules import Rule, convolution, dense, norm, pointwise
from t2i_jax.weights.stored import Stored

SINGLE_FILE = "first_stage_model."  # how names begin in a file that holds a whole model
_OURS = r"(encoder|decoder|quant_conv|post_quant_conv)\."
# What else such files hold: losses and their networks, optimizers' averages, other models.
_OTHERS = rf"^(?!({re.escape(SINGLE_FILE)})?{_OURS})"


def diffusers_map(levels: int, old_attention: bool = False) -> KeyMap:
  """Names of diffusers' `AutoencoderKL`.

  Args:
    levels: of the autoencoder; diffusers counts the decoder's from the coarsest.
    old_attention: the attention's names in files before diffusers 0.18, Stable Diffusion 1's own
      among them.
  """
  resnet = lambda ours, theirs: _resblock(ours, theirs, "conv_shortcut")  # noqa: E731
  projections = (
    ("query", "key", "value", "proj_attn") if old_attention
    else ("to_q", "to_k", "to_v", "to_out.0")
  )
  attention = lambda ours, theirs: [  # noqa: E731
    *norm(f"{ours}/norm", f"{theirs}.group_norm"),
    *[rule for our, their in zip(_PROJECTIONS, projections, strict=True)
      for rule in dense(f"{ours}/attention/{our}", f"{theirs}.{their}")],
  ]  # fmt: skip
  rules = _ends("conv_norm_out")
  for side in ("encoder", "decoder"):
    middle = f"{side}.mid_block"
    rules += resnet(f"{side}/middle_block_{{i}}", f"{middle}.resnets.{{i}}")
    rules += attention(f"{side}/middle_attention", f"{middle}.attentions.0")
  for i in range(levels):
    for ours, theirs, sampler in (
      (f"encoder/down_{i}", f"encoder.down_blocks.{i}", "downsamplers"),
      (f"decoder/up_{i}", f"decoder.up_blocks.{levels - 1 - i}", "upsamplers"),
    ):
      rules += resnet(f"{ours}_{{j}}_block", f"{theirs}.resnets.{{j}}")
      rules += attention(f"{ours}_{{j}}_attention", f"{theirs}.attentions.{{j}}")
      rules += convolution(f"{ours}_sample/conv", f"{theirs}.{sampler}.0.conv")
  return KeyMap(rules, [_OTHERS])


def single_file_map() -> KeyMap:
  """Names of the authors' files; reads them with and without `SINGLE_FILE`, writes them without."""
  resnet = lambda ours, theirs: _resblock(ours, theirs, "nin_shortcut")  # noqa: E731
  attention = lambda ours, theirs: [  # noqa: E731
    *norm(f"{ours}/norm", f"{theirs}.norm"),
    *[rule for our, their in zip(_PROJECTIONS, ("q", "k", "v", "proj_out"), strict=True)
      for rule in convolution(f"{ours}/attention/{our}", f"{theirs}.{their}", pointwise)],
  ]  # fmt: skip
  rules = _ends("norm_out")
  for side in ("encoder", "decoder"):
    for i in (0, 1):
      rules += resnet(f"{side}/middle_block_{i}", f"{side}.mid.block_{i + 1}")
    rules += attention(f"{side}/middle_attention", f"{side}.mid.attn_1")
  for side, way in (("encoder", "down"), ("decoder", "up")):
    ours, theirs = f"{side}/{way}_{{i}}", f"{side}.{way}.{{i}}"
    rules += resnet(f"{ours}_{{j}}_block", f"{theirs}.block.{{j}}")
    rules += attention(f"{ours}_{{j}}_attention", f"{theirs}.attn.{{j}}")
    rules += convolution(f"{ours}_sample/conv", f"{theirs}.{way}sample.conv")
  return KeyMap(rules, [_OTHERS], [("", SINGLE_FILE)])


def map_of(tensors: Mapping[str, Any], levels: int) -> KeyMap:
  """The map of a checkpoint, by its names: diffusers' of either age, or the authors'.

  Raises:
    UserError: it holds no such autoencoder.
  """
  if any(".mid_block." in name for name in tensors):
    old = "encoder.mid_block.attentions.0.query.weight" in tensors
    return diffusers_map(levels, old)
  if any(".mid.block_1." in name for name in tensors):
    return single_file_map()
  raise UserError("these weights hold no autoencoder of latent diffusion: neither diffusers' "
                  f"encoder.mid_block nor {SINGLE_FILE}encoder.mid is among their names")


def options_of(tensors: Mapping[str, Stored]) -> dict[str, Any]:
  """Options of our networks by the names and shapes of a checkpoint of either layout.

  Its norms' groups are not to be seen; all published autoencoders have 32.

  Args:
    tensors: of `open_weights`.

  Raises:
    UserError: it holds no such autoencoder, or one that our networks are not.
  """
  shapes = {
    name.removeprefix(SINGLE_FILE): tensor.shape for name, tensor in tensors.items()
    if not re.match(_OTHERS, name)
  }  # fmt: skip
  map_of(shapes, 1)
  # Of either layout: a level's number, and a block's.
  block = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:resnets|block)\.(\d+)\.conv1\.weight")
  attention = re.compile(r"encoder\.down(?:_blocks)?\.(\d+)\.(?:attentions|attn)\.")
  middle = re.compile(r"encoder\.mid(_block\.attentions|\.attn_1)\.")
  blocks = {
    (int(found[1]), int(found[2])): shapes[name][0] for name in shapes
    if (found := block.fullmatch(name))
  }  # fmt: skip
  try:
    channels = shapes["encoder.conv_in.weight"][0]
    latent = shapes["decoder.conv_in.weight"][1]
    moments = shapes["encoder.conv_out.weight"][0]
    widths = [blocks[i, 0] for i in range(1 + max(level for level, _ in blocks))]
  except (KeyError, IndexError, ValueError) as error:
    raise UserError(f"the autoencoder in these weights is not whole ({error}); copy them again"
                    ) from error
  if moments != 2 * latent:
    raise UserError(f"the autoencoder in these weights gives {moments} channels for {latent} of "
                    f"the latents; means and log-variances would be {2 * latent}")
  return {
    "latent_channels": latent,
    "channels": channels,
    "multipliers": tuple(width // channels for width in widths),
    "blocks": 1 + max(number for _, number in blocks),
    "attention_levels": tuple(sorted({int(m[1]) for m in map(attention.match, shapes) if m})),
    "middle_attention": any(map(middle.match, shapes)),
    "pointwise": "quant_conv.weight" in shapes,
  }


def from_diffusers(published: Mapping[str, Any]) -> dict[str, Any]:
  """Options of our networks, and `resolution`, `scale` and `shift`, of diffusers' config.json.

  Raises:
    UserError: for what our networks have not.
  """
  given = {**_DEFAULTS, **{k: v for k, v in published.items() if v is not None}}
  for name, value in _FIXED.items():
    if given[name] != value:
      raise UserError(f"an autoencoder with {name}={given[name]} is not known, only with {value}")
  if given["use_quant_conv"] != given["use_post_quant_conv"]:
    raise UserError("an autoencoder with one of use_quant_conv and use_post_quant_conv and without "
                    "the other is not known")
  channels = list(given["block_out_channels"])
  attending = tuple(i for i, kind in enumerate(given["down_block_types"]) if "Attn" in kind)
  mirrored = [i for i, kind in enumerate(given["up_block_types"][::-1]) if "Attn" in kind]
  if list(attending) != mirrored or any(width % channels[0] for width in channels):
    raise UserError("an autoencoder whose decoder does not mirror its encoder, or whose channels "
                    f"{channels} are not multiples of the first, is not known")
  return {
    "resolution": given["sample_size"],
    "latent_channels": given["latent_channels"],
    "channels": channels[0],
    "multipliers": tuple(width // channels[0] for width in channels),
    "blocks": given["layers_per_block"],
    "attention_levels": attending,
    "middle_attention": given["mid_block_add_attention"],
    "pointwise": given["use_quant_conv"],
    "groups": given["norm_num_groups"],
    "scale": float(given["scaling_factor"]),
    "shift": float(given["shift_factor"]),
  }


def to_diffusers(options: Mapping[str, Any]) -> dict[str, Any]:
  """The inverse of `from_diffusers`: config.json of diffusers' `AutoencoderKL`.

  Raises:
    UserError: the scale of the latents is 0, not known.
  """
  if not options["scale"]:
    raise UserError("the scale of this autoencoder's latents was not measured, and diffusers needs "
                    "it; set model.scale to 1 over their standard deviation")
  levels = range(len(options["multipliers"]))

  def kind(level: int, plain: str, attending: str) -> str:
    return attending if level in options["attention_levels"] else plain

  return {
    "_class_name": "AutoencoderKL",
    **_FIXED,
    "sample_size": options["resolution"],
    "latent_channels": options["latent_channels"],
    "block_out_channels": [options["channels"] * multiple for multiple in options["multipliers"]],
    "layers_per_block": options["blocks"],
    "down_block_types": [kind(i, "DownEncoderBlock2D", "AttnDownEncoderBlock2D") for i in levels],
    "up_block_types": [
      kind(i, "UpDecoderBlock2D", "AttnUpDecoderBlock2D") for i in reversed(levels)
    ],
    "mid_block_add_attention": options["middle_attention"],
    "use_quant_conv": options["pointwise"],
    "use_post_quant_conv": options["pointwise"],
    "norm_num_groups": options["groups"],
    "scaling_factor": options["scale"],
    "shift_factor": options["shift"] or None,
    "force_upcast": True,
  }


# What diffusers takes where its config.json is silent, and what must be so.
_FIXED = {"in_channels": 3, "out_channels": 3, "act_fn": "silu"}
_DEFAULTS = {
  **_FIXED,
  "sample_size": 32, "latent_channels": 4, "block_out_channels": (64,), "layers_per_block": 1,
  "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
  "mid_block_add_attention": True, "use_quant_conv": True, "use_post_quant_conv": True,
  "norm_num_groups": 32, "scaling_factor": 0.18215, "shift_factor": 0.0,
}  # fmt: skip
_PROJECTIONS = ("query", "key", "value", "out")


def _resblock(ours: str, theirs: str, skip: str) -> list[Rule]:
  return [
    *norm(f"{ours}/norm_in", f"{theirs}.norm1"), *norm(f"{ours}/norm_out", f"{theirs}.norm2"),
    *convolution(f"{ours}/conv_in", f"{theirs}.conv1"),
    *convolution(f"{ours}/conv_out", f"{theirs}.conv2"),
    *convolution(f"{ours}/skip", f"{theirs}.{skip}"),
  ]  # fmt: skip


def _ends(last_norm: str) -> list[Rule]:
  """What is named alike on both sides."""
  rules = convolution("encoder/pointwise", "quant_conv")
  rules += convolution("decoder/pointwise", "post_quant_conv")
  for side in ("encoder", "decoder"):
    rules += convolution(f"{side}/conv_in", f"{side}.conv_in")
    rules += norm(f"{side}/norm_out", f"{side}.{last_norm}")
    rules += convolution(f"{side}/conv_out", f"{side}.conv_out")
  return rules
