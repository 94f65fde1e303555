"""An export of a latent diffusion model, taken apart to be given back."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from t2i_jax import assembly, export
from t2i_jax import config as configs
from t2i_jax.conversion.parts import network_options
from t2i_jax.conversion.pipelines import FORMS, Form, form_of, text_of
from t2i_jax.errors import UserError
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.systems.diffusion.ldm import FIRST_STAGE, LATENTS
from t2i_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Part:
  """A component: its config and its parameters."""

  config: ConfigDict
  params: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Held:
  """What an export holds.

  Attributes:
    form: of the pipeline.
    config: of the system.
    options: of its denoiser, as `weights.unet` or `weights.transformer_config` has them.
    denoiser: its parameters.
    first_stage, encoders: the components; the first stage's config has the scale that the latents
      are modelled with.
    tokenizers: of the encoders, by their names.
  """

  form: Form
  config: ConfigDict
  options: Mapping[str, Any]
  denoiser: Mapping[str, Any]
  first_stage: Part
  encoders: Mapping[str, Part]
  tokenizers: Mapping[str, Tokenizer]

  def published(self, name: str) -> dict[str, Any]:
    """config.json of an encoder."""
    return json.loads(self.encoders[name].config.model.published)


def taken_apart(exported: export.Export) -> Held:
  """The model in an export.

  Raises:
    UserError: it is of another system, or has parts that pipelines have not.
  """
  source = exported.path
  config, params = exported.config, exported.variables["params"]
  form = form_of(config)
  if form is None:
    raise UserError(f"{source} is an export of {config.system}; whole models are those of "
                    f"{', '.join(dict.fromkeys(form.system for form in FORMS.values()))}")
  if config.text.encoder != ("component" if form.encoders else "none"):
    raise UserError(f"{source} reads text by an encoder that was trained with it; diffusers has "
                    "no pipeline for that")
  parts = {
    name: Part(configs.from_json(json.dumps(about["config"])), params[name])
    for name, about in exported.components.items()
  }
  encoders = {name: part for name, part in parts.items() if name != FIRST_STAGE}
  system = assembly.build_with(config, exported.components)
  _check_text(source, config, form, encoders)
  if FIRST_STAGE not in parts:
    raise UserError(f"{source} models pixels; diffusers' {form.name} has an autoencoder")
  if len(getattr(system, "classes", ())) > 1:
    raise UserError(f"{source} reads the labels {', '.join(name for name, _ in system.classes)}; "
                    f"a {form.name} reads one class")
  stage = parts[FIRST_STAGE]
  if stage.config.system != "kl_autoencoder":
    raise UserError(f"{source} has a first stage of {stage.config.system}; diffusers' pipelines "
                    "have kl_autoencoder's")
  with stage.config.unlocked():
    stage.config.model.scale = _measured(exported, stage.config, "scale")
    stage.config.model.shift = _measured(exported, stage.config, "shift")
  if stage.config.model.shift and form.system != "sd3":
    raise UserError(f"{source} shifts its latents by {stage.config.model.shift:g}; diffusers' "
                    f"{form.name} shifts none")
  latents, sizes = system.shape[-1], form.network.sizes_of(params[DENOISER])
  options = {
    **network_options(system, latents), "in_channels": latents, **sizes,
    "resolution": system.shape[0],
  }
  return Held(
    form, config, options, params[DENOISER], stage, encoders, exported.tokenizers.of
  )


def _check_text(
  source: Any, config: ConfigDict, form: Form, encoders: Mapping[str, Part]
) -> None:
  """Raises where the text is read otherwise than the pipeline reads it."""
  if not set(form.encoders) - set(form.optional) <= set(encoders) <= set(form.encoders):
    raise UserError(f"{source} has the components {', '.join(sorted(encoders))}; a {form.name} has "
                    f"the text encoders {', '.join(form.encoders)}")
  if config.text.null == "learned" or (form.system != "sdxl" and config.text.null != "empty"):
    raise UserError(f"{source} has text.null={config.text.null}; a {form.name} has the empty "
                    "caption")
  for name, value in text_of(form, encoders).items():
    if name in ("encoders", "pooled") and tuple(config.text[name]) != value:
      raise UserError(f"{source} has text.{name}={tuple(config.text[name])}; a {form.name} has "
                      f"{value}")
  for name, part in encoders.items():
    model, reading = part.config.model, form.reading[name]
    if part.config.system != "pretrained_text":
      raise UserError(f"{source}: {name} is of {part.config.system}, not a public encoder")
    for setting in ("layer", "final_norm", "project", "masked"):
      if model[setting] != getattr(reading, setting):
        raise UserError(f"{source}: {name} has {setting}={model[setting]}; a {form.name} reads it "
                        f"with {setting}={getattr(reading, setting)}")


def _measured(exported: export.Export, stage: ConfigDict, name: str) -> float:
  """`scale` or `shift` of the latents, as it was given, or measured."""
  measured = exported.variables[LATENTS][DENOISER][name]
  for given in (exported.config.model[f"latent_{name}"], stage.model[name]):
    if np.float32(given) == np.float32(measured):
      return float(given)
  return float(measured)
