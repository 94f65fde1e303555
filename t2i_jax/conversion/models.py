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
from t2i_jax.conversion.pipelines import FORMS, Form
from t2i_jax.errors import UserError
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.systems.diffusion.ldm import FIRST_STAGE, LATENTS
from t2i_jax.text.tokenizer import Tokenizer
from t2i_jax.weights.unet import widths_of


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
    options: of its U-Net, as `weights.unet` has them.
    denoiser: the U-Net's parameters.
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
  if config.system not in FORMS:
    raise UserError(f"{source} is an export of {config.system}; whole models are those of "
                    f"{', '.join(FORMS)}")
  form = FORMS[config.system]
  if config.text.encoder != "component":
    raise UserError(f"{source} reads text by an encoder that was trained with it; diffusers has "
                    "no pipeline for that")
  parts = {
    name: Part(configs.from_json(json.dumps(about["config"])), params[name])
    for name, about in exported.components.items()
  }
  encoders = {name: part for name, part in parts.items() if name != FIRST_STAGE}
  system = assembly.build_with(config, exported.components)
  _check_text(source, config, form, encoders)
  stage = parts[FIRST_STAGE]
  if stage.config.system != "kl_autoencoder":
    raise UserError(f"{source} has a first stage of {stage.config.system}; diffusers' pipelines "
                    "have kl_autoencoder's")
  with stage.config.unlocked():
    stage.config.model.scale = _scale(source, exported, stage.config)
    stage.config.model.shift = 0.0
  options = {
    **network_options(system, system.shape[-1]), **widths_of(params[DENOISER]),
    "resolution": system.shape[0],
  }  # fmt: skip
  return Held(
    form, config, options, params[DENOISER], stage, encoders, exported.tokenizers.of
  )


def _check_text(
  source: Any, config: ConfigDict, form: Form, encoders: Mapping[str, Part]
) -> None:
  """Raises where the text is read otherwise than the pipeline reads it."""
  if set(encoders) != set(form.encoders):
    raise UserError(f"{source} has the components {', '.join(sorted(encoders))}; a {form.name} has "
                    f"the text encoders {', '.join(form.encoders)}")
  if config.text.null == "learned" or (form.system != "sdxl" and config.text.null != "empty"):
    raise UserError(f"{source} has text.null={config.text.null}; a {form.name} has the empty "
                    "caption")
  for name, part in encoders.items():
    model, reading = part.config.model, form.reading[name]
    if part.config.system != "pretrained_text":
      raise UserError(f"{source}: {name} is of {part.config.system}, not a public encoder")
    for setting in ("layer", "final_norm", "project", "masked"):
      if model[setting] != getattr(reading, setting):
        raise UserError(f"{source}: {name} has {setting}={model[setting]}; a {form.name} reads it "
                        f"with {setting}={getattr(reading, setting)}")


def _scale(source: Any, exported: export.Export, stage: ConfigDict) -> float:
  """Of the latents, as it was given, or measured."""
  measured = exported.variables[LATENTS][DENOISER]
  if float(measured["shift"]):
    raise UserError(f"{source} shifts its latents by {float(measured['shift']):g}; diffusers' "
                    "pipelines shift none")
  for given in (exported.config.model.latent_scale, stage.model.scale):
    if np.float32(given) == np.float32(measured["scale"]):
      return float(given)
  return float(measured["scale"])
