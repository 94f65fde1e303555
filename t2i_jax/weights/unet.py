"""Key maps of U-Nets, between our names and those of diffusers.

Of `UNet2DModel` (DDPM's, ADM's) and `UNet2DConditionModel` (latent diffusion's, Stable
Diffusion's). Options are the attributes of `networks.unet.UNet`, and four numbers that a network
finds in what it is given: `in_channels`, `context_width` and `pooled_width` (0 where there is
none), and `resolution`, the side of the pictures or latents (0 if not known).
"""

from collections.abc import Mapping
from typing import Any

from t2i_jax.networks.layers.spatial import BLOCK
from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.rules import Rule, convolution, dense, norm, pointwise
from t2i_jax.weights.stacked import StackedKeyMap

Options = Mapping[str, Any]
PROJECTIONS = ("query", "key", "value", "out")


def diffusers_map(options: Options, convolutions: bool = False, old: bool = False) -> KeyMap:
  """Names of diffusers' U-Nets.

  Args:
    options: of the network.
    convolutions: the projections around transformers are convolutions of size 1, as in Stable
      Diffusion 1, and not matrices.
    old: names of the attention in files before diffusers 0.18, the first DDPMs among them.
  """
  kind = options["attention"]
  rules = [
    *dense("time_in", "time_embedding.linear_1"), *dense("time_out", "time_embedding.linear_2"),
    *dense("pooled", "add_embedding.linear_1"), *dense("pooled_out", "add_embedding.linear_2"),
    Rule("label/embedding", "class_embedding.weight"),
    *convolution("conv_in", "conv_in"), *norm("norm_out", "conv_norm_out"),
    *convolution("conv_out", "conv_out"),
    *_resblock("middle_block_{j}", "mid_block.resnets.{j}"),
    *_attention(kind, "middle_attention", "mid_block.attentions.0", convolutions, old),
  ]  # fmt: skip
  levels = len(options["multipliers"])
  for i in range(levels):
    # The way up is counted from the coarsest level there.
    for ours, theirs, sampler in (
      (f"down_{i}", f"down_blocks.{i}", "downsamplers.0"),
      (f"up_{i}", f"up_blocks.{levels - 1 - i}", "upsamplers.0"),
    ):
      attention = f"{ours}_{{j}}_attention", f"{theirs}.attentions.{{j}}"
      rules += _resblock(f"{ours}_{{j}}_block", f"{theirs}.resnets.{{j}}")
      rules += _attention(kind, *attention, convolutions, old)
      rules += convolution(f"{ours}_sample/conv", f"{theirs}.{sampler}.conv")
      rules += _resblock(f"{ours}_sample", f"{theirs}.{sampler}")
  return StackedKeyMap(rules, stacks_of(options))


def stacks_of(options: Options) -> dict[str, int]:
  """Where transformer blocks may be stacked, for `StackedKeyMap`."""
  way = [
    f"{way}_{i}_{j}" for way, blocks in (("down", options["blocks"]), ("up", options["blocks"] + 1))
    for i in options["attention_levels"] for j in range(blocks)
  ]  # fmt: skip
  return {f"{place}_attention/{BLOCK}": 0 for place in (*way, "middle")}


def transformer(ours: str, theirs: str, convolutions: bool) -> list[Rule]:
  """Of a `SpatialTransformer`, named alike by diffusers and in the authors' files."""
  rules = norm(f"{ours}/norm", f"{theirs}.norm")
  for our, their in (("project_in", "proj_in"), ("project_out", "proj_out")):
    if convolutions:
      rules += convolution(f"{ours}/{our}", f"{theirs}.{their}", pointwise)
    else:
      rules += dense(f"{ours}/{our}", f"{theirs}.{their}")
  block, of = f"{ours}/{BLOCK}_{{k}}", f"{theirs}.transformer_blocks.{{k}}"
  for number, name in enumerate(("self", "cross", "mlp"), 1):
    rules += norm(f"{block}/norm_{name}", f"{of}.norm{number}")
  for attention, their in (("self_attention", "attn1"), ("cross_attention", "attn2")):
    for name in PROJECTIONS[:3]:
      rules += dense(f"{block}/{attention}/{name}", f"{of}.{their}.to_{name[0]}", bias=False)
    rules += dense(f"{block}/{attention}/out", f"{of}.{their}.to_out.0")
  rules += dense(f"{block}/mlp_in", f"{of}.ff.net.0.proj")
  return rules + dense(f"{block}/mlp_out", f"{of}.ff.net.2")


def _resblock(ours: str, theirs: str) -> list[Rule]:
  return [
    *norm(f"{ours}/norm_in", f"{theirs}.norm1"), *convolution(f"{ours}/conv_in", f"{theirs}.conv1"),
    *dense(f"{ours}/condition", f"{theirs}.time_emb_proj"),
    *norm(f"{ours}/norm_out", f"{theirs}.norm2"),
    *convolution(f"{ours}/conv_out", f"{theirs}.conv2"),
    *convolution(f"{ours}/skip", f"{theirs}.conv_shortcut"),
  ]  # fmt: skip


def _attention(kind: str, ours: str, theirs: str, convolutions: bool, old: bool) -> list[Rule]:
  if kind == "transformer":
    return transformer(ours, theirs, convolutions)
  names = ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
  rules = norm(f"{ours}/norm", f"{theirs}.group_norm")
  for our, their in zip(PROJECTIONS, names, strict=True):
    rules += dense(f"{ours}/attention/{our}", f"{theirs}.{their}")
  return rules


def widths_of(params: Mapping[str, Any]) -> dict[str, int]:
  """The options that only the parameters tell: `in_channels`, `context_width`, `pooled_width`.

  Args:
    params: a U-Net's, arrays or their shapes.
  """
  middle = params.get("middle_attention", {})
  block = middle.get(f"{BLOCK}_0", middle.get(BLOCK, middle))
  text = block.get("cross_attention", {})
  kernel = text.get("key", {}).get("kernel")
  pooled = params.get("pooled", {}).get("kernel")
  return {
    "in_channels": params["conv_in"]["kernel"].shape[2],
    "context_width": 0 if kernel is None else kernel.shape[-2],
    "pooled_width": 0 if pooled is None else pooled.shape[0],
  }
