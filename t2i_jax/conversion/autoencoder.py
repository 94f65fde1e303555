"""Public autoencoders of latent diffusion to exports of ours, and back."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from t2i_jax import assembly, batch_spec, export, recipe
from t2i_jax.conversion import blamed, dtype_of, new_folder, read_json, write_json
from t2i_jax.errors import UserError
from t2i_jax.text.tokenizer import Tokenizers
from t2i_jax.weights import autoencoder as maps
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import Tensors, open_weights

CLASS = "AutoencoderKL"
WEIGHTS = "diffusion_pytorch_model.safetensors"
GROUPS = ("encoder", "decoder")
# The options of a config of `kl_autoencoder` that its config.json has.
OPTIONS = (
  "resolution", "latent_channels", "channels", "multipliers", "blocks", "attention_levels",
  "middle_attention", "pointwise", "groups", "scale", "shift",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """A public autoencoder.

  Attributes:
    options: of our system.
    tensors: of its weights, under either's names.
    source: where they are, for errors.
  """

  options: Mapping[str, Any]
  tensors: Tensors
  source: str


def is_among(tensors: Tensors) -> bool:
  """Whether a file holds an autoencoder."""
  try:
    maps.map_of(tensors, 1)
  except UserError:
    return False
  return True


def open_folder(folder: Path) -> Autoencoder:
  """The autoencoder in a folder of diffusers."""
  published = read_json(folder / "config.json")
  if published.get("_class_name") != CLASS:
    raise UserError(f"{folder / 'config.json'} is of class {published.get('_class_name')}, not "
                    f"{CLASS}")
  with blamed(str(folder / "config.json")):
    options = maps.from_diffusers(published)
  return Autoencoder(options, open_weights(folder), str(folder))


def open_tensors(
  tensors: Tensors, source: str, resolution: int, scale: float, shift: float = 0.0
) -> Autoencoder:
  """The autoencoder among the tensors of a file, which says neither resolution nor scale."""
  options = {**maps.options_of(tensors), "groups": 32, "shift": shift}
  return Autoencoder({**options, "resolution": resolution, "scale": scale}, tensors, source)


def write(output: str | Path, autoencoder: Autoencoder, dtype: str = "stored") -> Path:
  """Writes the export of an autoencoder, with nothing to train it by.

  Args:
    output: the export, replaced if it exists.
    autoencoder: of `open_folder` or `open_tensors`.
    dtype: of the numbers, one of `conversion.DTYPES`.
  """
  export.check_replaceable(output)
  options, tensors = autoencoder.options, autoencoder.tensors
  config = recipe.base("kl_autoencoder", "folder")
  with blamed(f"the autoencoder in {autoencoder.source}"):
    config.model.update(**options, perceptual_weight=0.0, adversarial_weight=0.0)
    system = assembly.build_system(config)
    batch = batch_spec.abstract_batch(system, 1)
    variables = jax.eval_shape(lambda batch: system.init(jax.random.key(0), batch), batch)
  abstract = {name: variables["params"][name] for name in GROUPS}
  names = maps.map_of(tensors, len(options["multipliers"]))
  params = names.stored(tensors, abstract, source=autoencoder.source, dtype=dtype_of(dtype))
  return export.write(output, config, 0, {"params": params}, Tokenizers({}), ema=False)


def to_folder(exported: export.Export, output: str) -> Path:
  """Writes the folder that diffusers reads of an export of `kl_autoencoder`."""
  maps.to_diffusers({name: exported.config.model[name] for name in OPTIONS})
  folder = new_folder(Path(output).expanduser())
  write_model(folder, exported.config, exported.variables["params"])
  return folder


def write_model(folder: Path, config: ConfigDict, params: Mapping[str, Any]) -> None:
  """Writes config.json and the weights of diffusers."""
  options = {name: config.model[name] for name in OPTIONS}
  names = maps.diffusers_map(len(options["multipliers"]))
  write_json(folder / "config.json", maps.to_diffusers(options))
  write_safetensors(folder / WEIGHTS, names.save({name: params[name] for name in GROUPS}))
