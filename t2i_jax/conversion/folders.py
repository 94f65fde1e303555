"""Exports of latent diffusion models to pipelines of diffusers."""

from pathlib import Path

from t2i_jax.conversion import autoencoder, new_folder, schedulers, text, write_json
from t2i_jax.conversion.autoencoder import WEIGHTS
from t2i_jax.conversion.models import Held
from t2i_jax.conversion.pipelines import INDEX, SCHEDULER
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.unet import diffusers_map
from t2i_jax.weights.unet_config import linear_projections, to_diffusers

# What pipelines may have and ours have not.
ABSENT = ("safety_checker", "feature_extractor", "image_encoder")


def write(held: Held, output: str) -> Path:
  """Writes the folder that diffusers loads.

  Raises:
    UserError: diffusers has no such model, or something is in the folder.
  """
  form, path = held.form, Path(output).expanduser()
  config = to_diffusers(held.options)
  scheduler = schedulers.to_diffusers(held.config.model, held.config.sample.options)
  folder = new_folder(path)
  unet, names = _inside(folder, "unet"), diffusers_map(
    held.options, not linear_projections(held.options)
  )
  write_json(unet / "config.json", config)
  write_safetensors(unet / WEIGHTS, names.save(held.denoiser))
  stage = held.first_stage
  autoencoder.write_model(_inside(folder, form.first_stage), stage.config, stage.params)
  index = {
    "_class_name": form.name, "unet": ("diffusers", config["_class_name"]),
    form.first_stage: ("diffusers", autoencoder.CLASS),
    "scheduler": ("diffusers", scheduler["_class_name"]),
  }  # fmt: skip
  for name, (encoder, tokenizer) in form.encoders.items():
    part = held.encoders[name]
    text.write_model(_inside(folder, encoder), part.config, part.params["encoder"])
    kind = part.config.model.kind
    text.write_tokenizer(_inside(folder, tokenizer), kind, held.tokenizers[name])
    index[encoder], index[tokenizer] = form.classes[name]
  write_json(_inside(folder, SCHEDULER.partition("/")[0]) / Path(SCHEDULER).name, scheduler)
  if form.system == "sdxl":
    index["force_zeros_for_empty_prompt"] = held.config.text.null == "zeros"
  if form.system != "ldm":
    index |= {name: (None, None) for name in ABSENT}
  if form.system == "stable_diffusion":
    index["requires_safety_checker"] = False
  # Last, for it makes a pipeline of the folder.
  write_json(folder / INDEX, index)
  return folder


def _inside(folder: Path, name: str) -> Path:
  (folder / name).mkdir()
  return folder / name
