"""Public CLIPs with both towers to exports of system `clip`, and back.

`conversion.text` reads the text tower alone, frozen; both together match pictures with captions,
and are what `semantic_guidance` starts from.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from t2i_jax import assembly, batch_spec, export, recipe
from t2i_jax.conversion import blamed, dtype_of, new_folder, read_json, text, write_json
from t2i_jax.errors import UserError
from t2i_jax.systems.conditioning import GROUP
from t2i_jax.systems.text.clip import TOWERS
from t2i_jax.text import clip
from t2i_jax.text.public_tokenizer import read_tokenizer
from t2i_jax.text.tokenizer import END, Tokenizers
from t2i_jax.weights import text_encoders as maps
from t2i_jax.weights.safetensors_file import write_safetensors

PREPROCESSOR, OPEN_CLIP = "preprocessor_config.json", "open_clip_config.json"
_HEAD = 64  # channels of a head, where nothing says it


@dataclasses.dataclass(frozen=True)
class Towers:
  """A public CLIP: its text tower with the tensors of both, and its vision tower's sizes."""

  text: text.Encoder
  vision: clip.VisionConfig

  @property
  def sizes(self) -> clip.TextConfig:
    """The text tower's."""
    return clip.TextConfig.from_transformers(self.text.published)


def open_towers(source: str, activation: str = "") -> Towers:
  """The CLIP in a folder of transformers or OpenCLIP, or in a file under its authors' names.

  Raises:
    UserError: as `text.open_encoder`; there is no vision tower, or none that is a transformer; or
      pictures are prepared for it otherwise than for OpenAI's.
  """
  encoder = text.open_encoder(source, activation)
  if encoder.kind != "clip":
    raise UserError(f"--towers=both is of CLIP, and '{source}' is of kind {encoder.kind}; leave it "
                    "out")
  folder = Path(source).expanduser()
  if encoder.names is maps.OPEN_CLIP_TEXT:
    given = read_json(folder / OPEN_CLIP) if folder.is_dir() else {}
    with blamed(str(source)):
      head = int(given.get("model_cfg", {}).get("vision_cfg", {}).get("head_width", _HEAD))
      vision = _of_open_clip(encoder, head)
      prepared = given.get("preprocess_cfg", {})
      _check_prepared(prepared.get("mean"), prepared.get("std"), source)
    return Towers(encoder, vision)
  given = read_json(folder / "config.json")
  if not isinstance(given.get("vision_config"), dict):
    raise UserError(f"{folder / 'config.json'} is of CLIP's text tower alone; give the folder of "
                    "both, or leave --towers=both out")
  with blamed(str(folder / "config.json")):
    shared = {"projection_dim": given["projection_dim"]} if "projection_dim" in given else {}
    vision = clip.VisionConfig.from_transformers({**given["vision_config"], **shared})
  if (folder / PREPROCESSOR).is_file():
    prepared = read_json(folder / PREPROCESSOR)
    with blamed(str(folder / PREPROCESSOR)):
      _check_prepared(prepared.get("image_mean"), prepared.get("image_std"), source)
  return Towers(encoder, vision)


def write(
  output: str, towers: Towers, tokenizer_folder: str, pad: str = "", dtype: str = "stored"
) -> Path:
  """Writes the export of a CLIP.

  Args:
    output: the export, replaced if it exists.
    towers: of `open_towers`.
    tokenizer_folder: of its tokenizer.
    pad: token of the padding in place of the tokenizer's.
    dtype: of the numbers, one of `conversion.DTYPES`.
  """
  export.check_replaceable(output)
  encoder, vision = towers.text, towers.vision
  with blamed(encoder.source):
    sizes = towers.sizes
    _check_alike(sizes, vision, encoder.source)
  with blamed(f"the tokenizer in {tokenizer_folder}"):
    tokenizer = read_tokenizer(tokenizer_folder, "clip", sizes.length, pad)
    tokenizer.encode([text.PROBE])
  if tokenizer.vocab_size > sizes.vocab_size or tokenizer.end != sizes.end:
    raise UserError(f"the tokenizer in {tokenizer_folder} has {tokenizer.vocab_size} tokens and "
                    f"ends texts by number {tokenizer.end}, the CLIP in {encoder.source} "
                    f"{sizes.vocab_size} and {sizes.end}; give its own with --tokenizer")
  config = recipe.base("clip", "folder")
  with blamed(encoder.source):
    config.text.update(
      length=sizes.length, vocab_size=sizes.vocab_size, width=sizes.width, layers=sizes.layers,
      heads=sizes.heads, drop=0.0,
    )  # fmt: skip
    shared = ("width", "layers", "heads", "projection", "activation", "resolution", "patch")
    config.model.update(
      {name: getattr(vision, name) for name in shared}, start=tokenizer.start, end=sizes.end,
      pad=tokenizer.pad, mlp=0 if vision.mlp == 4 * vision.width else vision.mlp,
    )  # fmt: skip
    system = assembly.build_system(config)
    batch = batch_spec.abstract_batch(system, 1)
    abstract = jax.eval_shape(lambda batch: system.init(jax.random.key(0), batch), batch)
  names = maps.OPEN_CLIP if encoder.names is maps.OPEN_CLIP_TEXT else maps.CLIP
  params = names.stored(
    encoder.tensors, abstract["params"][TOWERS], source=encoder.weights, dtype=dtype_of(dtype)
  )
  tokenizers = Tokenizers({GROUP: tokenizer})
  return export.write(output, config, 0, {"params": {TOWERS: params}}, tokenizers, ema=False)


def to_folder(exported: export.Export, output: str) -> Path:
  """Writes the folder that transformers reads of an export of `clip`."""
  model, given = exported.config.model, exported.config.text
  if model.end == END:
    # Transformers takes this number for a sign of the oldest configs, and looks for the largest id.
    raise UserError(f"{exported.path} ends texts by token number {END}, as tokenizers that are "
                    "trained here do and transformers' CLIP cannot; only CLIPs that were converted "
                    "can be given back")
  folder = new_folder(Path(output).expanduser())
  shared = {"hidden_act": model.activation, "layer_norm_eps": clip.EPSILON,
            "projection_dim": model.projection}  # fmt: skip
  tower = lambda sizes, mlp: {  # noqa: E731
    "hidden_size": sizes.width, "num_hidden_layers": sizes.layers,
    "num_attention_heads": sizes.heads, "intermediate_size": mlp or 4 * sizes.width, **shared,
  }  # fmt: skip
  write_json(folder / "config.json", {
    "architectures": ["CLIPModel"], "model_type": "clip", "projection_dim": model.projection,
    "text_config": {
      "model_type": "clip_text_model", **tower(given, 0), "vocab_size": given.vocab_size,
      "max_position_embeddings": given.length, "bos_token_id": model.start,
      "eos_token_id": model.end, "pad_token_id": model.pad,
    },
    "vision_config": {
      "model_type": "clip_vision_model", **tower(model, model.mlp),
      "image_size": model.resolution, "patch_size": model.patch,
    },
  })  # fmt: skip
  write_safetensors(
    folder / "model.safetensors", maps.CLIP.save(exported.variables["params"][TOWERS])
  )
  (tokenizer,) = exported.tokenizers.of.values()
  text.write_tokenizer(folder, "clip", tokenizer)
  write_json(folder / PREPROCESSOR, {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
    "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
    "size": {"shortest_edge": model.resolution},
    "crop_size": {"height": model.resolution, "width": model.resolution},
    "image_mean": clip.MEAN, "image_std": clip.DEVIATION,
  })  # fmt: skip
  return folder


def _of_open_clip(encoder: text.Encoder, head: int) -> clip.VisionConfig:
  """The vision tower's sizes under OpenAI's and OpenCLIP's names."""
  shapes = {
    name.removeprefix("module."): tensor.shape for name, tensor in encoder.tensors.items()
  }
  if "visual.conv1.weight" not in shapes or "visual.proj" not in shapes:
    found = "a ResNet or another network" if any(
      name.startswith("visual.") for name in shapes
    ) else "nothing"
    raise UserError(f"{encoder.weights} has {found} where CLIP's vision transformer should be; "
                    "known are the models named ViT")
  width, _, patch, _ = shapes["visual.conv1.weight"]
  places = shapes["visual.positional_embedding"][0] - 1
  blocks = "visual.transformer.resblocks."
  layers = {name.removeprefix(blocks).split(".")[0] for name in shapes if name.startswith(blocks)}
  return clip.VisionConfig(
    width, len(layers), max(width // head, 1), shapes[f"{blocks}0.mlp.c_fc.weight"][0],
    encoder.published["hidden_act"], shapes["visual.proj"][1], patch * round(places**0.5), patch,
  )  # fmt: skip


def _check_alike(sizes: clip.TextConfig, vision: clip.VisionConfig, source: str) -> None:
  """Raises where the towers differ in what one setting of ours is of both."""
  for name in ("activation", "projection"):
    ours, theirs = getattr(sizes, name), getattr(vision, name)
    if ours != theirs:
      raise UserError(f"{source}: a CLIP whose text tower has {name}={ours} and its vision tower "
                      f"{theirs} is not known, only with the same")
  if sizes.mlp != 4 * sizes.width:
    raise UserError(f"{source}: a CLIP whose text tower has {sizes.mlp} units in its MLPs is not "
                    f"known, only with four times its width, {4 * sizes.width}")


def _check_prepared(mean: Any, deviation: Any, source: str) -> None:
  for name, given, known in (
    ("mean", mean, clip.MEAN), ("standard deviation", deviation, clip.DEVIATION)
  ):
    if given is not None and not np.allclose(given, known, atol=1e-4):
      raise UserError(f"'{source}' was trained on pictures of another {name} than OpenAI's CLIP, "
                      f"{json.dumps(given)}; only {json.dumps(known)} is known")
