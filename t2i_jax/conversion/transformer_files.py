"""Transformers in files of their authors to exports of ours, and back: SD3, DiT and U-ViT.

Such a file holds the network, of Stable Diffusion 3 also the autoencoder and perhaps the text
encoders, and never a tokenizer: what it has not is taken from the folder of a pipeline of
diffusers. What no file says (heads, processes, the latents' scale) is as published.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from t2i_jax import assembly, export
from t2i_jax.conversion import autoencoder, begun, new_file, parts, pipelines, text
from t2i_jax.conversion.models import Held
from t2i_jax.conversion.networks import TRANSFORMER
from t2i_jax.errors import UserError
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.systems.diffusion.latent import FIRST_STAGE
from t2i_jax.weights import autoencoder as autoencoders
from t2i_jax.weights import dit, mmdit, u_vit
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import Tensors
from t2i_jax.weights.text_encoders import CLIP_TEXT, T5

# How the names of SD3's text encoders begin, by the component's name.
ENCODERS = {
  "text_encoder": "text_encoders.clip_l.transformer.",
  "text_encoder_2": "text_encoders.clip_g.transformer.",
  "text_encoder_3": "text_encoders.t5xxl.transformer.",
}
_BETAS = {"steps": 1000, "prediction": "epsilon", "zero_terminal_snr": False}
_LINEAR = {**_BETAS, "schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
_SCALED = {**_BETAS, "schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012}


@dataclasses.dataclass(frozen=True)
class Kind:
  """A published transformer in a file.

  Attributes:
    name: its.
    told_by: the end of a name that no other kind has.
    options_of: of its tensors.
    form: of the pipeline whose parts it has.
    process: settings of `model`.
    sampling: sampling options.
  """

  name: str
  told_by: str
  options_of: Callable[[Tensors], dict[str, Any]]
  form: pipelines.Form
  process: Mapping[str, Any]
  sampling: Mapping[str, Any]


_U_VIT = dataclasses.replace(pipelines.FORMS["stable_diffusion"], system="u_vit",
                             network=TRANSFORMER)  # fmt: skip
KINDS = (
  Kind("Stable Diffusion 3", "joint_blocks.0.x_block.attn.qkv.weight", mmdit.options_of,
       pipelines.FORMS["sd3"], {"schedule": "flow", "prediction": "flow", "shift": 3.0},
       {"solver": "flow_euler", "spacing": "linspace"}),
  Kind("DiT", "y_embedder.embedding_table.weight", dit.options_of, pipelines.FORMS["dit"], _LINEAR,
       {"solver": "ddpm", "variance": "learned", "steps": 250, "spacing": "linspace",
        "guidance": 4.0}),
  Kind("U-ViT", "in_blocks.0.attn.qkv.weight", u_vit.options_of, _U_VIT, _SCALED,
       {"solver": "dpmpp_2m", "steps": 50, "guidance": 2.0}),
)  # fmt: skip
SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609
# Of U-ViT's latents of COCO's pictures; with labels the first stage's own was taken.
U_VIT_SCALE = 0.23010


def kind_of(tensors: Tensors) -> Kind | None:
  """Of a file's tensors; None for a file of anything else."""
  for kind in KINDS:
    if any(name.endswith(kind.told_by) for name in tensors):
      return kind
  return None


def convert(
  tensors: Tensors, source: str, output: str, folder: str = "", *, resolution: int = 0,
  length: int = 0, dtype: str = "stored", apart: bool = False,
) -> tuple[Path, list[str]]:
  """Writes the export of a transformer in a file.

  Args:
    tensors: of the file.
    source: the file, for errors.
    output: the export, replaced if it exists.
    folder: of a pipeline of diffusers, for what the file has not: vae, tokenizer, text_encoder...
    resolution: side of the pictures; 0 for that of the places that the file holds.
    length: tokens that T5 takes of a caption; 0 for as many as diffusers draws with.
    dtype: of the numbers, one of `conversion.DTYPES`.
    apart: whether its equal blocks are one by one rather than as one stack.

  Returns:
    the export, and lines on what the file did not say.

  Raises:
    UserError: it holds no such network, or not all of one; or the folder lacks a part.
  """
  kind = kind_of(tensors)
  tensors = averages(tensors)
  options = kind.options_of(tensors)
  form, own = kind.form, _own(tensors)
  pipelines.check_length(length, kind.name, form)
  if kind.name != "Stable Diffusion 3" and options["in_channels"] != 4:
    raise UserError(f"{source} holds a {kind.name} of {options['in_channels']} channels; known are "
                    "those in latents of 4")
  place = Path(folder).expanduser() if folder else None
  told = form.encoders if options["context_width"] else {}
  encoders = {
    name: pair for name, pair in told.items()
    if name not in form.optional or name in own or (place and (place / pair[0]).is_dir())
  }  # fmt: skip
  settings = pipelines.text_of(form, encoders) if told else {"encoder": "none"}
  scale = U_VIT_SCALE if kind.name == "U-ViT" and told else 0.0
  without = pipelines.without(form, encoders, length, options) if told else {}
  model = parts.Model(
    form.system, form.network, options, own[DENOISER],
    {**kind.process, **without, **pipelines.blocks(apart)}, kind.sampling, settings, source, scale,
  )  # fmt: skip
  with parts.workplace(output) as work:
    if autoencoder.is_among(tensors):
      side = resolution or 8 * options["resolution"]
      stage = autoencoder.open_tensors(tensors, source, side, SD3_SCALE, SD3_SHIFT)
    else:
      stage = autoencoder.open_folder(_part(place, "vae", source))
    components = {FIRST_STAGE: autoencoder.write(f"{work}/{FIRST_STAGE}", stage, dtype)}
    for name, (encoder, tokenizer) in encoders.items():
      if name in own:
        found = _encoder(name, own[name], source)
      else:
        found = text.open_encoder(str(_part(place, encoder, source)))
      components[name] = text.write(
        f"{work}/{name}", found, str(_part(place, tokenizer, source)),
        pipelines.reading_of(form, name, length), dtype,
      )  # fmt: skip
    written = parts.write(output, model, components, resolution, dtype)
  lines = [f"taken as published: {options['heads']} heads, schedule {kind.process['schedule']}"]
  if set(encoders) != set(told):
    lines.append(pipelines.NO_T5)
  return written, lines


def averages(tensors: Tensors) -> Tensors:
  """The averages over its training of a checkpoint of DiT's, which holds the network twice."""
  ema = {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")}
  return ema or tensors


def write(exported: export.Export, output: str) -> Path:
  """Writes the file of DiT's or U-ViT's network alone, under its authors' names.

  Raises:
    UserError: they have no such network, or something is in the file's place.
  """
  path = new_file(output)
  config, source = exported.config, exported.path
  system = assembly.build_with(config, exported.components)
  options = {**parts.network_options(system, system.shape[-1]), "grid": system.shape[0]}
  if config.system == "dit":
    if options["modulation"] != "zero" or config.text.encoder != "none" or not options["classes"]:
      raise UserError(f"{source} reads a text, and DiT's files are of networks that read labels; "
                      "use --to=diffusers for PixArt-alpha's")
    options["grid"] //= options["patch"]
    names = dit.authors_map(options)
  else:
    names = u_vit.authors_map(options)
  write_safetensors(path, names.save(exported.variables["params"][DENOISER]))
  return path


def write_model(held: Held, output: str) -> Path:
  """Writes Stable Diffusion 3 as one file, with its autoencoder and its text encoders."""
  path = new_file(output)
  tensors = begun(mmdit.SINGLE_FILE, mmdit.single_file_map(held.options).save(held.denoiser))
  stage = {name: held.first_stage.params[name] for name in autoencoder.GROUPS}
  tensors |= begun(autoencoders.SINGLE_FILE, autoencoders.single_file_map().save(stage))
  for name, encoder in held.encoders.items():
    names = T5 if encoder.config.model.kind == "t5" else CLIP_TEXT
    tensors |= begun(ENCODERS[name], names.save(encoder.params["encoder"]))
  write_safetensors(path, tensors)
  return path


def _own(tensors: Tensors) -> dict[str, Tensors]:
  """The tensors of each part in a file, without how their names begin."""
  found: dict[str, dict[str, Any]] = {}
  for name, tensor in tensors.items():
    for part, prefix in ENCODERS.items():
      if name.startswith(prefix):
        found.setdefault(part, {})[name.removeprefix(prefix)] = tensor
        break
    else:
      if not name.startswith("text_encoders."):
        found.setdefault(DENOISER, {})[name] = tensor
  return found


def _encoder(name: str, tensors: Tensors, source: str) -> text.Encoder:
  if name == "text_encoder_3":
    return text.t5(tensors, source)
  return text.clip(tensors, "quick_gelu" if name == "text_encoder" else "gelu", source)


def _part(place: Path | None, name: str, source: str) -> Path:
  """A folder of the pipeline; UserError where there is none."""
  if place is None:
    raise UserError(f"'{source}' has no {name}: name the folder of a pipeline of diffusers that "
                    "has it with --parts")
  if not place.is_dir():
    raise UserError(f"--parts={place} is no folder; name that of a pipeline of diffusers")
  if not (place / name).is_dir():
    raise UserError(f"--parts={place} has no folder {name}, and '{source}' has none either; copy "
                    "it there")
  return place / name
