"""What config.json of diffusers' U-Nets says, and what it leaves out: settings with their defaults.

Those for which our network has no option must be as they are here.
"""

from collections.abc import Mapping
from typing import Any

from t2i_jax.errors import UserError

PLAIN, CONDITIONED = "UNet2DModel", "UNet2DConditionModel"

# What must be so, and what diffusers takes where its config.json is silent.
FIXED = {
  "center_input_sample": False, "act_fn": "silu", "mid_block_scale_factor": 1,
  "time_embedding_type": "positional", "class_embed_type": None,
}  # fmt: skip
FIXED_OF = {
  PLAIN: {"mid_block_type": "UNetMidBlock2D", "add_attention": True},
  CONDITIONED: {
    "mid_block_type": "UNetMidBlock2DCrossAttn", "only_cross_attention": False,
    "reverse_transformer_layers_per_block": None, "encoder_hid_dim": None,
    "encoder_hid_dim_type": None, "dual_cross_attention": False, "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0, "time_embedding_act_fn": None, "timestep_post_act": None,
    "time_cond_proj_dim": None, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "attention_type": "default", "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None,
  },
}  # fmt: skip
_DEFAULTS = {
  "sample_size": None, "time_embedding_dim": None, "freq_shift": 0, "flip_sin_to_cos": True,
  "layers_per_block": 2, "downsample_padding": 1, "dropout": 0.0, "attention_head_dim": 8,
  "norm_num_groups": 32, "norm_eps": 1e-5, "resnet_time_scale_shift": "default",
  "num_class_embeds": None,
}  # fmt: skip
_DEFAULTS_OF = {
  PLAIN: {
    "in_channels": 3, "out_channels": 3, "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", *3 * ["AttnDownBlock2D"]),
    "up_block_types": (*3 * ["AttnUpBlock2D"], "UpBlock2D"),
    "downsample_type": "conv", "upsample_type": "conv", "attn_norm_num_groups": None,
    "num_train_timesteps": None,
  },
  CONDITIONED: {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*3 * ["CrossAttnDownBlock2D"], "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *3 * ["CrossAttnUpBlock2D"]),
    "cross_attention_dim": 1280, "transformer_layers_per_block": 1, "num_attention_heads": None,
    "use_linear_projection": False, "addition_embed_type": None, "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None, "upcast_attention": False,
    "addition_embed_type_num_heads": 64,
  },
}  # fmt: skip
# Kinds of levels on the way down and up: plain, attending, and with sampling residual blocks.
KINDS = {
  PLAIN: (("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
          ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")),
  CONDITIONED: (("DownBlock2D", "CrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")),
}  # fmt: skip


def checked(kind: str, published: Mapping[str, Any]) -> dict[str, Any]:
  """A config with the defaults of what it leaves out, its lists as tuples.

  Raises:
    UserError: for a setting that our network has not, or without an entry for each level.
  """
  fixed = FIXED | FIXED_OF[kind]
  defaults = fixed | _DEFAULTS | _DEFAULTS_OF[kind]
  tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in published.items()}
  given = defaults | {k: v for k, v in tuples.items() if not k.startswith("_")}
  for name, value in given.items():
    if name not in defaults and value not in (None, False):
      raise UserError(f"a U-Net with {name}={value} is not known")
    if name in fixed and (value or None) != (fixed[name] or None):
      raise UserError(f"a U-Net with {name}={value} is not known, only with {fixed[name]}")
  for name in ("block_out_channels", "down_block_types", "up_block_types"):
    if not isinstance(given[name], tuple) or len(given[name]) != len(given["down_block_types"]):
      raise UserError(f"a U-Net with {name}={given[name]} is not known, only with an entry for "
                      "each level")
  return given
