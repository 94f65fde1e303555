"""Pipelines of diffusers to exports of ours.

A folder with model_index.json, and in it one folder a part: the U-Net, the autoencoder, the text
encoders with their tokenizers, and the scheduler, whose settings are the sampling's defaults.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_jax.conversion import (
  autoencoder,
  blamed,
  parts,
  read_json,
  schedulers,
  text,
  unconditional,
)  # fmt: skip
from t2i_jax.errors import UserError
from t2i_jax.systems.diffusion.ldm import FIRST_STAGE
from t2i_jax.weights.stored import open_weights
from t2i_jax.weights.unet_config import from_diffusers

INDEX, SCHEDULER = unconditional.INDEX, f"scheduler/{unconditional.SCHEDULER}"


@dataclasses.dataclass(frozen=True)
class Form:
  """What a pipeline of diffusers is called and made of.

  Attributes:
    name: its class.
    system: ours.
    first_stage: folder of the autoencoder.
    encoders: folder and tokenizer's folder of each text encoder, by the component's name.
    classes: library and class of each encoder, and of its tokenizer.
    reading: how each encoder is read.
    text: settings of `text`.
  """

  name: str
  system: str
  first_stage: str
  encoders: Mapping[str, tuple[str, str]]
  classes: Mapping[str, tuple[tuple[str, str], tuple[str, str]]]
  reading: Mapping[str, text.Reading]
  text: Mapping[str, Any]


_TOKENIZER = ("transformers", "CLIPTokenizer")
_CLIP = (("transformers", "CLIPTextModel"), _TOKENIZER)
_PROJECTED = (("transformers", "CLIPTextModelWithProjection"), _TOKENIZER)
_BERT = (("latent_diffusion", "LDMBertModel"), ("transformers", "BertTokenizer"))
_ONE, _TWO = "text_encoder", "text_encoder_2"
FORMS = {
  "stable_diffusion": Form(
    "StableDiffusionPipeline", "stable_diffusion", "vae", {_ONE: (_ONE, "tokenizer")},
    {_ONE: _CLIP}, {_ONE: text.Reading()}, {"null": "empty"},
  ),
  "sdxl": Form(
    "StableDiffusionXLPipeline", "sdxl", "vae",
    {_ONE: (_ONE, "tokenizer"), _TWO: (_TWO, "tokenizer_2")},
    {_ONE: _CLIP, _TWO: _PROJECTED},
    {_ONE: text.Reading(layer=-2, final_norm=False),
     _TWO: text.Reading(layer=-2, final_norm=False, project=True)},
    {"encoders": (f"{_ONE}+{_TWO}",), "pooled": (_TWO,), "null": "zeros"},
  ),
  "ldm": Form(
    "LDMTextToImagePipeline", "ldm", "vqvae", {_ONE: ("bert", "tokenizer")},
    {_ONE: _BERT}, {_ONE: text.Reading()}, {"null": "empty"},
  ),
}  # fmt: skip
# Pipelines of the same parts that use them otherwise.
_USES = ("Img2Img", "Inpaint", "PAG")


def is_pipeline(folder: Path) -> bool:
  return (folder / INDEX).is_file()


def convert(
  source: str, output: str, resolution: int = 0, dtype: str = "stored"
) -> tuple[Path, list[str]]:
  """Writes the export of a pipeline's folder.

  Args:
    source: the folder.
    output: the export, replaced if it exists.
    resolution: side of the pictures, as in `parts.write`.
    dtype: of the numbers, one of `conversion.DTYPES`.

  Returns:
    the export, and lines on what of the folder is not in it.

  Raises:
    UserError: a part is missing or not known.
  """
  folder = Path(source).expanduser()
  index = read_json(folder / INDEX)
  if index.get("_class_name") in unconditional.CLASSES:
    return unconditional.convert(folder, output, resolution, dtype)
  form = _form(index, folder)
  both = [name for pair in form.encoders.values() for name in pair]
  for name in ("unet", form.first_stage, *both):
    if not (folder / name).is_dir():
      raise UserError(f"the pipeline '{folder}' is not whole: it has no folder {name}; copy it "
                      "there")
  with blamed(str(folder / "unet" / "config.json")):
    options = from_diffusers(read_json(folder / "unet" / "config.json"))
  published = read_json(folder / SCHEDULER)
  with blamed(str(folder / SCHEDULER)):
    process = schedulers.process_of(published, str(folder / SCHEDULER))
    sampling, lost = schedulers.options_of(published)
  settings = dict(form.text)
  if "force_zeros_for_empty_prompt" in index:
    settings["null"] = "zeros" if index["force_zeros_for_empty_prompt"] else "empty"
  model = parts.Model(
    form.system, options, open_weights(folder / "unet"), process, sampling, settings,
    str(folder / "unet"),
  )  # fmt: skip
  with parts.workplace(output) as place:
    components = {FIRST_STAGE: autoencoder.write(
      f"{place}/{FIRST_STAGE}", autoencoder.open_folder(folder / form.first_stage), dtype
    )}  # fmt: skip
    for name, (encoder, tokenizer) in form.encoders.items():
      components[name] = text.write(
        f"{place}/{name}", text.open_encoder(folder / encoder), str(folder / tokenizer),
        form.reading[name], dtype,
      )  # fmt: skip
    written = parts.write(output, model, components, resolution, dtype)
  lines = [f"{folder / SCHEDULER}: {lost}"] * bool(lost)
  if (index.get("safety_checker") or [None])[0]:
    lines.append("the safety checker is left out")
  return written, lines


def _form(index: Mapping[str, Any], path: Path) -> Form:
  """Of a model_index.json."""
  named = str(index.get("_class_name"))
  plain = named
  for use in _USES:
    plain = plain.replace(use, "")
  for form in FORMS.values():
    if form.name != plain:
      continue
    if any((index.get(encoder) or (None,))[0] is None for encoder, _ in form.encoders.values()):
      raise UserError(f"{path / INDEX} is of a {named} without one of its text encoders, such as "
                      "XL's refiner, which draws on what the base model has begun; only base "
                      "models are known")
    return form
  known = [*(form.name for form in FORMS.values()), *unconditional.CLASSES]
  raise UserError(f"{path / INDEX} is of a {named}, which is not known; known: "
                  f"{', '.join(known)}")
