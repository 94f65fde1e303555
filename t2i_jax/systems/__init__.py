"""The systems by name, and how one is built from a config."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from t2i_jax.errors import UserError, unknown
from t2i_jax.systems import base
from t2i_jax.systems.capabilities import TextEncoder, require

SYSTEMS = {
  "adm": "t2i_jax.systems.diffusion.adm:ADM",
  "conditional_vae": "t2i_jax.systems.vae.conditional_vae:ConditionalVAE",
  "feature_net": "t2i_jax.systems.perceptual.feature_net:FeatureNet",
  "gan_cls": "t2i_jax.systems.gan.gan_cls:GANCLS",
  "kl_autoencoder": "t2i_jax.systems.vae.kl_autoencoder:KLAutoencoder",
  "lora": "t2i_jax.systems.adapters.lora:LoRA",
  "lpips": "t2i_jax.systems.perceptual.lpips:LPIPS",
  "ddpm": "t2i_jax.systems.diffusion.ddpm:DDPM",
  "dit": "t2i_jax.systems.diffusion.dit:DiT",
  "ldm": "t2i_jax.systems.diffusion.ldm:LDM",
  "stable_diffusion": "t2i_jax.systems.diffusion.stable_diffusion:StableDiffusion",
  "sdxl": "t2i_jax.systems.diffusion.stable_diffusion:SDXL",
  "sd3": "t2i_jax.systems.diffusion.sd3:SD3",
  "u_vit": "t2i_jax.systems.diffusion.u_vit:UViT",
  "clip": "t2i_jax.systems.text.clip:CLIP",
  "noisy_classifier": "t2i_jax.systems.guides.noisy_classifier:NoisyClassifier",
  "semantic_guidance": "t2i_jax.systems.guides.semantic_guidance:SemanticGuidance",
  "pretrained_text": "t2i_jax.systems.text.pretrained:PretrainedText",
}
# Fields of a system or of its text conditioner that do not come from the config.
_BUILT = ("text", "dtype", "components", "cached_null", "cached_latent", "latent_statistics")


def load(name: str) -> type:
  """The class of a system, imported now; UserError for an unknown name."""
  if name not in SYSTEMS:
    raise unknown("system", name, SYSTEMS)
  module, _, attribute = SYSTEMS[name].partition(":")
  return getattr(importlib.import_module(module), attribute)


def default_sections(name: str) -> dict[str, ConfigDict]:
  """The sections `model` and `text` and the sampling options of a system, with defaults."""
  from t2i_jax.systems.conditioning import TextConditioner

  cls = load(name)
  options = dataclasses.fields(cls.Options) if cls.Options else ()
  return {
    "model": ConfigDict(_defaults(cls)),
    "text": ConfigDict(_defaults(TextConditioner)),
    "options": ConfigDict({field.name: field.default for field in options}),
  }


def build(
  config: Mapping[str, Any], components: Mapping[str, Any] | None = None, dtype: Any = jnp.float32,
  cached_null: Mapping[str, Any] | None = None, cached_latent: base.Field | None = None,
  latent_statistics: tuple[float, float] | None = None,
) -> base.System:
  """The system of a config.

  Args:
    config: with the sections `system`, `model` and `text`.
    components: systems of `config.components`, by name.
    dtype: type of the computation.
    cached_null: of the `TextConditioner`, where batches bring features.
    cached_latent: what batches bring in place of pictures, where they do.
    latent_statistics: mean and standard deviation of those latents.

  Raises:
    UserError: for an unknown system or key, or values that make no system.
  """
  components = dict(components or {})
  cls = load(config["system"])
  _check_keys(config, "model", cls)
  text = build_text(config, components, dtype, cached_null)
  for name in text.frozen_groups:
    components.pop(name)
  built: dict[str, Any] = {"text": text, "dtype": dtype}
  fields = {field.name for field in dataclasses.fields(cls)}
  if cached_latent is not None:
    if "cached_latent" not in fields:
      raise UserError(f"system {config['system']} models no latents; leave data.latents out")
    built["cached_latent"] = cached_latent
    if "latent_statistics" in fields:
      built["latent_statistics"] = latent_statistics
  if components:
    if "components" not in fields:
      raise UserError(f"system {config['system']} takes no component '{sorted(components)[0]}'; "
                      "text encoders are those that text.encoders names, with "
                      "text.encoder=component")
    built["components"] = components
  return cls(**config["model"], **built)


def build_text(
  config: Mapping[str, Any], components: Mapping[str, Any], dtype: Any = jnp.float32,
  cached_null: Mapping[str, Any] | None = None,
):
  """The `TextConditioner` of a config; arguments and errors as of `build`."""
  from t2i_jax.systems.conditioning import TextConditioner

  _check_keys(config, "text", TextConditioner)
  text = TextConditioner(**config["text"], dtype=dtype)
  encoders = {}
  if missing := [f"components.{x}=PATH" for x in text.frozen_groups if x not in components]:
    raise UserError(f"text.encoder=component needs {', '.join(missing)}: exports, which python -m "
                    "t2i_jax.convert makes of public encoders; or text.encoder=transformer, "
                    "trained with the system")
  for name in text.frozen_groups:
    require(components[name], TextEncoder, f"components.{name}")
    encoders[name] = components[name]
  return dataclasses.replace(text, components=encoders, cached_null=cached_null)


def _check_keys(config: Mapping[str, Any], section: str, cls: type) -> None:
  known = [f"{section}.{name}" for name in _defaults(cls)]
  for key in config[section]:
    if f"{section}.{key}" not in known:
      raise unknown("config key", f"{section}.{key}", known)


def _defaults(cls: type) -> dict[str, Any]:
  return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in _BUILT}
