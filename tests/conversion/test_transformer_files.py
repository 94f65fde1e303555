"""DiT's and U-ViT's networks in their authors' files: there, with parts of a pipeline, and back."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import t2i_jax
from t2i_jax import assembly, convert, export
from t2i_jax.conversion import transformer_files
from t2i_jax.networks.autoencoder import Decoder, Encoder
from t2i_jax.networks.dit import DiT
from t2i_jax.networks.layers.lora import chosen, kernels
from t2i_jax.networks.mmdit import MMDiT
from t2i_jax.networks.u_vit import UViT
from t2i_jax.systems.adapters.lora import LoRA
from t2i_jax.text import clip
from t2i_jax.weights import autoencoder as autoencoders
from t2i_jax.weights import dit, mmdit, u_vit
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import Stored, open_weights
from t2i_jax.weights.text_encoders import CLIP_TEXT

WIDTH, SIDE, TOKENS = 24, 16, 77
STAGE = {
  "resolution": SIDE, "latent_channels": 4, "channels": 32, "multipliers": (1, 2), "blocks": 1,
  "attention_levels": (), "middle_attention": False, "pointwise": True, "groups": 32,
  "scale": 0.18215, "shift": 0.0,
}  # fmt: skip
NETWORKS = {
  "dit": DiT(2, 64, 2, 1, classes=5, out_channels=8),
  "labels": UViT(2, 64, 2, 1, classes=5, out_channels=4, convolution=False),
  "text": UViT(2, 64, 2, 1, out_channels=4),
}  # fmt: skip


def drawn(shapes, seed=0):
  random = np.random.default_rng(seed)
  return jax.tree.map(lambda x: 0.2 * random.normal(size=x.shape).astype("f4"), shapes)


def tensors_of(network, **given):
  """What the file of a network holds, by name."""
  x = np.zeros((1, SIDE // 2, SIDE // 2, 4), "f4")
  if getattr(network, "classes", 0):
    given["label"] = np.zeros(1, int)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, np.zeros(1), **given))
  options = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
  names = (
    u_vit.authors_map(options) if isinstance(network, UViT)
    else dit.authors_map({**options, "grid": SIDE // 4})
  )
  return names.save(drawn(shapes["params"]))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A pipeline's folder with an autoencoder and a CLIP, and the three files."""
  from test_convert import PUBLISHED, SPECIAL, backend_of_clip

  folder = tmp_path_factory.mktemp("files")
  own = {k: v for k, v in STAGE.items() if k not in ("resolution", "scale", "shift")}
  shapes = {
    name: jax.eval_shape(kind(**own).init, jax.random.key(0), np.zeros(shape, "f4"))["params"]
    for name, kind, shape in (
      ("encoder", Encoder, (1, 16, 16, 3)), ("decoder", Decoder, (1, 8, 8, 4))
    )
  }  # fmt: skip
  for name in ("vae", "text_encoder", "tokenizer"):
    (folder / "parts" / name).mkdir(parents=True)
  stage, text = folder / "parts" / "vae", folder / "parts" / "text_encoder"
  (stage / "config.json").write_text(json.dumps(autoencoders.to_diffusers(STAGE)))
  write_safetensors(stage / "diffusion_pytorch_model.safetensors",
                    autoencoders.diffusers_map(2).save(drawn(shapes)))  # fmt: skip
  backend = backend_of_clip()
  published = {**PUBLISHED, "vocab_size": backend.get_vocab_size(), "hidden_size": WIDTH,
               "max_position_embeddings": TOKENS, "num_hidden_layers": 1}  # fmt: skip
  (text / "config.json").write_text(json.dumps(published))
  network = clip.CLIPText(clip.TextConfig.from_transformers(published))
  shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  write_safetensors(text / "model.safetensors", CLIP_TEXT.save(drawn(shapes)))
  backend.save(str(folder / "parts" / "tokenizer" / "tokenizer.json"))
  (folder / "parts" / "tokenizer" / "special_tokens_map.json").write_text(json.dumps(
    {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[1]}
  ))  # fmt: skip
  for name, network in NETWORKS.items():
    given = {"context": np.zeros((1, TOKENS, WIDTH))} if name == "text" else {}
    write_safetensors(folder / f"{name}.safetensors", tensors_of(network, **given))
  return folder


@pytest.mark.parametrize("name", NETWORKS)
def test_a_file_there_and_back(place, name, tmp_path):
  source, out = place / f"{name}.safetensors", tmp_path / "export"
  convert.main([f"--source={source}", f"--output={out}", f"--parts={place / 'parts'}"])
  exported = export.read(out)
  config, network = exported.config, NETWORKS[name]
  assert config.system == ("dit" if name == "dit" else "u_vit")
  assert config.model.resolution == SIDE
  for field in ("patch", "width", "depth", "heads", "mlp_ratio", "convolution"):
    assert config.model.get(field, None) == getattr(network, field, None)
  assert config.model.classes == ((("class", 5),) if name != "text" else ())
  assert config.model.learned_variance == (name == "dit")
  # What was published with captions of COCO has its own scale of the same latents.
  assert config.model.latent_scale == (0.23010 if name == "text" else 0.18215)
  assert config.model.schedule == ("linear" if name == "dit" else "scaled_linear")
  convert.main([f"--source={out}", f"--output={tmp_path / 'back.safetensors'}",
                "--to=single_file"])
  assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()
  if name == "text":
    assert set(exported.components) == {"text_encoder", "first_stage"}
    pictures = t2i_jax.load(out)(["a red ring", "a blue square"], steps=2)
    assert pictures.shape == (2, SIDE, SIDE, 3) and np.std(pictures) > 1


@pytest.mark.parametrize("name", ["dit", "text"])
def test_blocks_apart_take_adapters(place, name, tmp_path):
  """The same numbers, and each layer under a path of its own, which `lora` adapts."""
  source, parts = place / f"{name}.safetensors", f"--parts={place / 'parts'}"
  convert.main([f"--source={source}", f"--output={tmp_path / 'apart'}", parts, "--apart"])
  exported = export.read(tmp_path / "apart")
  assert exported.config.model.scan is False
  base = assembly.build_with(exported.config, exported.components)
  lora = LoRA(base.text, components={"base": base})
  block = "blocks_1" if name == "dit" else "in_blocks_0"
  adapted = lora.ranks({"denoiser": exported.variables["params"]["denoiser"]})
  assert f"denoiser/{block}/attention/query" in adapted
  convert.main([f"--source={tmp_path / 'apart'}", f"--output={tmp_path / 'back.safetensors'}",
                "--to=single_file"])
  assert (tmp_path / "back.safetensors").read_bytes() == source.read_bytes()


def test_every_attention_of_a_multimodal_transformer_is_adapted():
  network = MMDiT(2, 16, 4, 2, norm=True, dual=1, grid=4, largest=4, scan=False)
  given = {"context": np.zeros((1, 3, 8)), "pooled": np.zeros((1, 8))}
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), np.zeros((1, 8, 8, 4)),
                                               np.zeros(1), **given))["params"]
  found = chosen(kernels({"denoiser": shapes}), LoRA.targets)
  # Four projections of a picture and of a text, the last block's text being read only.
  assert len(found) == 4 * 8 - 1 + 4 * network.dual
  assert all(path.endswith(("query", "key", "value", "_out")) for path in found)


def test_the_published_networks_are_recognised():
  """Options by names and shapes alone, at the published sizes; nothing is allocated."""

  def found(network, names, options_of, **given):
    x = np.zeros((1, 32, 32, 4 if not isinstance(network, MMDiT) else 16), "f4")
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, np.zeros(1), **given))
    options = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
    tensors = {
      name: Stored(*parts) for name, parts in names({**options, "grid": GRID}).save(
        shapes["params"]
      ).items()
    }  # fmt: skip
    assert transformer_files.kind_of(tensors).options_of is options_of
    seen = options_of(tensors)
    assert {key: seen[key] for key in options if key in seen and key != "grid"} == {
      key: value for key, value in options.items() if key in seen and key != "grid"
    }  # fmt: skip
    return seen

  GRID, label = 16, np.zeros(1, int)
  seen = found(DiT(classes=1000, out_channels=8), dit.authors_map, dit.options_of, label=label)
  assert (seen["grid"], seen["resolution"], seen["heads"]) == (16, 32, 16)
  text = np.zeros((1, 77, 768))
  seen = found(UViT(out_channels=4), u_vit.authors_map, u_vit.options_of, context=text)
  assert (seen["resolution"], seen["context_width"], seen["classes"]) == (32, 768, 0)
  seen = found(UViT(width=1152, depth=28, heads=16, classes=1000, convolution=False,
                    out_channels=4), u_vit.authors_map, u_vit.options_of, label=label)
  assert seen["resolution"] == 32
  GRID, text = 64, {"context": np.zeros((1, 5, 4096)), "pooled": np.zeros((1, 2048))}
  for version in ({}, {"norm": True, "dual": 13, "largest": 384}):
    seen = found(MMDiT(**version, out_channels=16), mmdit.single_file_map, mmdit.options_of, **text)
    assert (seen["grid"], seen["context_width"], seen["pooled_width"]) == (64, 4096, 2048)


def test_what_is_no_whole_file_is_one_line(place, tmp_path, capfd):
  new, parts = f"--output={tmp_path / 'new'}", f"--parts={place / 'parts'}"

  def fails(message, *flags):
    capfd.readouterr()
    with pytest.raises(SystemExit):
      convert.main([*flags, new])
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line, line

  source = f"--source={place / 'dit.safetensors'}"
  fails("has no vae: name the folder of a pipeline of diffusers", source)
  fails("has no folder vae", source, f"--parts={tmp_path}")
  fails("elsewhere is no folder; name that of a pipeline", source, f"--parts={tmp_path}/elsewhere")
  fails("--length is of T5, and a DiT has none", source, parts, "--length=9")
  fails("--layer is not read of DiT in a file", source, parts, "--layer=-2")
  fails("--parts is not read of an autoencoder's folder", f"--source={place / 'parts' / 'vae'}",
        parts)  # fmt: skip
  held = {n: (t.shape, t.dtype, t.read) for n, t in open_weights(place / "dit.safetensors").items()}
  file = tmp_path / "file.safetensors"
  for name, message in (
    ("blocks.1.attn.proj.bias", "missing (1) blocks.1.attn.proj.bias"),
    ("pos_embed", "these weights hold no whole DiT: pos_embed missing"),
  ):
    write_safetensors(file, {n: t for n, t in held.items() if n != name})
    fails(message, f"--source={file}", parts)
  write_safetensors(file, {**held, "time_embed.0.bias": held["pos_embed"]})
  fails("unexpected (1) time_embed.0.bias", f"--source={file}", parts)
  # A checkpoint of training holds the network twice, and its averages are taken.
  write_safetensors(file, {f"{kind}.{n}": t for n, t in held.items() for kind in ("ema", "model")})
  convert.main([f"--source={file}", parts, new])
  export.read(tmp_path / "new")
