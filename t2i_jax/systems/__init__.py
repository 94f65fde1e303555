"""The systems by name, and how one is built from a config."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from t2i_jax.errors import UserError, unknown
from t2i_jax.systems import base

SYSTEMS = {
  "conditional_vae": "t2i_jax.systems.vae.conditional_vae:ConditionalVAE",
  "gan_cls": "t2i_jax.systems.gan.gan_cls:GANCLS",
  "ddpm": "t2i_jax.systems.diffusion.ddpm:DDPM",
  "pretrained_text": "t2i_jax.systems.text.pretrained:PretrainedText",
}
# Fields of a system or of its text conditioner that do not come from the config.
_BUILT = ("text", "dtype", "components", "component", "null_embedding")


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
  config: Mapping[str, Any], components: Mapping[str, Any] | None = None, dtype: Any = jnp.float32
) -> base.System:
  """The system of a config.

  Args:
    config: with the sections `system`, `model` and `text`.
    components: systems of `config.components`, by name.
    dtype: type of the computation.

  Raises:
    UserError: for an unknown system or key, or values that make no system.
  """
  from t2i_jax.systems.conditioning import TextConditioner

  components = dict(components or {})
  cls = load(config["system"])
  for section, target in (("model", cls), ("text", TextConditioner)):
    for key in config[section]:
      known = [f"{section}.{name}" for name in _defaults(target)]
      if f"{section}.{key}" not in known:
        raise unknown("config key", f"{section}.{key}", known)
  encoder = components.pop("text_encoder", None)
  if config["text"].get("encoder") == "component" and encoder is None:
    raise UserError("text.encoder=component needs components.text_encoder=PATH of its export")
  if encoder is not None:
    base.require(encoder, base.TextEncoder, "components.text_encoder")
  text = TextConditioner(**config["text"], component=encoder, dtype=dtype)
  built: dict[str, Any] = {"text": text, "dtype": dtype}
  if components:
    if "components" not in {field.name for field in dataclasses.fields(cls)}:
      raise UserError(f"system {config['system']} takes no component '{sorted(components)[0]}'")
    built["components"] = components
  return cls(**config["model"], **built)


def _defaults(cls: type) -> dict[str, Any]:
  return {f.name: f.default for f in dataclasses.fields(cls) if f.name not in _BUILT}
