"""Key maps of Stable Diffusion 3's transformer: of its authors' single files, and of diffusers.

Options are the attributes of `networks.mmdit.MMDiT`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from t2i_jax.networks.layers.embeddings import patch_positions
from t2i_jax.networks.mmdit import places
from t2i_jax.weights.rules import Layout, Rule, convolution, dense
from t2i_jax.weights.stacked import StackedKeyMap, fused, number_of, patch_layout, shapes_of
from t2i_jax.weights.stored import Stored

Options = Mapping[str, Any]
SINGLE_FILE = "model.diffusion_model."  # how names begin in a file that holds a whole model
# What else such a file holds: the first stage and text encoders.
OTHERS = (r"^(first_stage_model|text_encoders|model_ema|vae)\.", r"^model\.(?!diffusion_model\.)")
HEAD_CHANNELS = 64
STREAMS = (("image", "x_block"), ("text", "context_block"))


def _halves_swapped(x: np.ndarray) -> np.ndarray:
  return np.concatenate(np.split(x, 2)[::-1])


# diffusers has scale and shift the other way round where a norm has nothing but them.
_swapped = Layout(lambda x: _halves_swapped(x).T, lambda x: _halves_swapped(x.T))
_swapped_bias = Layout(_halves_swapped, _halves_swapped)


def single_file_map(options: Options) -> StackedKeyMap:
  """The authors' names; reads them with and without `SINGLE_FILE`, writes them without."""
  rules = [
    *convolution("patches", "x_embedder.proj", patch_layout(options["patch"])),
    *dense("time/in", "t_embedder.mlp.0"), *dense("time/out", "t_embedder.mlp.2"),
    *dense("pooled/in", "y_embedder.mlp.0"), *dense("pooled/out", "y_embedder.mlp.2"),
    *dense("context", "context_embedder"),
    *dense("modulation_out/dense", "final_layer.adaLN_modulation.1"),
    *dense("out/dense", "final_layer.linear"),
  ]  # fmt: skip
  for ours, number in _blocks(options):
    for stream, name in STREAMS:
      theirs = f"joint_blocks.{number}.{name}"
      rules += [
        *dense(f"{ours}/{stream}_modulation/dense", f"{theirs}.adaLN_modulation.1"),
        *fused(f"{ours}/{stream}", f"{theirs}.attn.qkv"),
        *_norms(f"{ours}/{stream}", f"{theirs}.attn", "ln_q", "ln_k"),
        *dense(f"{ours}/{stream}_out", f"{theirs}.attn.proj"),
        *dense(f"{ours}/{stream}_mlp/in", f"{theirs}.mlp.fc1"),
        *dense(f"{ours}/{stream}_mlp/out", f"{theirs}.mlp.fc2"),
      ]  # fmt: skip
    theirs = f"joint_blocks.{number}.x_block.attn2"
    rules += [
      *fused(f"{ours}/second", f"{theirs}.qkv"), *dense(f"{ours}/second_out", f"{theirs}.proj"),
      *_norms(f"{ours}/second", theirs, "ln_q", "ln_k"),
    ]  # fmt: skip
  return StackedKeyMap(
    rules, _stacks(options), {"pos_embed": lambda: _positions(options)}, ignored=OTHERS,
    prefixes=[("", SINGLE_FILE)],
  )


def diffusers_map(options: Options) -> StackedKeyMap:
  """Names of diffusers' `SD3Transformer2DModel`."""
  embedder = "time_text_embed"
  rules = [
    *convolution("patches", "pos_embed.proj", patch_layout(options["patch"])),
    *dense("time/in", f"{embedder}.timestep_embedder.linear_1"),
    *dense("time/out", f"{embedder}.timestep_embedder.linear_2"),
    *dense("pooled/in", f"{embedder}.text_embedder.linear_1"),
    *dense("pooled/out", f"{embedder}.text_embedder.linear_2"),
    *dense("context", "context_embedder"),
    *_swapped_dense("modulation_out/dense", "norm_out.linear"), *dense("out/dense", "proj_out"),
    *_swapped_dense(
      "last_block/text_modulation/dense",
      f"transformer_blocks.{options['depth'] - 1}.norm1_context.linear",
    ),
  ]  # fmt: skip
  for ours, number in _blocks(options):
    theirs = f"transformer_blocks.{number}"
    attention, second = f"{theirs}.attn", f"{theirs}.attn2"
    rules += [
      *dense(f"{ours}/image_modulation/dense", f"{theirs}.norm1.linear"),
      *dense(f"{ours}/text_modulation/dense", f"{theirs}.norm1_context.linear"),
      *_projections(f"{ours}/image", attention, "to_q", "to_k", "to_v"),
      *_projections(f"{ours}/text", attention, "add_q_proj", "add_k_proj", "add_v_proj"),
      *_projections(f"{ours}/second", second, "to_q", "to_k", "to_v"),
      *_norms(f"{ours}/image", attention, "norm_q", "norm_k"),
      *_norms(f"{ours}/text", attention, "norm_added_q", "norm_added_k"),
      *_norms(f"{ours}/second", second, "norm_q", "norm_k"),
      *dense(f"{ours}/image_out", f"{attention}.to_out.0"),
      *dense(f"{ours}/text_out", f"{attention}.to_add_out"),
      *dense(f"{ours}/second_out", f"{second}.to_out.0"),
      *dense(f"{ours}/image_mlp/in", f"{theirs}.ff.net.0.proj"),
      *dense(f"{ours}/image_mlp/out", f"{theirs}.ff.net.2"),
      *dense(f"{ours}/text_mlp/in", f"{theirs}.ff_context.net.0.proj"),
      *dense(f"{ours}/text_mlp/out", f"{theirs}.ff_context.net.2"),
    ]  # fmt: skip
  return StackedKeyMap(
    rules, _stacks(options), {"pos_embed.pos_embed": lambda: _positions(options)}
  )


def options_of(tensors: Mapping[str, Stored]) -> dict[str, Any]:
  """Options of a checkpoint under its authors' names, and those of `transformer_config`.

  Heads are of 64 channels, as published, where no norm of theirs says it; places are those that it
  holds, or as published where it holds none.

  Raises:
    UserError: it holds no such network.
  """
  own = {name.removeprefix(SINGLE_FILE): tensor for name, tensor in tensors.items()}
  first = "joint_blocks.0.x_block."
  shapes = shapes_of(own, (
    "x_embedder.proj.weight", f"{first}mlp.fc1.weight", "final_layer.linear.weight",
    "context_embedder.weight", "y_embedder.mlp.0.weight",
  ), "transformer of Stable Diffusion 3")  # fmt: skip
  (width, channels, patch, _), (hidden, _), (numbers, _), (_, context), (_, pooled) = shapes
  grid, largest = 64, 192
  if "pos_embed" in own:
    held = own["pos_embed"].read()
    largest = math.isqrt(held.shape[1])
    # The second place's first wave is the sine of the distance between places.
    grid = round(float(np.arcsin(np.clip(held[0, 1, 0], -1, 1))) * largest)
  norm = f"{first}attn.ln_q.weight"
  return {
    "patch": patch, "width": width, "depth": number_of(own, "joint_blocks."),
    "heads": width // (own[norm].shape[0] if norm in own else HEAD_CHANNELS),
    "mlp_ratio": hidden / width, "norm": norm in own,
    "dual": sum(name.endswith(".x_block.attn2.qkv.weight") for name in own), "grid": grid,
    "largest": largest, "in_channels": channels, "out_channels": numbers // patch**2,
    "context_width": context, "pooled_width": pooled, "resolution": grid * patch,
  }  # fmt: skip


def _blocks(options: Options) -> list[tuple[str, str]]:
  """Our name of a block, and its number on the other side."""
  last = options["depth"] - 1
  return [("dual_blocks_{i}", "{i}"), ("blocks_{i}", "{i}"), ("last_block", str(last))]


def _stacks(options: Options) -> dict[str, int]:
  return {"dual_blocks": 0, "blocks": options["dual"]}


def _positions(options: Options) -> np.ndarray:
  """The places of the largest picture, [1, largest^2, width]."""
  side = places(options["largest"], options["grid"], options["largest"])
  return patch_positions(side, side, options["width"])[None]


def _projections(ours: str, theirs: str, *names: str) -> list[Rule]:
  pairs = zip(("query", "key", "value"), names, strict=True)
  return [rule for a, b in pairs for rule in dense(f"{ours}/{a}", f"{theirs}.{b}")]


def _norms(ours: str, theirs: str, query: str, key: str) -> list[Rule]:
  return [Rule(f"{ours}/query_norm/scale", f"{theirs}.{query}.weight"),
          Rule(f"{ours}/key_norm/scale", f"{theirs}.{key}.weight")]


def _swapped_dense(ours: str, theirs: str) -> list[Rule]:
  return [Rule(f"{ours}/kernel", f"{theirs}.weight", _swapped),
          Rule(f"{ours}/bias", f"{theirs}.bias", _swapped_bias)]
