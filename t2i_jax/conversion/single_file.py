"""Whole models in one file, in the layout of latent diffusion's code, to exports of ours, and back.

Such a file holds the U-Net, the autoencoder and the text encoders, and neither tokenizers nor
settings: what it is is seen by its names and shapes, and the rest is as published.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t2i_jax import config as configs
from t2i_jax.conversion import autoencoder, begun, new_file, parts, text
from t2i_jax.conversion.models import Held
from t2i_jax.conversion.pipelines import FORMS
from t2i_jax.errors import UserError
from t2i_jax.systems.diffusion.ldm import FIRST_STAGE
from t2i_jax.weights import autoencoder as autoencoders
from t2i_jax.weights import unet_single_file as unets
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import Tensors, open_weights
from t2i_jax.weights.text_encoders import CLIP_TEXT, OPEN_CLIP_TEXT, ldm_text_map
from t2i_jax.weights.unet_config import linear_projections

# How the names of the text encoders begin, of CLIP under transformers' names and under OpenCLIP's;
# latent diffusion's own begins as the first.
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
FIRST, SECOND = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
LDM = f"{CLIP}attn_layers."
# What begins so is of another kind of model.
REFUSED = {
  "conditioner.embedders.0.model.": "Stable Diffusion XL's refiner, which draws on what the base "
  "model has begun",
  "cond_stage_model.embedding.": "latent diffusion by labels",
  "first_stage_model.quantize.": "latent diffusion in the codes of a VQ-GAN",
}
# Tokens of padding: of transformers' tokenizer, and of OpenCLIP's own, where it is number 0.
_PADS = {"quick_gelu": "<|endoftext|>", "gelu": "!"}
PREDICTIONS = ("epsilon", "v")


@dataclasses.dataclass(frozen=True)
class Kind:
  """A published model in one file.

  Attributes:
    name: its.
    system: ours.
    encoders: how the names of each begin, by the component's name.
    told_by: how names begin that no other kind has; those of the encoders if ().
    resolution: side of the pictures of those that predict the noise, and of those that predict v.
    scale: of the latents.
    sampling: sampling options.
  """

  name: str
  system: str
  encoders: Mapping[str, str]
  resolution: tuple[int, int]
  scale: float
  sampling: Mapping[str, Any]
  told_by: tuple[str, ...] = ()


_SAMPLING = {"solver": "ddim", "spacing": "leading", "offset": 1, "clip": False}
KINDS = (
  Kind("latent diffusion's text-to-image model", "ldm", {"text_encoder": CLIP}, (256, 256), 0.18215,
       {**_SAMPLING, "final_sigma": "sigma_min"}, (LDM,)),
  Kind("Stable Diffusion 1", "stable_diffusion", {"text_encoder": CLIP}, (512, 512), 0.18215,
       {**_SAMPLING, "final_sigma": "sigma_min"}),
  Kind("Stable Diffusion 2", "stable_diffusion", {"text_encoder": OPEN_CLIP}, (512, 768), 0.18215,
       {**_SAMPLING, "final_sigma": "sigma_min"}),
  Kind("Stable Diffusion XL", "sdxl", {"text_encoder": FIRST, "text_encoder_2": SECOND},
       (1024, 1024), 0.13025, {**_SAMPLING, "solver": "euler"}),
)  # fmt: skip


def holds_model(tensors: Tensors) -> bool:
  """Whether a file holds a whole model."""
  return any(name.startswith(unets.SINGLE_FILE) for name in tensors)


def convert(
  source: str,
  output: str,
  tokenizer: str,
  *,
  prediction: str = "",
  zero_terminal_snr: bool = False,
  ema: bool = False,
  resolution: int = 0,
  dtype: str = "stored",
) -> Path:
  """Writes the export of a model in one file.

  Args:
    source: the file.
    output: the export, replaced if it exists.
    tokenizer: folder of CLIP's tokenizer, which the encoders of Stable Diffusion share, or of
      BERT's, for latent diffusion.
    prediction: what the U-Net was trained to predict, one of `PREDICTIONS`.
    zero_terminal_snr: of its process, see `diffusion.schedules`.
    ema: take the averages of the U-Net over its training, which some files hold besides.
    resolution: side of the pictures; 0 for the published one.
    dtype: of the numbers, one of `conversion.DTYPES`.

  Raises:
    UserError: it holds no model that is known, or not all of one.
  """
  path = Path(source).expanduser()
  tensors = open_weights(path)
  kind = _kind(tensors, path)
  if prediction:
    configs.choose("--prediction", prediction, dict.fromkeys(PREDICTIONS))
  elif kind.name.endswith("2"):
    raise UserError(f"'{path}' holds {kind.name} and does not say what it predicts: give "
                    "--prediction=epsilon (512 px) or --prediction=v (768 px)")
  prediction = prediction or "epsilon"
  if not tokenizer:
    whose = "BERT's (bert-base-uncased)" if kind.system == "ldm" else "CLIP's"
    raise UserError(f"'{path}' is a file, which has no tokenizer beside; name the folder of "
                    f"{whose} with --tokenizer")
  resolution = resolution or kind.resolution[PREDICTIONS.index(prediction)]
  if ema:
    tensors = unets.averages(tensors)
  process = {
    "schedule": "scaled_linear", "steps": 1000, "beta_start": 8.5e-4, "beta_end": 0.012,
    "prediction": prediction, "zero_terminal_snr": zero_terminal_snr,
  }  # fmt: skip
  form = FORMS[kind.system]
  model = parts.Model(
    kind.system, form.network, unets.options_of(tensors), tensors, process, kind.sampling,
    form.text, str(path),
  )  # fmt: skip
  with parts.workplace(output) as place:
    found = autoencoder.open_tensors(tensors, str(path), resolution, kind.scale)
    components = {FIRST_STAGE: autoencoder.write(f"{place}/{FIRST_STAGE}", found, dtype)}
    for name, prefix in kind.encoders.items():
      encoder = _encoder(tensors, prefix, str(path), kind)
      pad = _PADS.get(encoder.published.get("hidden_act"), "")
      reading = dataclasses.replace(form.reading[name], pad=pad)
      components[name] = text.write(f"{place}/{name}", encoder, tokenizer, reading, dtype)
    return parts.write(output, model, components, resolution, dtype)


def write(held: Held, output: str) -> Path:
  """Writes a model of ours as one file.

  Raises:
    UserError: there is no such model in one file.
  """
  path = new_file(output)
  names = unets.single_file_map(held.options, not linear_projections(held.options))
  tensors = begun(unets.SINGLE_FILE, names.save(held.denoiser))
  stage = {name: held.first_stage.params[name] for name in autoencoder.GROUPS}
  tensors |= begun(autoencoders.SINGLE_FILE, autoencoders.single_file_map().save(stage))
  for name, encoder in held.encoders.items():
    if encoder.config.model.kind == "ldm":
      layers = held.published(name)["encoder_layers"]
      tensors |= begun(CLIP, ldm_text_map(layers).save(encoder.params["encoder"]))
      continue
    if encoder.config.model.kind != "clip":
      raise UserError(f"no model in one file is known whose {name} is of kind "
                      f"{encoder.config.model.kind}; use --to=diffusers")
    of_open_clip = held.published(name)["hidden_act"] == "gelu"
    if held.form.system == "sdxl":
      prefix = {"text_encoder": FIRST, "text_encoder_2": SECOND}[name]
      of_open_clip = prefix == SECOND
    else:
      prefix = OPEN_CLIP if of_open_clip else CLIP
    params = encoder.params["encoder"]
    named = (OPEN_CLIP_TEXT if of_open_clip else CLIP_TEXT).save(params)
    tensors |= begun(prefix, named)
    if prefix == OPEN_CLIP:
      tensors |= begun(prefix, _unread(named))
  write_safetensors(path, tensors)
  return path


def _kind(tensors: Tensors, path: Path) -> Kind:
  for prefix, what in REFUSED.items():
    if any(map(_begins(prefix), tensors)):
      raise UserError(f"'{path}' holds {what}, which is not known; known are "
                      f"{', '.join(kind.name for kind in KINDS)}")
  for kind in KINDS:
    marks = kind.told_by or kind.encoders.values()
    if all(any(map(_begins(prefix), tensors)) for prefix in marks):
      return kind
  known = " nor ".join(
    dict.fromkeys(" with ".join(kind.encoders.values()) for kind in KINDS)
  )
  found = sorted({".".join(name.split(".")[:3]) for name in tensors if "cond" in name})
  raise UserError(f"'{path}' holds no model that is known: its text encoders are neither {known}"
                  f"{'; there is ' + ', '.join(found[:4]) if found else ''}")


def _begins(prefix: str):
  return lambda name: name.startswith(prefix)



def _encoder(tensors: Tensors, prefix: str, source: str, kind: Kind) -> text.Encoder:
  """The text encoder whose names begin so."""
  own = {
    name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)
  }
  if kind.system == "ldm":
    return text.ldm(own, source)
  if prefix in (CLIP, FIRST):
    return text.clip(own, "quick_gelu", source)
  if prefix == OPEN_CLIP:
    # Version 2 reads the last layer but one, and diffusers' folders have no other.
    blocks = "transformer.resblocks."
    last = max(int(name.split(".")[2]) for name in own if name.startswith(blocks))
    own = {name: t for name, t in own.items() if not name.startswith(f"{blocks}{last}.")}
  return text.open_clip(own, "gelu", source, source)


def _unread(named: Mapping[str, Any]) -> dict[str, Any]:
  """What the files of version 2 hold besides, as zeros: a last layer and a projection."""
  blocks = "transformer.resblocks."
  last = max(int(name.split(".")[2]) for name in named if name.startswith(blocks))
  own = f"{blocks}{last}."
  found = {
    f"{blocks}{last + 1}.{name.removeprefix(own)}": tensor
    for name, tensor in named.items() if name.startswith(own)
  }  # fmt: skip
  _, dtype, _ = named["ln_final.weight"]
  width = named["ln_final.weight"][0][0]
  found["text_projection"] = ((width, width), dtype, None)
  return {
    name: (shape, dtype, lambda shape=shape, dtype=dtype: np.zeros(shape, dtype))
    for name, (shape, dtype, _) in found.items()
  }
