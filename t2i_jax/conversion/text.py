"""Public text encoders to exports of ours, and back."""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from t2i_jax import assembly, export, recipe
from t2i_jax import config as configs
from t2i_jax.conversion import LENGTH, blamed, dtype_of, new_folder, write_json
from t2i_jax.errors import UserError
from t2i_jax.systems.conditioning import GROUP
from t2i_jax.text.clip import EPSILON, published_of_open_clip
from t2i_jax.text.layers import ACTIVATIONS
from t2i_jax.text.public_tokenizer import MARKERS, read_tokenizer
from t2i_jax.text.tokenizer import Tokenizer, Tokenizers
from t2i_jax.weights import text_encoders as maps
from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stacked import number_of, shapes_of
from t2i_jax.weights.stored import Tensors, open_weights

# model_type of a Hugging Face config.json, and the kind of encoder that it is.
KINDS = {
  "clip_text_model": "clip", "clip": "clip", "t5": "t5", "bert": "bert", "ldmbert": "ldm",
}  # fmt: skip
MAPS = {"clip": maps.CLIP_TEXT, "t5": maps.T5, "bert": maps.BERT, "ldm": maps.LDM_TEXT}
_PROJECTION = r"(^|\.)text_projection(\.|$)"
# What OpenCLIP calls its weights.
OPEN_CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# What every tokenizer must have an answer to.
PROBE = "".join(map(chr, range(32, 127))) + " \u00e9\u4e2d\U0001f600"


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A public text encoder.

  Attributes:
    kind: one of `systems.text.pretrained.KINDS`.
    published: its config.json as transformers writes it.
    names: of its tensors.
    tensors: of its weights.
    weights, source: where they are, and what describes them, for errors.
  """

  kind: str
  published: Mapping[str, Any]
  names: KeyMap
  tensors: Tensors
  weights: str
  source: str


@dataclasses.dataclass(frozen=True)
class Reading:
  """How an encoder is read.

  Attributes:
    length: tokens that a caption takes; 77, or the encoder's positions, if None.
    layer, final_norm, project, masked: as in `systems.text.pretrained.PretrainedText`.
    pad: token of the padding in place of the tokenizer's.
  """

  length: int | None = None
  layer: int = -1
  final_norm: bool = True
  project: bool = False
  masked: bool = False
  pad: str = ""


def open_encoder(source: str, activation: str = "") -> Encoder:
  """The encoder in a folder, or CLIP in a file under its authors' names.

  Args:
    source: of a folder of transformers or OpenCLIP, or a file.
    activation: of a file's, see `text.clip.published_of_open_clip`.
  """
  path = Path(source).expanduser()
  if path.is_file():
    if not activation:
      raise UserError(f"'{path}' does not say its activation: give --activation=quick_gelu for "
                      "OpenAI's models, --activation=gelu for most of OpenCLIP's")
    configs.choose("--activation", activation, ACTIVATIONS)
    return open_clip(open_weights(path), activation, str(path), str(path))
  if activation:
    raise UserError(f"--activation={activation} is for weights in a file; the folder '{path}' "
                    "says its own")
  config = path / "open_clip_config.json"
  # Some folders hold the model in both forms.
  if config.is_file() and not (path / "config.json").is_file():
    weights = [path / name for name in OPEN_CLIP_FILES if (path / name).is_file()]
    if not weights:
      raise UserError(f"'{path}' has none of {', '.join(OPEN_CLIP_FILES)}; copy it there")
    with blamed(str(config)):
      given = json.loads(config.read_text(encoding="utf-8"))["model_cfg"]
      quick, heads = bool(given.get("quick_gelu")), int(given["text_cfg"].get("heads", 8))
      if heads < 1:
        raise ValueError(f"heads is {heads}")
    tensors = open_weights(weights[0])
    return open_clip(
      tensors, "quick_gelu" if quick else "gelu", str(weights[0]), str(path), heads
    )
  kind, published = _of_transformers(path)
  return Encoder(kind, published, MAPS[kind], open_weights(path), str(path), str(path))


def open_clip(
  tensors: Tensors, activation: str, weights: str, source: str, heads: int = 0
) -> Encoder:
  """CLIP's text tower under OpenAI's and OpenCLIP's names."""
  shapes = {name.removeprefix("module."): tensor.shape for name, tensor in tensors.items()}
  published = published_of_open_clip(shapes, activation, heads)
  return Encoder("clip", published, maps.OPEN_CLIP_TEXT, tensors, weights, source)


def clip(tensors: Tensors, activation: str, source: str) -> Encoder:
  """CLIP's text tower under transformers' names, whose config.json is not at hand.

  Its heads are of 64 channels, and its markers the last of the vocabulary.

  Raises:
    UserError: a tensor without which there is no tower is missing.
  """
  tower = "text_model."
  needed = [f"{tower}{name}.weight" for name in (
    "embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1"
  )]  # fmt: skip
  missing = [name for name in needed if name not in tensors]
  if missing:
    raise UserError(f"{source} holds no text encoder of CLIP: {', '.join(missing)} missing")
  (vocabulary, width), (positions, _), (hidden, _) = (tensors[name].shape for name in needed)
  layers = {name.split(".")[3] for name in tensors if name.startswith(f"{tower}encoder.layers.")}
  projection = "text_projection.weight"
  published = {
    "model_type": "clip_text_model", "hidden_size": width, "num_hidden_layers": len(layers),
    "num_attention_heads": max(width // 64, 1), "intermediate_size": hidden,
    "hidden_act": activation, "vocab_size": vocabulary, "max_position_embeddings": positions,
    "bos_token_id": vocabulary - 2, "eos_token_id": vocabulary - 1,
    "projection_dim": tensors[projection].shape[0] if projection in tensors else width,
    "layer_norm_eps": EPSILON,
  }  # fmt: skip
  return Encoder("clip", published, MAPS["clip"], tensors, source, source)


def t5(tensors: Tensors, source: str) -> Encoder:
  """T5's encoder under transformers' names, whose config.json is not at hand.

  Raises:
    UserError: a tensor without which there is no encoder is missing.
  """
  block = "encoder.block.0.layer."
  attention = f"{block}0.SelfAttention."
  wide = next((n for n in ("wi_0", "wi") if f"{block}1.DenseReluDense.{n}.weight" in tensors), "wi")
  (vocabulary, width), (inner, _), (buckets, heads), (hidden, _) = shapes_of(tensors, (
    "shared.weight", f"{attention}q.weight", f"{attention}relative_attention_bias.weight",
    f"{block}1.DenseReluDense.{wide}.weight",
  ), f"T5 in {source}")  # fmt: skip
  published = {
    "model_type": "t5", "d_model": width, "d_kv": inner // heads, "num_heads": heads,
    "d_ff": hidden, "num_layers": number_of(tensors, "encoder.block."), "vocab_size": vocabulary,
    "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128,
    "feed_forward_proj": "gated-gelu" if wide == "wi_0" else "relu", "layer_norm_epsilon": 1e-6,
  }  # fmt: skip
  return Encoder("t5", published, MAPS["t5"], tensors, source, source)


def ldm(tensors: Tensors, source: str) -> Encoder:
  """Latent diffusion's transformer under its authors' names; its heads are of 64 channels.

  Raises:
    UserError: a tensor without which there is no encoder is missing.
  """
  first = "attn_layers.layers."
  needed = ("token_emb.weight", "pos_emb.emb.weight", f"{first}0.1.to_q.weight",
            f"{first}1.1.net.2.weight")  # fmt: skip
  missing = [name for name in needed if name not in tensors]
  if missing:
    raise UserError(f"{source} holds no text encoder of latent diffusion: {', '.join(missing)} "
                    "missing")
  (vocabulary, width), (positions, _), (inner, _), (_, hidden) = (
    tensors[name].shape for name in needed
  )
  halves = {name.removeprefix(first).split(".")[0] for name in tensors if name.startswith(first)}
  published = {
    "model_type": "ldmbert", "d_model": width, "encoder_layers": len(halves) // 2,
    "encoder_attention_heads": max(inner // 64, 1), "head_dim": min(inner, 64),
    "encoder_ffn_dim": hidden, "vocab_size": vocabulary, "max_position_embeddings": positions,
  }  # fmt: skip
  names = maps.ldm_text_map(len(halves) // 2)
  return Encoder("ldm", published, names, tensors, source, source)


def write(
  output: str, encoder: Encoder, tokenizer_folder: str, reading: Reading, dtype: str = "stored"
) -> Path:
  """Writes the export of an encoder.

  Args:
    output: the export, replaced if it exists.
    encoder: of `open_encoder` or `open_clip`.
    tokenizer_folder: of its tokenizer.
    reading: how it is read.
    dtype: of the numbers, one of `conversion.DTYPES`.
  """
  export.check_replaceable(output)
  kind, source = encoder.kind, encoder.source
  if reading.length is not None and reading.length < 3:
    raise UserError(f"--length={reading.length} leaves no room for a caption; use 3 or more")
  if kind != "clip" and (reading.layer != -1 or not reading.final_norm or reading.project):
    raise UserError(f"--layer, --no-final-norm and --project are of CLIP, and '{source}' is of "
                    f"kind {kind}; leave them out")
  positions = encoder.published.get("max_position_embeddings")
  length = reading.length or min(LENGTH, positions if isinstance(positions, int) else LENGTH)
  with blamed(f"the tokenizer in {tokenizer_folder}"):
    tokenizer = read_tokenizer(tokenizer_folder, kind, length, reading.pad)
    tokenizer.encode([PROBE])
  null = tokenizer.null()
  config = recipe.base("pretrained_text", "scenes")
  config.text.length = length
  config.model.update(
    kind=kind, published=json.dumps(encoder.published, sort_keys=True), layer=reading.layer,
    final_norm=reading.final_norm, project=reading.project, masked=reading.masked,
    null=tuple(null["ids"].tolist()), null_tokens=int(null["mask"].sum()),
  )
  with blamed(f"the config in {source}"):
    system = assembly.build_system(config)
    abstract = jax.eval_shape(lambda: system.init(jax.random.key(0), {}))["params"]["encoder"]
    vocabulary = int(encoder.published.get("vocab_size", tokenizer.vocab_size))
  if tokenizer.vocab_size > vocabulary:
    raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the encoder in {source} "
                    f"{vocabulary}; give its own with --tokenizer")
  # A projection is there to be left out.
  ignored = () if reading.project else (_PROJECTION,)
  if reading.project and not any(re.search(_PROJECTION, name) for name in encoder.tensors):
    raise UserError(f"{encoder.weights} holds no projection; leave --project out")
  params = encoder.names.stored(
    encoder.tensors, abstract, source=encoder.weights, dtype=dtype_of(dtype), ignored=ignored
  )
  tokenizers = Tokenizers({GROUP: tokenizer})
  return export.write(output, config, 0, {"params": {"encoder": params}}, tokenizers, ema=False)


def to_folder(exported: export.Export, output: str) -> Path:
  """Writes the folder that transformers reads of an export that `write` made."""
  if exported.config.system != "pretrained_text":
    raise UserError(f"{exported.path} is an export of {exported.config.system}; only text encoders "
                    "that this command converted can be given back so")
  folder = new_folder(Path(output).expanduser())
  (tokenizer,) = exported.tokenizers.of.values()
  write_model(folder, exported.config, exported.variables["params"]["encoder"])
  write_tokenizer(folder, exported.config.model.kind, tokenizer)
  return folder


def write_model(folder: Path, config: ConfigDict, params: Mapping[str, Any]) -> None:
  """Writes config.json and model.safetensors of transformers."""
  tensors = MAPS[config.model.kind].save(params)
  write_safetensors(folder / "model.safetensors", tensors)
  write_json(folder / "config.json", json.loads(config.model.published))


def write_tokenizer(folder: Path, kind: str, tokenizer: Tokenizer) -> None:
  """Writes tokenizer.json and tokenizer_config.json, and the files that older readers want."""
  from tokenizers import Tokenizer as Backend

  (folder / "tokenizer.json").write_text(tokenizer.definition, encoding="utf-8")
  backend = Backend.from_str(tokenizer.definition)
  names = (*MARKERS[kind], "pad_token")
  special = {
    name: backend.id_to_token(number)
    for name, number in zip(names, (tokenizer.start, tokenizer.end, tokenizer.pad), strict=True)
    if name and number is not None
  }
  write_json(
    folder / "tokenizer_config.json", {"model_max_length": tokenizer.length, **special}
  )
  model = json.loads(tokenizer.definition)["model"]
  if kind == "clip" and "merges" in model:
    named = model["vocab"] | {
      backend.id_to_token(number): number for number in (tokenizer.start, tokenizer.end)
    }
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_json(folder / "vocab.json", named)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    write_json(folder / "special_tokens_map.json", special)


def _of_transformers(folder: Path) -> tuple[str, dict[str, Any]]:
  """The kind of the folder's encoder, and its config.json."""
  path = folder / "config.json"
  if not folder.is_dir():
    raise UserError(f"there is no folder '{folder}'; nothing is downloaded: put the model's files "
                    "into one, config.json among them")
  if not path.is_file():
    raise UserError(f"no config.json in '{folder}': give the folder of a Hugging Face model")
  with blamed(str(path)):
    given = json.loads(path.read_text(encoding="utf-8"))
    kind = given.get("model_type")
    if "files" in given and "step" in given:
      raise UserError(f"'{folder}' is an export already; with --to (--help) it is given back")
    shared = {"projection_dim": given["projection_dim"]} if "projection_dim" in given else {}
    if kind == "clip":
      tower = {**given.get("text_config", {}), **shared, "model_type": "clip_text_model"}
  if not isinstance(kind, str) or kind not in KINDS:
    raise UserError(f"{path} is of model_type '{kind}', which is no text encoder that is known; "
                    f"known: {', '.join(KINDS)}")
  if kind == "clip":
    return "clip", tower
  return KINDS[kind], given
