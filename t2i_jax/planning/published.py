"""Public components without a number in them: what plans are made with where no export is named."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax import systems
from t2i_jax.systems import base
from t2i_jax.systems.base import System
from t2i_jax.systems.diffusion.latent import FIRST_STAGE

CLIP_LENGTH, T5_LENGTH = 77, 256


def _clip(width: int, layers: int, heads: int, activation: str, **reading: Any) -> dict[str, Any]:
  published = dict(
    hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
    num_attention_heads=heads, projection_dim=width, hidden_act=activation, vocab_size=49408,
    max_position_embeddings=CLIP_LENGTH, eos_token_id=2,
  )  # fmt: skip
  return dict(kind="clip", published=published, length=CLIP_LENGTH, **reading)


_T5_XXL = dict(
  kind="t5", length=T5_LENGTH,
  published=dict(
    d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128,
    feed_forward_proj="gated-gelu", relative_attention_num_buckets=32,
    relative_attention_max_distance=128, layer_norm_epsilon=1e-6,
  ),
)  # fmt: skip
_SHARED = dict(layer=-2, final_norm=False)  # as Stable Diffusion XL and 3 read both CLIPs
ENCODERS: dict[str, Mapping[str, Any]] = {
  "clip-l": _clip(768, 12, 12, "quick_gelu"),
  "clip-l-xl": _clip(768, 12, 12, "quick_gelu", **_SHARED),
  "clip-l-sd3": _clip(768, 12, 12, "quick_gelu", **_SHARED, project=True),
  "openclip-h": _clip(1024, 23, 16, "gelu"),
  "openclip-bigg": _clip(1280, 32, 20, "gelu", **_SHARED, project=True),
  "t5-xxl": _T5_XXL,
}
AUTOENCODERS: dict[str, Mapping[str, Any]] = {
  "kl-f8c4": dict(latent_channels=4, scale=0.18215),
  "kl-f8c4-xl": dict(latent_channels=4, scale=0.13025),
  "kl-f8c16": dict(latent_channels=16, pointwise=False, scale=1.5305, shift=0.0609),
}
# What a system's published models are built on.
OF_SYSTEM: dict[str, dict[str, str]] = {
  "dit": {"first_stage": "kl-f8c4", "text_encoder": "t5-xxl"},
  "ldm": {"first_stage": "kl-f8c4"},
  "sd3": {
    "first_stage": "kl-f8c16", "text_encoder": "clip-l-sd3", "text_encoder_2": "openclip-bigg",
    "text_encoder_3": "t5-xxl",
  },
  "sdxl": {
    "first_stage": "kl-f8c4-xl", "text_encoder": "clip-l-xl", "text_encoder_2": "openclip-bigg",
  },
  "stable_diffusion": {"first_stage": "kl-f8c4", "text_encoder": "clip-l"},
  "u_vit": {"first_stage": "kl-f8c4", "text_encoder": "clip-l"},
}  # fmt: skip
NAMES = (*ENCODERS, *AUTOENCODERS)


def names_of(config: ConfigDict, also: Mapping[str, str] | None = None) -> dict[str, str]:
  """What a config's components are taken as, by component, where it names no export of them.

  A system that models pixels without a first stage has none where its latents' scale is 0, as in
  training.

  Args:
    config: of the run.
    also: others, or others than the published ones.
  """
  names = dict(OF_SYSTEM.get(config.system, {}))
  if config.text.encoder != "component":
    names = {name: what for name, what in names.items() if not name.startswith("text_encoder")}
  pixels = getattr(systems.load(config.system), "models_pixels", False)
  if pixels and not config.model.latent_scale and not config.data.latents:
    names.pop(FIRST_STAGE, None)
  names |= also or {}
  return {name: what for name, what in names.items() if name not in config.components}


def component(name: str, resolution: int, dtype: Any) -> System:
  """The system of one of `NAMES`; UserError for another."""
  configs.choose("published component", name, dict.fromkeys(NAMES))
  if name in AUTOENCODERS:
    sections = systems.default_sections("kl_autoencoder")
    model = sections["model"].to_dict() | dict(
      resolution=resolution, adversarial_weight=0.0, perceptual_weight=0.0, **AUTOENCODERS[name]
    )
    return systems.build(
      {"system": "kl_autoencoder", "model": model, "text": sections["text"].to_dict()}, dtype=dtype
    )
  given = dict(ENCODERS[name])
  length, published = given.pop("length"), json.dumps(given.pop("published"))
  sections = systems.default_sections("pretrained_text")
  model = sections["model"].to_dict() | dict(given, published=published, null=(0,) * length)
  text = sections["text"].to_dict() | {"length": length}
  return systems.build({"system": "pretrained_text", "model": model, "text": text}, dtype=dtype)


def shapes_of(system: System, rows: int) -> Any:
  """The shapes of a component's variables."""
  from t2i_jax import batch_spec

  batch = batch_spec.abstract_batch(system, rows)
  return jax.eval_shape(lambda given: system.init(jax.random.key(0), given), batch)


def features_of(encoder: System) -> dict[str, np.ndarray]:
  """What is stored of a caption's features, all zeros [1, ...], by field."""
  text = {k: jnp.asarray(v).reshape(1, -1) for k, v in encoder.null_text().items()}
  found = jax.eval_shape(lambda v: encoder.encode(v, text), shapes_of(encoder, 1))
  fields = {name: getattr(found, name) for name in ("sequence", "mask", "pooled")}
  return {
    name: np.zeros(value.shape, bool if name == "mask" else jnp.bfloat16)
    for name, value in fields.items() if value is not None
  }  # fmt: skip


def latents_of(first_stage: System, resolution: int) -> base.Field:
  """What is stored of a picture: the posterior's moments."""
  height, width, channels = first_stage.latent_shape(resolution)
  return base.Field((height, width, 2 * channels), "float16")
