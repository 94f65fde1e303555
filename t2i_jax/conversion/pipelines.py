"""Pipelines of diffusers to exports of ours.

A folder with model_index.json, and in it one folder a part: the U-Net or the transformer, the
autoencoder, the text encoders with their tokenizers, and the scheduler, whose settings are the
sampling's defaults.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from t2i_jax.conversion import (
  autoencoder,
  blamed,
  parts,
  read_json,
  schedulers,
  text,
  unconditional,
)  # fmt: skip
from t2i_jax.conversion.networks import TRANSFORMER, UNET, Network
from t2i_jax.errors import UserError
from t2i_jax.systems.diffusion.ldm import FIRST_STAGE
from t2i_jax.weights.stored import open_weights

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
    network: the kind of its denoiser.
    optional: encoders that it may be without.
    sampling: options at which it is drawn from, where the scheduler says nothing of them.
    absent: parts that it may have and ours have not.
  """

  name: str
  system: str
  first_stage: str
  encoders: Mapping[str, tuple[str, str]]
  classes: Mapping[str, tuple[tuple[str, str], tuple[str, str]]]
  reading: Mapping[str, text.Reading]
  text: Mapping[str, Any]
  network: Network = UNET
  optional: tuple[str, ...] = ()
  sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  absent: tuple[str, ...] = ()


_TOKENIZER = ("transformers", "CLIPTokenizer")
_CLIP = (("transformers", "CLIPTextModel"), _TOKENIZER)
_PROJECTED = (("transformers", "CLIPTextModelWithProjection"), _TOKENIZER)
_BERT = (("latent_diffusion", "LDMBertModel"), ("transformers", "BertTokenizer"))
_T5 = (("transformers", "T5EncoderModel"), ("transformers", "T5TokenizerFast"))
_ONE, _TWO, _THREE = "text_encoder", "text_encoder_2", "text_encoder_3"
_ADDED = ("safety_checker", "feature_extractor", "image_encoder")
# Without its last norm, and with the projection: the last layer but one, of SDXL and SD3.
_INNER = text.Reading(layer=-2, final_norm=False)
_BOTH = text.Reading(layer=-2, final_norm=False, project=True)
NO_T5 = "there is no T5: zeros take the place of its features"
T5_LENGTH = 256  # tokens of SD3's T5, as diffusers draws
FORMS = {
  "stable_diffusion": Form(
    "StableDiffusionPipeline", "stable_diffusion", "vae", {_ONE: (_ONE, "tokenizer")},
    {_ONE: _CLIP}, {_ONE: text.Reading()}, {"null": "empty"}, absent=_ADDED,
  ),
  "sdxl": Form(
    "StableDiffusionXLPipeline", "sdxl", "vae",
    {_ONE: (_ONE, "tokenizer"), _TWO: (_TWO, "tokenizer_2")},
    {_ONE: _CLIP, _TWO: _PROJECTED},
    {_ONE: _INNER, _TWO: _BOTH},
    {"encoders": (f"{_ONE}+{_TWO}",), "pooled": (_TWO,), "null": "zeros"}, absent=_ADDED,
  ),
  "sd3": Form(
    "StableDiffusion3Pipeline", "sd3", "vae",
    {_ONE: (_ONE, "tokenizer"), _TWO: (_TWO, "tokenizer_2"), _THREE: (_THREE, "tokenizer_3")},
    {_ONE: _PROJECTED, _TWO: _PROJECTED, _THREE: _T5},
    {_ONE: _BOTH, _TWO: _BOTH, _THREE: text.Reading(T5_LENGTH)},
    {"encoders": (f"{_ONE}+{_TWO}", _THREE), "pooled": (_ONE, _TWO), "null": "empty",
     "drop": 0.0, "drop_each": 0.464},
    TRANSFORMER, (_THREE,), absent=("feature_extractor", "image_encoder"),
  ),
  "pixart": Form(
    "PixArtAlphaPipeline", "dit", "vae", {_ONE: (_ONE, "tokenizer")}, {_ONE: _T5},
    {_ONE: text.Reading(120, masked=True)}, {"null": "empty"}, TRANSFORMER,
    sampling={"guidance": 4.5, "steps": 20},
  ),
  "dit": Form("DiTPipeline", "dit", "vae", {}, {}, {}, {"encoder": "none"}, TRANSFORMER,
              sampling={"guidance": 4.0}),
  "ldm": Form(
    "LDMTextToImagePipeline", "ldm", "vqvae", {_ONE: ("bert", "tokenizer")},
    {_ONE: _BERT}, {_ONE: text.Reading()}, {"null": "empty"},
  ),
}  # fmt: skip
# Pipelines of the same parts that use them otherwise.
_USES = ("Img2Img", "Inpaint", "PAG")


def is_pipeline(folder: Path) -> bool:
  return (folder / INDEX).is_file()


def form_of(config: ConfigDict) -> Form | None:
  """Of a config of ours; None where diffusers has no such pipeline."""
  if config.system == "dit" and config.text.encoder == "component":
    return FORMS["pixart"]
  return FORMS.get(config.system)


def text_of(form: Form, encoders: Collection[str]) -> dict[str, Any]:
  """Settings of `text`, with the encoders that there are."""
  settings = dict(form.text)
  for name in ("encoders", "pooled"):
    if name in settings:
      settings[name] = tuple(row for row in settings[name] if row.split("+")[0] in encoders)
  return settings


def without(
  form: Form, encoders: Collection[str], length: int, options: Mapping[str, Any]
) -> dict[str, Any]:
  """Settings of `model` for a form without its optional encoders: zeros take their place."""
  if set(form.encoders) == set(encoders):
    return {}
  return {"blank": length or T5_LENGTH, "context_width": options["context_width"]}


def convert(
  source: str, output: str, resolution: int = 0, dtype: str = "stored", length: int = 0,
  apart: bool = False,
) -> tuple[Path, list[str]]:
  """Writes the export of a pipeline's folder.

  Args:
    source: the folder.
    output: the export, replaced if it exists.
    resolution: side of the pictures, as in `parts.write`.
    dtype: of the numbers, one of `conversion.DTYPES`.
    length: tokens that T5 takes of a caption; 0 for as many as diffusers draws with.
    apart: whether a transformer's equal blocks are one by one rather than as one stack.

  Returns:
    the export, and lines on what of the folder is not in it.

  Raises:
    UserError: a part is missing or not known.
  """
  folder = Path(source).expanduser()
  index = read_json(folder / INDEX)
  if index.get("_class_name") in unconditional.CLASSES:
    check_length(length, index["_class_name"])
    if apart:
      raise UserError(f"--apart is of transformers, and a {index['_class_name']} has none; leave "
                      "it out")
    return unconditional.convert(folder, output, resolution, dtype)
  form = _form(index, folder)
  network = form.network.folder
  encoders = {
    name: pair for name, pair in form.encoders.items()
    if name not in form.optional or (index.get(pair[0]) or (None,))[0] is not None
  }
  check_length(length, form.name, form)
  both = [name for pair in encoders.values() for name in pair]
  for name in (network, form.first_stage, *both):
    if not (folder / name).is_dir():
      do_without = any(name in form.encoders[encoder] for encoder in form.optional)
      raise UserError(f"the pipeline '{folder}' is not whole: it has no folder {name}; copy it "
                      "there" + f", or write [null, null] for it in {INDEX}" * do_without)
  with blamed(str(folder / network / "config.json")):
    options = form.network.from_diffusers(read_json(folder / network / "config.json"))
  published = read_json(folder / SCHEDULER)
  with blamed(str(folder / SCHEDULER)):
    process = schedulers.process_of(published, str(folder / SCHEDULER))
    sampling, lost = schedulers.options_of(published)
  settings = text_of(form, encoders)
  if "force_zeros_for_empty_prompt" in index:
    settings["null"] = "zeros" if index["force_zeros_for_empty_prompt"] else "empty"
  model = parts.Model(
    form.system, form.network, options, open_weights(folder / network),
    {**process, **without(form, encoders, length, options), **blocks(apart)},
    {**form.sampling, **sampling}, settings, str(folder / network),
  )  # fmt: skip
  with parts.workplace(output) as place:
    components = {FIRST_STAGE: autoencoder.write(
      f"{place}/{FIRST_STAGE}", autoencoder.open_folder(folder / form.first_stage), dtype
    )}  # fmt: skip
    for name, (encoder, tokenizer) in encoders.items():
      components[name] = text.write(
        f"{place}/{name}", text.open_encoder(folder / encoder), str(folder / tokenizer),
        reading_of(form, name, length), dtype,
      )  # fmt: skip
    written = parts.write(output, model, components, resolution, dtype)
  lines = [f"{folder / SCHEDULER}: {lost}"] * bool(lost)
  if (index.get("safety_checker") or [None])[0]:
    lines.append("the safety checker is left out")
  if set(form.encoders) != set(encoders):
    lines.append(NO_T5)
  if "id2label" in index:
    lines.append("the names of the classes are left out: a prompt is the number of one")
  return written, lines


def blocks(apart: bool) -> dict[str, bool]:
  """Settings of `model` for equal blocks one by one."""
  return {"scan": False} if apart else {}


def check_length(length: int, what: str, form: Form | None = None) -> None:
  """Raises UserError for a length that nothing reads."""
  if length and not (form and _T5 in form.classes.values()):
    raise UserError(f"--length is of T5, and a {what} has none; leave it out")


def reading_of(form: Form, name: str, length: int) -> text.Reading:
  """How an encoder is read, with another number of tokens if it is T5."""
  reading = form.reading[name]
  return dataclasses.replace(reading, length=length) if length and reading.length else reading


def _form(index: Mapping[str, Any], path: Path) -> Form:
  """Of a model_index.json."""
  named = str(index.get("_class_name"))
  plain = named
  for use in _USES:
    plain = plain.replace(use, "")
  for form in FORMS.values():
    if form.name != plain:
      continue
    needed = {name: pair for name, pair in form.encoders.items() if name not in form.optional}
    if any((index.get(encoder) or (None,))[0] is None for encoder, _ in needed.values()):
      raise UserError(f"{path / INDEX} is of a {named} without one of its text encoders, such as "
                      "XL's refiner, which draws on what the base model has begun; only base "
                      "models are known")
    return form
  known = [*(form.name for form in FORMS.values()), *unconditional.CLASSES]
  raise UserError(f"{path / INDEX} is of a {named}, which is not known; known: "
                  f"{', '.join(known)}")
