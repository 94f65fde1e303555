"""The key map of U-ViT, between our names and those of its authors' `.pth` files."""

import math
from collections.abc import Mapping
from typing import Any

from t2i_jax.weights.dit import heads_of
from t2i_jax.weights.rules import Layout, Rule, convolution, dense, norm
from t2i_jax.weights.stacked import StackedKeyMap, fused, number_of, patch_layout, shapes_of
from t2i_jax.weights.stored import Stored

TOKENS = 77  # of a text, CLIP's


def authors_map(options: Mapping[str, Any]) -> StackedKeyMap:
  """Options are the attributes of `networks.u_vit.UViT`."""
  rules = [
    *convolution("patches", "patch_embed.proj", patch_layout(options["patch"])),
    *dense("context", "context_embed"), Rule("label/embedding", "label_emb.weight"),
    Rule("positions", "pos_embed", Layout(lambda x: x[0], lambda x: x[None])),
    *_block("in_blocks_{i}", "in_blocks.{i}"), *_block("middle_block", "mid_block"),
    *_block("out_blocks_{i}", "out_blocks.{i}"),
    *norm("norm_out", "norm"), *dense("out", "decoder_pred"),
    *convolution("conv_out", "final_layer"),
  ]  # fmt: skip
  return StackedKeyMap(rules, {"in_blocks": 0, "out_blocks": 0})


def options_of(tensors: Mapping[str, Stored]) -> dict[str, Any]:
  """Options of U-ViT's files, as of `transformer_config`; heads are as published.

  Raises:
    UserError: it holds no such network.
  """
  shapes = shapes_of(tensors, (
    "patch_embed.proj.weight", "pos_embed", "in_blocks.0.mlp.fc1.weight", "decoder_pred.weight",
  ), "U-ViT")  # fmt: skip
  (width, channels, patch, _), (_, tokens, _), (hidden, _), (numbers, _) = shapes
  context, labels = tensors.get("context_embed.weight"), tensors.get("label_emb.weight")
  # Beside the patches: the time, a label, and the tokens of a text.
  grid = math.isqrt(tokens - 1 - (TOKENS if context else 0) - (1 if labels else 0))
  return {
    "patch": patch, "width": width, "depth": 2 * number_of(tensors, "in_blocks."),
    "heads": heads_of(width), "mlp_ratio": hidden / width,
    "convolution": "final_layer.weight" in tensors, "in_channels": channels,
    "out_channels": numbers // patch**2, "classes": labels.shape[0] - 1 if labels else 0,
    "context_width": context.shape[1] if context else 0, "pooled_width": 0,
    "resolution": grid * patch,
  }  # fmt: skip


def _block(ours: str, theirs: str) -> list[Rule]:
  return [
    *dense(f"{ours}/skip", f"{theirs}.skip_linear"),
    *norm(f"{ours}/norm_attention", f"{theirs}.norm1"),
    *fused(f"{ours}/attention", f"{theirs}.attn.qkv", bias=False),
    *dense(f"{ours}/attention/out", f"{theirs}.attn.proj"),
    *norm(f"{ours}/norm_mlp", f"{theirs}.norm2"),
    *dense(f"{ours}/mlp/in", f"{theirs}.mlp.fc1"), *dense(f"{ours}/mlp/out", f"{theirs}.mlp.fc2"),
  ]  # fmt: skip
