"""`python -m t2i_jax.convert`: public text encoders to exports of ours, and back."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t2i_jax import command
from t2i_jax import config as configs
from t2i_jax.errors import UserError

# model_type of a Hugging Face config.json, and the kind of encoder that it is.
KINDS = {
  "clip_text_model": "clip", "clip": "clip", "t5": "t5", "bert": "bert", "ldmbert": "ldm",
}  # fmt: skip
_PROJECTION = r"(^|\.)text_projection(\.|$)"
LENGTH = 77  # tokens of a caption, of CLIP and of latent diffusion, and of T5 in SD3
# What OpenCLIP calls its weights.
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# What every tokenizer must have an answer to.
PROBE = "".join(map(chr, range(32, 127))) + " \u00e9\u4e2d\U0001f600"
DTYPES = ("stored", "float32", "float16", "bfloat16")


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
  parser.add_argument("--to", default="export", metavar="export|huggingface")
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
  configs.choose("--to", flags.to, {"export": 0, "huggingface": 0})
  configs.choose("--dtype", flags.dtype, dict.fromkeys(DTYPES))
  if flags.to == "huggingface":
    print(to_huggingface(flags.source, flags.output))
  else:
    print(from_huggingface(flags))


def key_map(kind: str):
  """The key map of a kind of encoder."""
  from t2i_jax.weights import text_encoders as maps

  return {"clip": maps.CLIP_TEXT, "t5": maps.T5, "bert": maps.BERT, "ldm": maps.LDM_TEXT}[kind]


def from_huggingface(flags) -> Path:
  """Writes the export of a folder's encoder; the flags are the command's."""
  import jax
  import jax.numpy as jnp

  from t2i_jax import assembly, export, recipe
  from t2i_jax.systems.conditioning import GROUP
  from t2i_jax.text.public_tokenizer import read_tokenizer
  from t2i_jax.text.tokenizer import Tokenizers
  from t2i_jax.weights.key_map import STORED
  from t2i_jax.weights.stored import open_weights

  export.check_replaceable(flags.output)
  folder = Path(flags.source).expanduser()
  if flags.length is not None and flags.length < 3:
    raise UserError(f"--length={flags.length} leaves no room for a caption; use 3 or more")
  kind, published, names, weights = _published(folder, flags.activation)
  if folder.is_file() and not flags.tokenizer:
    raise UserError(f"'{folder}' is a file, which has no tokenizer beside; name the folder of one "
                    "with --tokenizer")
  if kind != "clip" and (flags.layer != -1 or flags.no_final_norm or flags.project):
    raise UserError(f"--layer, --no-final-norm and --project are of CLIP, and '{folder}' is of "
                    f"kind {kind}; leave them out")
  positions = published.get("max_position_embeddings")
  length = flags.length or min(LENGTH, positions if isinstance(positions, int) else LENGTH)
  with _blamed(f"the tokenizer in {flags.tokenizer or folder}"):
    tokenizer = read_tokenizer(flags.tokenizer or folder, kind, length, flags.pad)
    tokenizer.encode([PROBE])
  null = tokenizer.null()
  config = recipe.base("pretrained_text", "scenes")
  config.text.length = length
  config.model.update(
    kind=kind, published=json.dumps(published, sort_keys=True), layer=flags.layer,
    final_norm=not flags.no_final_norm, project=flags.project, masked=flags.masked,
    null=tuple(null["ids"].tolist()), null_tokens=int(null["mask"].sum()),
  )
  with _blamed(f"the config in {folder}"):
    system = assembly.build_system(config)
    abstract = jax.eval_shape(lambda: system.init(jax.random.key(0), {}))["params"]["encoder"]
    vocabulary = int(published.get("vocab_size", tokenizer.vocab_size))
  if tokenizer.vocab_size > vocabulary:
    raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the encoder in {folder} "
                    f"{vocabulary}; give its own with --tokenizer")
  dtype = STORED if flags.dtype == "stored" else jnp.dtype(flags.dtype)
  # A projection is there to be left out.
  ignored = () if flags.project else (_PROJECTION,)
  tensors = open_weights(weights)
  if flags.project and not any(re.search(_PROJECTION, name) for name in tensors):
    raise UserError(f"{weights} holds no projection; leave --project out")
  params = names.load(
    tensors, abstract, source=str(weights), dtype=dtype, ignored=ignored
  )
  variables = {"params": {"encoder": params}}
  return export.write(flags.output, config, 0, variables, Tokenizers({GROUP: tokenizer}), ema=False)


def to_huggingface(source: str, output: str) -> Path:
  """Writes the folder that transformers reads of an export that `from_huggingface` wrote."""
  from tokenizers import Tokenizer as Backend

  from t2i_jax import export
  from t2i_jax.text.public_tokenizer import MARKERS
  from t2i_jax.weights.safetensors_file import write_safetensors

  exported = export.read(source)
  if exported.config.system != "pretrained_text":
    raise UserError(f"{source} is an export of {exported.config.system}; only text encoders that "
                    "this command converted can be given back")
  folder = Path(output).expanduser()
  if folder.exists() and any(folder.iterdir()):
    raise UserError(f"'{folder}' is there and not empty, so it is not written to; choose another")
  kind = exported.config.model.kind
  (tokenizer,) = exported.tokenizers.of.values()
  folder.mkdir(parents=True, exist_ok=True)
  write_safetensors(
    folder / "model.safetensors", key_map(kind).save(exported.variables["params"]["encoder"])
  )
  published = json.loads(exported.config.model.published)
  (folder / "config.json").write_text(json.dumps(published, indent=2) + "\n")
  (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
  backend = Backend.from_str(tokenizer.definition)
  names = (*MARKERS[kind], "pad_token")
  special = {
    name: backend.id_to_token(number)
    for name, number in zip(names, (tokenizer.start, tokenizer.end, tokenizer.pad), strict=True)
    if name and number is not None
  }
  (folder / "tokenizer_config.json").write_text(
    json.dumps({"model_max_length": tokenizer.length, **special}, indent=2) + "\n"
  )
  return folder


@contextlib.contextmanager
def _blamed(what: str) -> Iterator[None]:
  """Whatever a file's contents lead to is that file's fault."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    why = str(error).strip().splitlines()[0] if str(error).strip() else ""
    raise UserError(f"{what} is not of such a model ({type(error).__name__}: {why[:200]}); copy it "
                    "again") from error


def _published(folder: Path, activation: str) -> tuple[str, dict[str, Any], Any, Path]:
  """The kind of encoder, its config as transformers writes it, the map of its names, its file."""
  from t2i_jax.text.clip import published_of_open_clip
  from t2i_jax.text.layers import ACTIVATIONS
  from t2i_jax.weights.stored import open_weights
  from t2i_jax.weights.text_encoders import OPEN_CLIP_TEXT

  def of_open_clip(weights: Path, activation: str, heads: int = 0):
    shapes = {
      name.removeprefix("module."): tensor.shape for name, tensor in open_weights(weights).items()
    }
    published = published_of_open_clip(shapes, activation, heads)
    return "clip", published, OPEN_CLIP_TEXT, weights

  if folder.is_file():
    if not activation:
      raise UserError(f"'{folder}' does not say its activation: give --activation=quick_gelu for "
                      "OpenAI's models, --activation=gelu for most of OpenCLIP's")
    configs.choose("--activation", activation, ACTIVATIONS)
    return of_open_clip(folder, activation)
  if activation:
    raise UserError(f"--activation={activation} is for weights in a file; the folder '{folder}' "
                    "says its own")
  path = folder / "open_clip_config.json"
  # Some folders hold the model in both forms.
  if path.is_file() and not (folder / "config.json").is_file():
    weights = [folder / name for name in OPEN_CLIP_FILES if (folder / name).is_file()]
    if not weights:
      raise UserError(f"'{folder}' has none of {', '.join(OPEN_CLIP_FILES)}; copy it there")
    with _blamed(str(path)):
      given = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
      quick, heads = bool(given.get("quick_gelu")), int(given["text_cfg"].get("heads", 8))
      if heads < 1:
        raise ValueError(f"heads is {heads}")
    return of_open_clip(weights[0], "quick_gelu" if quick else "gelu", heads)
  kind, given = _of_transformers(folder)
  return kind, given, key_map(kind), folder


def _of_transformers(folder: Path) -> tuple[str, dict[str, Any]]:
  """The kind of the folder's encoder, and its config.json."""
  path = folder / "config.json"
  if not folder.is_dir():
    raise UserError(f"there is no folder '{folder}'; nothing is downloaded: put the model's files "
                    "into one, config.json among them")
  if not path.is_file():
    raise UserError(f"no config.json in '{folder}': give the folder of a Hugging Face model")
  with _blamed(str(path)):
    given = json.loads(path.read_text(encoding="utf-8"))
    kind = given.get("model_type")
    if "files" in given and "step" in given:
      raise UserError(f"'{folder}' is an export already; --to=huggingface makes a folder of it")
    shared = {"projection_dim": given["projection_dim"]} if "projection_dim" in given else {}
    if kind == "clip":
      tower = {**given.get("text_config", {}), **shared, "model_type": "clip_text_model"}
  if not isinstance(kind, str) or kind not in KINDS:
    raise UserError(f"{path} is of model_type '{kind}', which is no text encoder that is known; "
                    f"known: {', '.join(KINDS)}")
  if kind == "clip":
    return "clip", tower
  return KINDS[kind], given


if __name__ == "__main__":
  main()
