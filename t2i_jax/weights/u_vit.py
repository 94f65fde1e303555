"""The key map of U-ViT, between our names and those of its authors' `.pth` files."""

from collections.abc import Mapping
from typing import Any

from t2i_jax.weights.key_map import Layout, Rule, convolution, dense, norm
from t2i_jax.weights.stacked import StackedKeyMap, fused, patch_layout


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


def _block(ours: str, theirs: str) -> list[Rule]:
  return [
    *dense(f"{ours}/skip", f"{theirs}.skip_linear"),
    *norm(f"{ours}/norm_attention", f"{theirs}.norm1"),
    *fused(f"{ours}/attention", f"{theirs}.attn.qkv", bias=False),
    *dense(f"{ours}/attention/out", f"{theirs}.attn.proj"),
    *norm(f"{ours}/norm_mlp", f"{theirs}.norm2"),
    *dense(f"{ours}/mlp/in", f"{theirs}.mlp.fc1"), *dense(f"{ours}/mlp/out", f"{theirs}.mlp.fc2"),
  ]  # fmt: skip
