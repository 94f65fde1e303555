"""Files of guided diffusion to exports of ours, and back.

A U-Net becomes an `adm`, a classifier a `noisy_classifier`, which is its guide. Labels are numbers:
the files hold no names of classes.
"""

from pathlib import Path
from typing import Any

import jax

from t2i_jax import assembly, batch_spec, export, recipe
from t2i_jax.conversion import blamed, dtype_of, new_file
from t2i_jax.errors import UserError
from t2i_jax.systems.base import System
from t2i_jax.text.tokenizer import Tokenizers
from t2i_jax.weights import guided_diffusion as files
from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import Tensors
from t2i_jax.weights.unet_single_file import classifier_map, single_file_map

# As its samples were drawn: 250 steps, evenly with both ends.
_SAMPLING = {"solver": "ddpm", "steps": 250, "spacing": "linspace", "clip": True}
# What all its networks are, so that no file says it.
_ALL = {
  "attention": "block", "patch": 1, "coordinates": 0, "groups": 32, "epsilon": 1e-5,
  "block_resample": True, "draft": 0, "steps": 1000, "prediction": "epsilon", "beta_start": None,
  "beta_end": None, "zero_terminal_snr": False,
}  # fmt: skip


def convert(
  tensors: Tensors, source: str, output: str, resolution: int = 0, dtype: str = "stored"
) -> tuple[Path, list[str]]:
  """Writes the export of a U-Net or a classifier.

  Args:
    tensors: of its file.
    source: the file, for errors.
    output: the export, replaced if it exists.
    resolution: side of the pictures, where it is not the published one.
    dtype: of the numbers, one of `conversion.DTYPES`.

  Returns:
    the export, and a line on what the file did not say.

  Raises:
    UserError: it holds no network of guided diffusion, or not all of one.
  """
  export.check_replaceable(output)
  kind = files.kind_of(tensors)
  options = files.options_of(kind, tensors, source, resolution)
  config = recipe.base(kind, "folder")
  with blamed(source):
    config.model.update(options)
    config.text.encoder = "none"
    if kind == files.UNET:
      variance = "learned" if options["learned_variance"] else "large"
      config.sample.options.update(_SAMPLING, variance=variance)
    system = assembly.build_system(config)
    batch = batch_spec.abstract_batch(system, 1)
    abstract = jax.eval_shape(lambda batch: system.init(jax.random.key(0), batch), batch)
  (group,) = system.ema_groups
  params = _names(kind, system, options["resolution"]).stored(
    tensors, abstract["params"][group], source=source, dtype=dtype_of(dtype)
  )
  written = export.write(
    output, config, 0, {"params": {group: params}}, Tokenizers({}), ema=False
  )
  heads = f"{options['heads']} heads" if options.get("heads") else "heads of 64 channels"
  side = options["resolution"]
  return written, [f"taken as published for {side} px: schedule {options['schedule']}, {heads}"]


def write(exported: export.Export, output: str) -> Path:
  """Writes the file of an export of `adm` or `noisy_classifier`.

  Raises:
    UserError: guided diffusion has no such network, or something is in the file's place.
  """
  path = new_file(output)
  config, source = exported.config, exported.path
  kind, model = config.system, config.model
  fixed = {name: value for name, value in _ALL.items() if name in model}
  fixed |= files.flags_of(kind, model.resolution)
  for name, value in fixed.items():
    if model[name] != value:
      raise UserError(f"{source} has model.{name}={model[name]}; guided diffusion's files are of "
                      f"networks with {value}, at {model.resolution} px")
  if len(model.classes) > 1:
    names = ", ".join(name for name, _ in model.classes)
    raise UserError(f"{source} reads the labels {names}, and guided diffusion's networks one class")
  if config.text.encoder != "none" or exported.components:
    raise UserError(f"{source} reads a text or has components, and guided diffusion's files hold "
                    "one network, which reads labels at most")
  system = assembly.build_system(config)
  (group,) = system.ema_groups
  names = _names(kind, system, model.resolution)
  write_safetensors(path, names.save(exported.variables["params"][group]))
  return path


def _names(kind: str, system: System, resolution: int) -> KeyMap:
  network: Any = system.network
  fields = ("channels", "multipliers", "blocks", "attention", "attention_levels", "heads",
            "head_channels")  # fmt: skip
  options = {name: getattr(network, name) for name in fields}
  new_order = files.in_new_order(kind, resolution)
  if kind == files.UNET:
    return single_file_map(options, new_order=new_order)
  return classifier_map({**options, "pool": network.pool}, new_order)
