"""Files of adapters under every name that other programs give them."""

import json
import re

import jax
import numpy as np
import pytest

from t2i_jax.errors import UserError
from t2i_jax.networks.layers.lora import kernels
from t2i_jax.networks.unet import UNet
from t2i_jax.text.clip import CLIPText, TextConfig
from t2i_jax.weights import lora as files
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.text_encoders import CLIP_TEXT
from t2i_jax.weights.unet import diffusers_map
from t2i_jax.weights.unet_single_file import single_file_map

OPTIONS = {
  "channels": 8, "multipliers": (1, 2), "blocks": 1, "attention": "transformer",
  "attention_levels": (0, 1), "heads": 2, "groups": 4, "depths": (1, 2), "head_channels": 64,
}  # fmt: skip
TEXT = TextConfig(vocab_size=20, width=8, length=6, layers=1, heads=2, mlp=16)
PARTS = [
  files.Part("denoiser/", "unet", (diffusers_map(OPTIONS, True), single_file_map(OPTIONS, True))),
  files.Part("text_encoder/encoder/", "text_encoder", (CLIP_TEXT,)),
  files.Part("text_encoder_2/encoder/", "text_encoder_2", (CLIP_TEXT,)),
]
QUERY = "denoiser/down_1_0_attention/block_1/self_attention/query"
OUT = "denoiser/middle_attention/block_0/cross_attention/out"
CONV, POINT = "denoiser/up_0_1_block/conv_in", "denoiser/down_0_0_attention/project_in"
HALVED = "denoiser/down_0_sample/conv"
WORDS, OTHERS = (f"text_encoder{n}/encoder/layers_0/attention/value" for n in ("", "_2"))
# Ranks and alphas that differ.
LAYERS = {QUERY: (2, 2.0), OUT: (2, 1.0), CONV: (3, 4.5), POINT: (2, 2.0), HALVED: (1, 2.0),
          WORDS: (2, 2.0), OTHERS: (4, 8.0)}


@pytest.fixture(scope="module")
def shapes():
  unet = jax.eval_shape(
    UNet(**OPTIONS).init, jax.random.key(0), np.zeros((1, 4, 4, 3), "f4"), np.zeros(1, "f4"),
    np.zeros((1, 5, 8), "f4"),
  )["params"]
  text = jax.eval_shape(CLIPText(TEXT).init, jax.random.key(0), np.zeros((1, 6), "i4"))["params"]
  return kernels({
    "denoiser": unet, "text_encoder": {"encoder": text}, "text_encoder_2": {"encoder": text}
  })


@pytest.fixture
def adapters(shapes):
  random = np.random.default_rng(0)
  return {
    path: files.Adapter(
      random.normal(size=(*shapes[path][:-1], rank)).astype("f4"),
      random.normal(size=(rank, shapes[path][-1])).astype("f4"), alpha,
    )
    for path, (rank, alpha) in LAYERS.items()
  }


def assert_same(found, wanted):
  assert set(found) == set(wanted)
  for path, adapter in wanted.items():
    for name in ("down", "up", "alpha"):
      np.testing.assert_array_equal(getattr(found[path], name), getattr(adapter, name), path)
      assert found[path].down.dtype == np.float32


def arrays(tensors):
  return {name: read() for name, (_, _, read) in tensors.items()}


def write(path, tensors, header=None):
  write_safetensors(path, {
    name: (x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()
  }, header)  # fmt: skip
  return path


def test_what_is_saved_is_loaded_and_saved_alike(shapes, adapters, tmp_path):
  tensors, header = files.save(adapters, shapes, PARTS)
  write_safetensors(tmp_path / "a.safetensors", tensors, header)
  found = files.load(tmp_path / "a.safetensors", shapes, PARTS)
  assert_same(found, adapters)
  write_safetensors(tmp_path / "b.safetensors", *files.save(found, shapes, PARTS))
  assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_names_and_shapes_are_those_of_diffusers(shapes, adapters):
  tensors, header = files.save(adapters, shapes, PARTS, np.float16)
  found = {name: x.shape for name, x in arrays(tensors).items()}
  block = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"
  assert found[f"{block}.lora_A.weight"] == (2, 16) and found[f"{block}.lora_B.weight"] == (16, 2)
  out = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0"
  assert found[f"{out}.lora_A.weight"] == (2, 16)
  assert found["unet.up_blocks.1.resnets.1.conv1.lora_A.weight"] == (3, 16, 3, 3)
  assert found["unet.up_blocks.1.resnets.1.conv1.lora_B.weight"] == (8, 3, 1, 1)
  assert found["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"] == (2, 8, 1, 1)
  assert found["unet.down_blocks.0.attentions.0.proj_in.lora_B.weight"] == (8, 2, 1, 1)
  assert "text_encoder_2.text_model.encoder.layers.0.self_attn.v_proj.lora_B.weight" in found
  assert {x.dtype for x in arrays(tensors).values()} == {np.dtype("f2")}
  told = json.loads(header["lora_adapter_metadata"])
  assert told["unet.r"] == 2 and told["unet.lora_alpha"] == 2
  assert told["unet.rank_pattern"]["up_blocks.1.resnets.1.conv1"] == 3
  assert told["unet.alpha_pattern"]["up_blocks.1.resnets.1.conv1"] == 4.5
  assert told["text_encoder_2.lora_alpha"] == 8


def older(name):
  """diffusers' names before peft's: processors of attentions, and layers beside others."""
  name = name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up.")
  name = re.sub(r"\.(to_[qkv])\.lora\.", r".processor.\1_lora.", name)
  name = name.replace(".to_out.0.lora.", ".processor.to_out_lora.")
  return re.sub(r"^(text.*)\.lora\.", r"\1.lora_linear_layer.", name)


def kohya(name):
  stem, _, end = name.rpartition(".lora_")
  stem = re.sub("^unet", "lora_unet", stem)
  stem = re.sub(r"^text_encoder_2\.", "lora_te2_", re.sub(r"^text_encoder\.", "lora_te1_", stem))
  return f"{stem.replace('.', '_')}.lora_{ {'A': 'down', 'B': 'up'}[end[0]] }.weight"


def authors(name):
  """kohya's names of a U-Net whose layers are named by their authors."""
  for theirs, other in (
    ("down_blocks_0_attentions_0", "input_blocks_1_1"), ("down_blocks_1_attentions_0",
    "input_blocks_3_1"), ("mid_block_attentions_0", "middle_block_1"),
    ("up_blocks_1_resnets_1_conv1", "output_blocks_3_0_in_layers_2"),
    ("down_blocks_0_downsamplers_0_conv", "input_blocks_2_0_op"),
  ):  # fmt: skip
    name = name.replace(theirs, other)
  return name


@pytest.mark.parametrize("renamed", [
  lambda name: name, older, kohya, lambda name: authors(kohya(name)),
  lambda name: f"base_model.model.{name}",
  lambda name: re.sub(r"\.(lora_[AB])\.", r".\1.default.", name),
  lambda name: kohya(name).replace("lora_te1_", "lora_te_"),
], ids=["diffusers", "older", "kohya", "authors", "peft", "named", "one text encoder"])  # fmt: skip
def test_every_name_is_read(shapes, adapters, renamed, tmp_path):
  tensors = arrays(files.save(adapters, shapes, PARTS)[0])
  given = {renamed(name): x for name, x in tensors.items()}
  assert len(given) == len(tensors)
  for path, adapter in adapters.items():
    ours = files.save({path: adapter}, shapes, PARTS)[0]
    stem = re.sub(r"\.?(_lora|lora|lora_linear_layer|lora_A|lora_A\.default|lora_down)"
                  r"(\.down)?\.weight$", "", renamed(next(n for n in ours if "lora_A" in n)))
    given[f"{stem}.alpha"] = np.float32(adapter.alpha)
  path = write(tmp_path / "lora.safetensors", given)
  assert_same(files.load(path, shapes, PARTS), adapters)


def test_without_an_alpha_it_is_the_rank(shapes, adapters, tmp_path):
  tensors = arrays(files.save(adapters, shapes, PARTS)[0])
  path = write(tmp_path / "lora.safetensors", tensors)
  for layer, adapter in files.load(path, shapes, PARTS).items():
    assert adapter.alpha == LAYERS[layer][0]


def test_one_network_s_file_of_peft(shapes, adapters, tmp_path):
  one = {QUERY: adapters[QUERY]}
  tensors = arrays(files.save(one, shapes, PARTS)[0])
  write(tmp_path / "adapter_model.safetensors", {
    name.replace("unet.", "base_model.model."): x for name, x in tensors.items()
  })  # fmt: skip
  (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 7}))
  (found,) = files.load(tmp_path, shapes, PARTS).values()
  assert found.alpha == 7
  (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 7, "use_rslora": True}))
  (found,) = files.load(tmp_path, shapes, PARTS).values()
  assert found.alpha == pytest.approx(7 * 2**0.5)


def test_files_that_are_not_of_this_base_are_refused(shapes, adapters, tmp_path):
  tensors = arrays(files.save(adapters, shapes, PARTS)[0])
  block = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q"

  def refuses(match, **changed):
    given = {**tensors, **{name.replace("/", "."): x for name, x in changed.items()}}
    path = write(tmp_path / "lora.safetensors", {k: v for k, v in given.items() if v is not None})
    with pytest.raises(UserError, match=match):
      files.load(path, shapes, PARTS)

  refuses(r"of no layer of it \(1\) unet.down_blocks.7.attn.to_q.lora_A.weight",
          **{"unet.down_blocks.7.attn.to_q.lora_A.weight": np.zeros((2, 2), "f4")})
  refuses(r"of no layer of it \(1\) .*lora_magnitude_vector",
          **{f"{block}.lora_magnitude_vector": np.zeros(2, "f4")})
  refuses(r"without their half \(1\) .*to_q.lora_A.weight", **{f"{block}.lora_B.weight": None})
  refuses(r"of another shape \(1\) .*to_q.lora_A.weight \(\[2, 24\] and \[16, 2\] for a kernel of "
          r"\[16, 16\]\)", **{f"{block}.lora_A.weight": np.zeros((2, 24), "f4")})
  refuses(r"with NaN or infinity \(1\) .*to_q.lora_A",
          **{f"{block}.lora_A.weight": np.full((2, 16), np.nan, "f4")})
  refuses(r"of one layer \(1\)", **{f"{block}.lora_down.weight": np.zeros((2, 16), "f4")})
  with pytest.raises(UserError, match="no adapters in the folder"):
    files.load(tmp_path, shapes, PARTS)
  path = write(tmp_path / "lora.safetensors", tensors, {"lora_adapter_metadata": "[]"})
  with pytest.raises(UserError, match="ranks and alphas is no JSON object"):
    files.load(path, shapes, PARTS)
  path = write(tmp_path / "lora.safetensors", tensors,
               {"lora_adapter_metadata": '{"unet.lora_alpha": "many"}'})
  with pytest.raises(UserError, match="alphas cannot be read"):
    files.load(path, shapes, PARTS)


def test_a_layer_without_a_name_is_an_error(shapes, adapters):
  with pytest.raises(UserError, match="draft/conv has no name in diffusers' files"):
    files.save({"draft/conv": adapters[CONV]}, {"draft/conv": (3, 3, 16, 8)}, PARTS)
