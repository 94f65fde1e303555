"""A latent diffusion model of public parts, put together into one export."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from t2i_jax import assembly, batch_spec, export, recipe
from t2i_jax.conversion import blamed, dtype_of
from t2i_jax.conversion.networks import Network
from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.conditioning import GROUP
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.systems.diffusion.ldm import FIRST_STAGE, LATENTS
from t2i_jax.text.tokenizer import Tokenizers
from t2i_jax.weights.stored import Tensors

# A first stage's part and the encoders' are exports of their own while a model is put together.
Exports = Mapping[str, Path]


# What published U-Nets of so many channels are for, that read more than latents of 4.
_USES = {5: "drawing by depth", 7: "upscaling", 8: "editing by instructions", 9: "inpainting"}


@dataclasses.dataclass(frozen=True)
class Model:
  """What a latent diffusion model is made of.

  Attributes:
    system: "ldm", "stable_diffusion", "sdxl", "sd3", "dit" or "u_vit".
    network: the kind of its denoiser.
    options: of its denoiser, as `weights.unet` or `weights.transformer_config` has them.
    tensors: of its denoiser, under anyone's names.
    process: settings of `model`, as of `schedulers.process_of`.
    sampling: sampling options.
    text: settings of `text`.
    source: where it is, for errors.
    scale: of its latents, where it is not the first stage's own.
  """

  system: str
  network: Network
  options: Mapping[str, Any]
  tensors: Tensors
  process: Mapping[str, Any]
  sampling: Mapping[str, Any]
  text: Mapping[str, Any]
  source: str
  scale: float = 0.0


def write(
  output: str, model: Model, components: Exports, resolution: int = 0, dtype: str = "stored"
) -> Path:
  """Writes the export of a model.

  Args:
    output: the export, replaced if it exists.
    model: what it is.
    components: exports of its first stage and its text encoders, by the names of components.
    resolution: side of the pictures that it was trained on; 0 for what the U-Net's config says.
    dtype: of the numbers, one of `conversion.DTYPES`.

  Raises:
    UserError: the parts do not fit one another, or are not what our systems have.
  """
  parts = {name: export.read(path, stored=True) for name, path in components.items()}
  about = {
    name: {"config": part.config.to_dict(), "components": part.components, "step": part.step,
           "fingerprint": export.fingerprint(part.path)}
    for name, part in parts.items()
  }  # fmt: skip
  first_stage = parts[FIRST_STAGE].config.model
  with blamed(model.source):
    config = _config(model, first_stage, resolution)
  variables: dict[str, Any] = {}
  for name, part in parts.items():
    for kind, groups in part.variables.items():
      variables.setdefault(kind, {})[name] = groups
  with blamed(model.source):
    system = assembly.build_with(config, about)
    _check_network(system, model)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    abstract = jax.eval_shape(
      lambda batch, frozen: system.init(jax.random.key(0), batch, frozen),
      batch_spec.abstract_batch(system, 2), frozen,
    )  # fmt: skip
  params = model.network.map_of(model.tensors, model.options).stored(
    model.tensors, abstract["params"][DENOISER], source=model.source, dtype=dtype_of(dtype)
  )
  measured = {
    name: np.float32(config.model[f"latent_{name}"]) for name in ("scale", "shift")
  }
  variables = trees.merge(
    variables, {"params": {DENOISER: params}, LATENTS: {DENOISER: measured}}
  )
  tokenizers = Tokenizers({
    name: part.tokenizers.of[GROUP] for name, part in parts.items() if part.tokenizers.of
  })
  return export.write(output, config, 0, variables, tokenizers, about, ema=False)


def _config(model: Model, first_stage: ConfigDict, resolution: int) -> ConfigDict:
  factor = 2 ** (len(first_stage.multipliers) - 1)
  resolution = resolution or factor * model.options["resolution"] or first_stage.resolution
  config = recipe.base(model.system, "folder")
  settings = model.network.settings(model.options)
  config.model.update({name: settings[name] for name in settings if name in config.model})
  config.model.update(
    resolution=resolution, latent_scale=model.scale or first_stage.scale,
    latent_shift=first_stage.shift, weighting=model.process["prediction"],
    learned_variance=model.options["out_channels"] == 2 * model.options["in_channels"],
    **model.process,
  )  # fmt: skip
  config.text.update({"encoder": "component", **model.text})
  config.sample.options.update(model.sampling)
  return config


def workplace(output: str) -> tempfile.TemporaryDirectory:
  """Where parts are kept until they are one: beside the export, on the same disk."""
  export.check_replaceable(output)
  path = export.located(output)
  if "://" in str(path):
    return tempfile.TemporaryDirectory()
  path.parent.mkdir(parents=True, exist_ok=True)
  return tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)


def _check_network(system: Any, model: Model) -> None:
  """Raises where the system's network differs from the public one in what no config says."""
  options = model.options
  latents = system.shape[-1]
  if options["in_channels"] != latents:
    found = options["in_channels"]
    raise UserError(f"{model.source}: its network reads {found} channels and its latents have "
                    f"{latents}: a model for {_USES.get(found, 'inpainting or upscaling')}, which "
                    "is not known; only models that draw from noise and a text are")
  for name, ours in network_options(system, latents).items():
    if name in options and ours != options[name]:
      raise UserError(f"{model.source}: a {model.system} whose network has {name}={options[name]} "
                      f"is not known, only with {ours}")


def network_options(system: Any, latents: int) -> dict[str, Any]:
  """The attributes of a system's network, which reads so many channels."""
  network = system.network
  options = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
  # 0 is as many as it reads.
  return {**options, "out_channels": network.out_channels or latents}
