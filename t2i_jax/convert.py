"""`python -m t2i_jax.convert`: public models to exports of ours, and back."""

import json
from pathlib import Path

from t2i_jax import command
from t2i_jax import config as configs
from t2i_jax.conversion import DTYPES, LENGTH
from t2i_jax.errors import UserError

FORMS = ("export", "huggingface", "diffusers", "single_file")
TOWERS = ("text", "both")
# Flags that only some sources read.
TEXT = ("length", "layer", "no_final_norm", "project", "masked", "activation", "pad", "towers")
SINGLE_FILE = ("prediction", "zero_terminal_snr", "ema", "parts")


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.convert",
    "Makes an export of a public model, to draw from, to go on training\n"
    "(--config.init_from=EXPORT) or to train on (--config.components.NAME=EXPORT):\n\n"
    "  a pipeline of diffusers (a folder with model_index.json): Stable Diffusion 1, 2, XL and 3,\n"
    "    latent diffusion's text-to-image model, DiT, PixArt-alpha, a DDPM of pixels;\n"
    "  such a latent model in one file (.safetensors or .ckpt), in its authors' layout;\n"
    "  DiT's and U-ViT's networks in a file (.pt, .pth), with the other --parts of a pipeline;\n"
    "  guided diffusion's U-Nets, drawn from by class numbers, and their classifiers (.pt);\n"
    "  an autoencoder of these (diffusers' folder, or a file);\n"
    "  a text encoder in a Hugging Face folder (config, tokenizer, weights as safetensors or\n"
    "    PyTorch's .bin), or CLIP in a file of OpenAI's or OpenCLIP's; --towers=both takes its\n"
    "    vision tower too;\n"
    "  LPIPS (a folder with its two files).\n\n"
    "Or gives such a folder or file back with --to. Nothing is downloaded, and no code in the\n"
    "files is run.",
    "python -m t2i_jax.convert --source=stable-diffusion-v1-5 --output=sd15",
    "python -m t2i_jax.convert --source=sd_xl_base_1.0.safetensors "
    "--tokenizer=clip-vit-large-patch14 --output=sdxl",
    "python -m t2i_jax.convert --source=v2-1_768.ckpt --tokenizer=clip-vit-large-patch14 "
    "--prediction=v --ema --output=sd21",
    "python -m t2i_jax.convert --source=ldm.ckpt --tokenizer=bert-base-uncased --output=ldm",
    "python -m t2i_jax.convert --source=sd3_medium_incl_clips.safetensors "
    "--parts=stable-diffusion-3-medium --output=sd3",
    "python -m t2i_jax.convert --source=stable-diffusion-3-medium --apart --output=sd3",
    "python -m t2i_jax.convert --source=DiT-XL-2-256x256.pt --parts=DiT-XL-2-256 --output=dit",
    "python -m t2i_jax.convert --source=mscoco_uvit_small.pth --parts=stable-diffusion-v1-5 "
    "--output=u_vit",
    "python -m t2i_jax.convert --source=256x256_classifier.pt --output=classifier",
    "python -m t2i_jax.convert --source=sd15 --output=folder --to=diffusers",
    "python -m t2i_jax.convert --source=sd15 --output=sd15.safetensors --to=single_file",
    "python -m t2i_jax.convert --source=stable-diffusion-v1-5/vae --output=kl-f8",
    "python -m t2i_jax.convert --source=clip-vit-large-patch14 --output=clip-l",
    "python -m t2i_jax.convert --source=sdxl/text_encoder_2 --tokenizer=sdxl/tokenizer_2 "
    "--layer=-2 --no-final-norm --project --output=bigg",
    "python -m t2i_jax.convert --source=t5-v1_1-xxl --length=128 --masked --dtype=bfloat16 "
    "--output=t5",
    "python -m t2i_jax.convert --source=ViT-L-14.pt --tokenizer=clip-vit-large-patch14 "
    "--activation=quick_gelu --output=clip-l",
    "python -m t2i_jax.convert --source=clip-vit-base-patch32 --towers=both --output=clip-b",
    "python -m t2i_jax.convert --source=clip-l --output=folder --to=huggingface",
  )
  parser.add_argument("--source", required=True, help="the folder or file, or an export with --to")
  parser.add_argument("--output", required=True,
                      help="the export, replaced if it exists, or the new folder or file")
  parser.add_argument("--to", default="export", metavar="|".join(FORMS),
                      help="huggingface: a text encoder's folder, or CLIP's; diffusers: a "
                      "pipeline's or an autoencoder's; single_file: a whole latent model in one "
                      ".safetensors, or a network of guided diffusion")
  parser.add_argument("--dtype", default="stored", metavar="|".join(DTYPES),
                      help="type of the numbers (as they are stored)")
  parser.add_argument("--tokenizer", default="",
                      help="text: the tokenizer's folder, where it is another one; of files CLIP's "
                      "or, of latent diffusion, BERT's")
  parser.add_argument("--resolution", type=int, default=0,
                      help="whole models and autoencoders: side of the pictures, where it is not "
                      "the published one")
  parser.add_argument("--prediction", default="", metavar="epsilon|v",
                      help="a model in one file: what it was trained to predict")
  parser.add_argument("--zero-terminal-snr", action="store_true",
                      help="a model in one file: it was trained from pure noise")
  parser.add_argument("--ema", action="store_true",
                      help="a model in one file: take the averages over its training")
  parser.add_argument("--parts", default="",
                      help="Stable Diffusion 3, DiT or U-ViT in a file: the folder of a pipeline "
                      "of diffusers, of which is taken what the file has not (vae, tokenizer, "
                      "text_encoder...)")
  parser.add_argument("--apart", action="store_true",
                      help="a whole model: its equal blocks one by one rather than as one stack, "
                      "as configs/lora.py needs those of a transformer")
  parser.add_argument("--scale", type=float, default=0.0,
                      help="an autoencoder in a file: of its latents (0.18215 of Stable Diffusion "
                      "1 and 2, 0.13025 of XL)")
  parser.add_argument("--length", type=int,
                      help=f"text: tokens that a caption takes ({LENGTH}, or the encoder's "
                      "positions); a whole model with T5: those that it takes (256, or 120 of "
                      "PixArt-alpha)")
  parser.add_argument("--layer", type=int, default=-1,
                      help="CLIP: whose output is the sequence: -1, the last; -2, the one before")
  parser.add_argument("--no-final-norm", action="store_true",
                      help="CLIP: the sequence without the last norm, as SDXL and SD3 take it")
  parser.add_argument("--project", action="store_true",
                      help="CLIP: the caption's vector in the space shared with pictures")
  parser.add_argument("--masked", action="store_true",
                      help="text: hide padding, from the encoder and from what reads its features")
  parser.add_argument("--activation", default="", metavar="quick_gelu|gelu",
                      help="CLIP in a file, with heads of 64: quick_gelu for OpenAI's, gelu for "
                      "most of OpenCLIP's")
  parser.add_argument("--towers", default="text", metavar="|".join(TOWERS),
                      help="CLIP: its text tower alone, frozen, or both, which match pictures with "
                      "captions and can be trained on")
  parser.add_argument("--pad", default="",
                      help="text: token of the padding in place of the folder's")
  command.run(parser, argv, lambda flags: _convert(parser, flags))


def _convert(parser, flags) -> None:
  configs.choose("--to", flags.to, dict.fromkeys(FORMS))
  configs.choose("--dtype", flags.dtype, dict.fromkeys(DTYPES))
  if flags.to != "export":
    print(_given_back(flags))
    return
  from t2i_jax import export

  export.check_replaceable(flags.output)

  def only(what: str, *names: str) -> None:
    """Raises for flags that have a value and are not read."""
    for name in (*TEXT, *SINGLE_FILE, "tokenizer", "resolution", "scale", "apart"):
      if name not in names and getattr(flags, name) != parser.get_default(name):
        raise UserError(f"--{name.replace('_', '-')} is not read of {what}; leave it out")

  for line in _export(flags, only):
    print(line)


def _export(flags, only) -> list:
  """Makes an export of what is at the source; lines to print."""
  path = Path(flags.source).expanduser()
  if path.is_file():
    return _of_file(flags, only, path)
  from t2i_jax.conversion import autoencoder, pipelines
  from t2i_jax.weights.perceptual import FILES

  if pipelines.is_pipeline(path):
    only("a pipeline", "resolution", "length", "apart")
    written, lines = pipelines.convert(
      flags.source, flags.output, flags.resolution, flags.dtype, flags.length or 0, flags.apart
    )
    return [*lines, written]
  if any((path / name).is_file() for name in FILES):
    from t2i_jax.conversion.perceptual import from_lpips

    only("LPIPS")
    return [from_lpips(path, flags.output)]
  kind = _class(path)
  if kind == autoencoder.CLASS:
    only("an autoencoder's folder")
    return [autoencoder.write(flags.output, autoencoder.open_folder(path), flags.dtype)]
  if kind:
    raise UserError(f"'{path}' is of class {kind}, which is a part of a model; give the folder of "
                    f"the whole pipeline, which has a {pipelines.INDEX}")
  return [_text(flags, only)]


def _of_file(flags, only, path: Path) -> list:
  from t2i_jax.conversion import autoencoder, guided_diffusion, single_file, transformer_files
  from t2i_jax.weights.guided_diffusion import kind_of
  from t2i_jax.weights.stored import open_weights

  tensors = open_weights(path)
  if kind := transformer_files.kind_of(tensors):
    only(f"{kind.name} in a file", "parts", "resolution", "length", "apart")
    written, lines = transformer_files.convert(
      tensors, str(path), flags.output, flags.parts, resolution=flags.resolution,
      length=flags.length or 0, dtype=flags.dtype, apart=flags.apart,
    )  # fmt: skip
    return [*lines, written]
  if single_file.holds_model(tensors):
    only("a model in one file", *SINGLE_FILE[:3], "tokenizer", "resolution")
    return [single_file.convert(
      flags.source, flags.output, flags.tokenizer, prediction=flags.prediction,
      zero_terminal_snr=flags.zero_terminal_snr, ema=flags.ema, resolution=flags.resolution,
      dtype=flags.dtype,
    )]  # fmt: skip
  if kind_of(tensors):
    only("a file of guided diffusion", "resolution")
    written, lines = guided_diffusion.convert(
      tensors, str(path), flags.output, flags.resolution, flags.dtype
    )
    return [*lines, written]
  if not autoencoder.is_among(tensors):
    return [_text(flags, only)]
  only("an autoencoder in a file", "resolution", "scale")
  if flags.scale <= 0:
    raise UserError(f"'{path}' holds an autoencoder, and does not say the scale of its latents: "
                    "give --scale=0.18215 for Stable Diffusion 1 and 2, --scale=0.13025 for XL")
  found = autoencoder.open_tensors(tensors, str(path), flags.resolution or 512, flags.scale)
  return [autoencoder.write(flags.output, found, flags.dtype)]


def _text(flags, only) -> Path:
  from t2i_jax.conversion import clip, text

  configs.choose("--towers", flags.towers, dict.fromkeys(TOWERS))
  if flags.towers == "both":
    only("both towers of CLIP", "towers", "activation", "pad", "tokenizer")
    towers = clip.open_towers(flags.source, flags.activation)
    return clip.write(flags.output, towers, _tokenizer(flags), flags.pad, flags.dtype)
  only("a text encoder", *TEXT, "tokenizer")
  encoder = text.open_encoder(flags.source, flags.activation)
  reading = text.Reading(flags.length, flags.layer, not flags.no_final_norm, flags.project,
                         flags.masked, flags.pad)
  return text.write(flags.output, encoder, _tokenizer(flags), reading, flags.dtype)


def _tokenizer(flags) -> str:
  """The folder of a text encoder's tokenizer."""
  if Path(flags.source).expanduser().is_file() and not flags.tokenizer:
    raise UserError(f"'{flags.source}' is a file, which has no tokenizer beside; name the folder "
                    "of one with --tokenizer")
  return flags.tokenizer or flags.source


def _given_back(flags) -> Path:
  """Writes an export as others have it."""
  from t2i_jax import export
  from t2i_jax.conversion import (
    autoencoder,
    clip,
    folders,
    guided_diffusion,
    models,
    single_file,
    text,
    transformer_files,
    unconditional,
  )  # fmt: skip
  from t2i_jax.weights.guided_diffusion import CLASSIFIER, UNET

  exported = export.read(flags.source)
  system = exported.config.system
  if flags.to == "huggingface" and system == "clip":
    return clip.to_folder(exported, flags.output)
  if flags.to == "huggingface":
    return text.to_folder(exported, flags.output)
  if system == "pretrained_text":
    raise UserError(f"{flags.source} is an export of a text encoder; use --to=huggingface")
  if flags.to == "diffusers" and system == "kl_autoencoder":
    return autoencoder.to_folder(exported, flags.output)
  if flags.to == "single_file" and system in (UNET, CLASSIFIER):
    return guided_diffusion.write(exported, flags.output)
  if flags.to == "diffusers" and system == "ddpm":
    return unconditional.write(exported, flags.output)
  if flags.to == "single_file" and system in ("dit", "u_vit"):
    return transformer_files.write(exported, flags.output)
  whole = transformer_files.write_model if system == "sd3" else single_file.write
  write = folders.write if flags.to == "diffusers" else whole
  return write(models.taken_apart(exported), flags.output)


def _class(folder: Path) -> str:
  """Diffusers' name of the network in a folder, or ""."""
  try:
    given = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError):
    return ""
  return str(given.get("_class_name", "")) if isinstance(given, dict) else ""


if __name__ == "__main__":
  main()
