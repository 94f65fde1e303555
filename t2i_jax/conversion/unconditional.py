"""Pipelines of diffusers that draw from noise alone, such as the first DDPMs, and ours of them.

A U-Net of pixels and a scheduler, in folders of their own or, as the first ones were published, all
in one folder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from t2i_jax import assembly, batch_spec, export, recipe
from t2i_jax.conversion import blamed, dtype_of, new_folder, read_json, schedulers, write_json
from t2i_jax.conversion.autoencoder import WEIGHTS
from t2i_jax.conversion.parts import network_options
from t2i_jax.errors import UserError
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.text.tokenizer import Tokenizers
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import open_weights
from t2i_jax.weights.unet import diffusers_map, widths_of
from t2i_jax.weights.unet_config import from_diffusers, to_diffusers
from t2i_jax.weights.unet_settings import PLAIN
from t2i_jax.weights.unet_single_file import map_of

CLASSES = ("DDPMPipeline", "DDIMPipeline")
INDEX, SCHEDULER = "model_index.json", "scheduler_config.json"
CHANNELS = 3


def convert(
  folder: Path, output: str, resolution: int = 0, dtype: str = "stored"
) -> tuple[Path, list[str]]:
  """Writes the export of a pipeline's folder; arguments and results as of `pipelines.convert`."""
  export.check_replaceable(output)
  unet, scheduler = (_part(folder, name) for name in ("unet", "scheduler"))
  with blamed(str(unet / "config.json")):
    options = from_diffusers(read_json(unet / "config.json"))
  _check(options, str(unet / "config.json"))
  published = read_json(scheduler / SCHEDULER)
  with blamed(str(scheduler / SCHEDULER)):
    process = schedulers.process_of(published, str(scheduler / SCHEDULER))
    sampling, lost = schedulers.options_of(published)
  if sampling["solver"] == "ddpm":
    sampling["steps"] = process["steps"]  # what fewer draw is much worse
  if not (resolution or options["resolution"]):
    raise UserError(f"{unet / 'config.json'} has no sample_size: give the side of the pictures "
                    "with --resolution=PIXELS")
  config = recipe.base("ddpm", "folder")
  tensors = open_weights(unet)
  with blamed(str(unet)):
    config.model.update({name: options[name] for name in options if name in config.model})
    config.model.update(
      **process, resolution=resolution or options["resolution"], weighting=process["prediction"],
      learned_variance=options["out_channels"] == 2 * CHANNELS,
    )
    config.text.encoder = "none"
    config.sample.options.update(sampling)
    system = assembly.build_system(config)
    batch = batch_spec.abstract_batch(system, 1)
    abstract = jax.eval_shape(lambda batch: system.init(jax.random.key(0), batch), batch)
  params = map_of(tensors, options).stored(
    tensors, abstract["params"][DENOISER], source=str(unet), dtype=dtype_of(dtype)
  )
  written = export.write(
    output, config, 0, {"params": {DENOISER: params}}, Tokenizers({}), ema=False
  )
  return written, [f"{scheduler / SCHEDULER}: {lost}"] * bool(lost)


def write(exported: export.Export, output: str) -> Path:
  """Writes the folder that diffusers loads of an export of `ddpm`.

  Raises:
    UserError: it reads a text, or diffusers has no such network or process.
  """
  config, source = exported.config, exported.path
  if config.text.encoder != "none" or exported.components:
    raise UserError(f"{source} reads a text or has components, for which diffusers has no pipeline "
                    "in pixels; only those with text.encoder=none can be given back")
  system = assembly.build_system(config)
  params = exported.variables["params"][DENOISER]
  options = {
    **network_options(system, CHANNELS), **widths_of(params), "resolution": system.resolution
  }
  published = to_diffusers(options)
  scheduler = schedulers.to_diffusers(config.model, config.sample.options)
  folder = new_folder(Path(output).expanduser())
  for name in ("unet", "scheduler"):
    (folder / name).mkdir()
  write_json(folder / "unet" / "config.json", published)
  write_safetensors(folder / "unet" / WEIGHTS, diffusers_map(options).save(params))
  write_json(folder / "scheduler" / SCHEDULER, scheduler)
  named = CLASSES[scheduler["_class_name"] == "DDIMScheduler"]
  # Last, for it makes a pipeline of the folder.
  write_json(folder / INDEX, {
    "_class_name": named, "unet": ("diffusers", PLAIN),
    "scheduler": ("diffusers", scheduler["_class_name"]),
  })  # fmt: skip
  return folder


def _part(folder: Path, name: str) -> Path:
  return folder / name if (folder / name).is_dir() else folder


def _check(options: Mapping[str, Any], source: str) -> None:
  if options["attention"] != "block":
    raise UserError(f"{source} is of a U-Net that reads a text, and these pipelines have none")
  if options["classes"]:
    raise UserError(f"{source} is of a U-Net with labels, which these pipelines give none")
  channels = options["in_channels"], options["out_channels"]
  if channels not in ((CHANNELS, CHANNELS), (CHANNELS, 2 * CHANNELS)):
    raise UserError(f"{source} is of a U-Net from {channels[0]} channels to {channels[1]}; known "
                    "are those of RGB pictures, from 3 to 3, or to 6 with learned variances")
