"""`python -m t2i_jax.convert`: public models to exports of ours, and back."""

from pathlib import Path

from t2i_jax import command
from t2i_jax import config as configs
from t2i_jax.conversion import DTYPES, LENGTH
from t2i_jax.errors import UserError

FORMS = ("export", "huggingface")


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.convert",
    "Makes an export of a text encoder in a Hugging Face folder (config, tokenizer, weights as\n"
    "safetensors or PyTorch's .bin), or of CLIP in a file of OpenAI's or OpenCLIP's, to train on:\n"
    "--config.text.encoder=component --config.components.text_encoder=EXPORT. Or makes such a\n"
    "folder of an export. Nothing is downloaded, and no code in the files is run.",
    "python -m t2i_jax.convert --source=clip-vit-large-patch14 --output=clip-l",
    "python -m t2i_jax.convert --source=sdxl/text_encoder_2 --tokenizer=sdxl/tokenizer_2 "
    "--layer=-2 --no-final-norm --project --output=bigg",
    "python -m t2i_jax.convert --source=t5-v1_1-xxl --length=128 --masked --dtype=bfloat16 "
    "--output=t5",
    "python -m t2i_jax.convert --source=ViT-L-14.pt --tokenizer=clip-vit-large-patch14 "
    "--activation=quick_gelu --output=clip-l",
    "python -m t2i_jax.convert --source=clip-l --output=folder --to=huggingface",
  )
  parser.add_argument("--source", required=True, help="the folder or file, or an export with --to")
  parser.add_argument("--output", required=True,
                      help="the export, replaced if it exists, or the new folder")
  parser.add_argument("--to", default="export", metavar="|".join(FORMS))
  parser.add_argument("--tokenizer", default="", help="its folder, where it is another one")
  parser.add_argument("--length", type=int,
                      help=f"tokens that a caption takes ({LENGTH}, or the encoder's positions)")
  parser.add_argument("--layer", type=int, default=-1,
                      help="CLIP: whose output is the sequence: -1, the last; -2, the one before")
  parser.add_argument("--no-final-norm", action="store_true",
                      help="CLIP: the sequence without the last norm, as SDXL and SD3 take it")
  parser.add_argument("--project", action="store_true",
                      help="CLIP: the caption's vector in the space shared with pictures")
  parser.add_argument("--masked", action="store_true",
                      help="hide padding, from the encoder and from what reads its features")
  parser.add_argument("--activation", default="", metavar="quick_gelu|gelu",
                      help="CLIP in a file, with heads of 64: quick_gelu for OpenAI's, gelu for "
                      "most of OpenCLIP's")
  parser.add_argument("--pad", default="", help="token of the padding in place of the folder's")
  parser.add_argument("--dtype", default="stored", metavar="|".join(DTYPES),
                      help="type of the numbers (as they are stored)")
  command.run(parser, argv, _convert)


def _convert(flags) -> None:
  from t2i_jax.conversion import text

  configs.choose("--to", flags.to, dict.fromkeys(FORMS))
  configs.choose("--dtype", flags.dtype, dict.fromkeys(DTYPES))
  if flags.to == "huggingface":
    print(text.to_folder(flags.source, flags.output))
  else:
    print(_text(flags))


def _text(flags) -> Path:
  from t2i_jax import export
  from t2i_jax.conversion import text

  export.check_replaceable(flags.output)
  encoder = text.open_encoder(flags.source, flags.activation)
  if Path(flags.source).expanduser().is_file() and not flags.tokenizer:
    raise UserError(f"'{flags.source}' is a file, which has no tokenizer beside; name the folder "
                    "of one with --tokenizer")
  reading = text.Reading(flags.length, flags.layer, not flags.no_final_norm, flags.project,
                         flags.masked, flags.pad)
  return text.write(flags.output, encoder, flags.tokenizer or flags.source, reading, flags.dtype)


if __name__ == "__main__":
  main()
