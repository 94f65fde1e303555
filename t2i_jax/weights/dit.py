"""Key maps of diffusion transformers: of DiT's authors, and of diffusers.

Options are the attributes of `networks.dit.DiT`, and `grid`, the tokens of a side of what it was
trained on.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from t2i_jax.networks.layers.embeddings import patch_positions
from t2i_jax.weights.rules import Rule, convolution, dense
from t2i_jax.weights.stacked import StackedKeyMap, fused, number_of, patch_layout, shapes_of
from t2i_jax.weights.stored import Stored

Options = Mapping[str, Any]
STACKS = {"blocks": 0}


def authors_map(options: Options) -> StackedKeyMap:
  """Names of the `.pt` files of DiT, the fixed positions among them."""
  block, ours = "blocks.{i}", "blocks_{i}"
  rules = [
    *convolution("patches", "x_embedder.proj", patch_layout(options["patch"])),
    *dense("time/in", "t_embedder.mlp.0"), *dense("time/out", "t_embedder.mlp.2"),
    Rule("label/embedding", "y_embedder.embedding_table.weight"),
    *dense(f"{ours}/modulation/dense", f"{block}.adaLN_modulation.1"),
    *fused(f"{ours}/attention", f"{block}.attn.qkv"),
    *dense(f"{ours}/attention/out", f"{block}.attn.proj"),
    *dense(f"{ours}/mlp/in", f"{block}.mlp.fc1"), *dense(f"{ours}/mlp/out", f"{block}.mlp.fc2"),
    *dense("modulation_out/dense", "final_layer.adaLN_modulation.1"),
    *dense("out/dense", "final_layer.linear"),
  ]  # fmt: skip

  def positions() -> np.ndarray:
    side = np.arange(options["grid"])
    return patch_positions(side, side, options["width"])[None]

  return StackedKeyMap(rules, STACKS, {"pos_embed": positions})


def options_of(tensors: Mapping[str, Stored]) -> dict[str, Any]:
  """Options of DiT's files, and those of `transformer_config`; heads are as published.

  Raises:
    UserError: it holds no such network.
  """
  shapes = shapes_of(tensors, (
    "x_embedder.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight", "final_layer.linear.weight",
    "y_embedder.embedding_table.weight",
  ), "DiT")  # fmt: skip
  (width, channels, patch, _), (_, tokens, _), (hidden, _), (numbers, _), (rows, _) = shapes
  grid = math.isqrt(tokens)
  return {
    "patch": patch, "width": width, "depth": number_of(tensors, "blocks."),
    "heads": heads_of(width), "mlp_ratio": hidden / width, "modulation": "zero",
    "position_scale": 1.0, "classes": rows - 1, "grid": grid, "in_channels": channels,
    "out_channels": numbers // patch**2, "context_width": 0, "pooled_width": 0,
    "resolution": grid * patch,
  }  # fmt: skip


def heads_of(width: int) -> int:
  """Of the published networks, of DiT and of U-ViT: of 64 channels, and 16 in the largest."""
  return 16 if width == 1152 else max(width // 64, 1)


def diffusers_map(options: Options) -> StackedKeyMap:
  """Names of diffusers' `DiTTransformer2DModel`, in which every block has the embedders again.

  Its frequencies of the time are not those that DiT was trained with, though the weights are: with
  `downscale_freq_shift` 1 where the authors have 0. Ours are the authors'.
  """
  embedders = "transformer_blocks.0.norm1.emb."
  rules = [
    *_shared(options),
    *dense("time/in", f"{embedders}timestep_embedder.linear_1"),
    *dense("time/out", f"{embedders}timestep_embedder.linear_2"),
    Rule("label/embedding", f"{embedders}class_embedder.embedding_table.weight"),
    *dense("blocks_{i}/modulation/dense", "transformer_blocks.{i}.norm1.linear"),
    *dense("modulation_out/dense", "proj_out_1"), *dense("out/dense", "proj_out_2"),
  ]  # fmt: skip
  return StackedKeyMap(rules, STACKS, copies=_copies(embedders, options["depth"]))


def pixart_map(options: Options) -> StackedKeyMap:
  """Names of diffusers' `PixArtTransformer2DModel`, without the conditions on sizes."""
  rules = [
    *_shared(options),
    *dense("time/in", "adaln_single.emb.timestep_embedder.linear_1"),
    *dense("time/out", "adaln_single.emb.timestep_embedder.linear_2"),
    *dense("modulation/dense", "adaln_single.linear"),
    *dense("context/in", "caption_projection.linear_1"),
    *dense("context/out", "caption_projection.linear_2"),
    Rule("blocks_{i}/table", "transformer_blocks.{i}.scale_shift_table"),
    *_attention("blocks_{i}/cross_attention", "transformer_blocks.{i}.attn2"),
    Rule("table_out", "scale_shift_table"), *dense("out/dense", "proj_out"),
  ]  # fmt: skip
  return StackedKeyMap(rules, STACKS)


def _shared(options: Options) -> list[Rule]:
  block = "transformer_blocks.{i}"
  return [
    *convolution("patches", "pos_embed.proj", patch_layout(options["patch"])),
    *_attention("blocks_{i}/attention", f"{block}.attn1"),
    *dense("blocks_{i}/mlp/in", f"{block}.ff.net.0.proj"),
    *dense("blocks_{i}/mlp/out", f"{block}.ff.net.2"),
  ]  # fmt: skip


def _attention(ours: str, theirs: str) -> list[Rule]:
  pairs = (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0"))
  return [rule for a, b in pairs for rule in dense(f"{ours}/{a}", f"{theirs}.{b}")]


def _copies(embedders: str, depth: int) -> Callable[[str], list[str]]:
  """The same names in the other blocks, of one in the first."""

  def copies(name: str) -> list[str]:
    if not name.startswith(embedders):
      return []
    return [name.replace(".0.", f".{i}.", 1) for i in range(1, depth)]

  return copies
