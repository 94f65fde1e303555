"""Exports of latent diffusion models to pipelines of diffusers."""

from pathlib import Path

from t2i_jax.conversion import autoencoder, new_folder, schedulers, text, write_json
from t2i_jax.conversion.autoencoder import WEIGHTS
from t2i_jax.conversion.models import Held
from t2i_jax.conversion.pipelines import INDEX, SCHEDULER
from t2i_jax.weights.safetensors_file import write_safetensors


def write(held: Held, output: str) -> Path:
  """Writes the folder that diffusers loads.

  Raises:
    UserError: diffusers has no such model, or something is in the folder.
  """
  form, path = held.form, Path(output).expanduser()
  config = form.network.to_diffusers(held.options)
  scheduler = schedulers.to_diffusers(held.config.model, held.config.sample.options)
  folder = new_folder(path)
  network = _inside(folder, form.network.folder)
  write_json(network / "config.json", config)
  names = form.network.diffusers_map(held.options)
  write_safetensors(network / WEIGHTS, names.save(held.denoiser))
  stage = held.first_stage
  autoencoder.write_model(_inside(folder, form.first_stage), stage.config, stage.params)
  index = {
    "_class_name": form.name, form.network.folder: ("diffusers", config["_class_name"]),
    form.first_stage: ("diffusers", autoencoder.CLASS),
    "scheduler": ("diffusers", scheduler["_class_name"]),
  }  # fmt: skip
  for name, (encoder, tokenizer) in form.encoders.items():
    if name not in held.encoders:
      index[encoder] = index[tokenizer] = (None, None)
      continue
    part = held.encoders[name]
    text.write_model(_inside(folder, encoder), part.config, part.params["encoder"])
    kind = part.config.model.kind
    text.write_tokenizer(_inside(folder, tokenizer), kind, held.tokenizers[name])
    index[encoder], index[tokenizer] = form.classes[name]
  write_json(_inside(folder, SCHEDULER.partition("/")[0]) / Path(SCHEDULER).name, scheduler)
  if form.system == "sdxl":
    index["force_zeros_for_empty_prompt"] = held.config.text.null == "zeros"
  index |= {name: (None, None) for name in form.absent}
  if form.system == "stable_diffusion":
    index["requires_safety_checker"] = False
  # Last, for it makes a pipeline of the folder.
  write_json(folder / INDEX, index)
  return folder


def _inside(folder: Path, name: str) -> Path:
  (folder / name).mkdir()
  return folder / name
