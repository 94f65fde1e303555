"""Both towers of CLIP under either's names, there and back, and as what a guide starts from."""

import json
import shutil

import jax
import numpy as np
import pytest
from runs import ROOT
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from t2i_jax import assembly, batch_spec, config_files, convert, export
from t2i_jax.text import clip
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import open_weights
from t2i_jax.weights.text_encoders import CLIP, OPEN_CLIP

ENDS = ["<|startoftext|>", "<|endoftext|>"]
LENGTH, SIDE = 10, 8
SHARED = {"num_hidden_layers": 1, "hidden_act": "quick_gelu", "projection_dim": 6}
PUBLISHED = {
  "model_type": "clip", "projection_dim": 6,
  # Heads of 64, which files under the authors' names do not say.
  "text_config": {**SHARED, "hidden_size": 16, "num_attention_heads": 1, "intermediate_size": 64,
                  "max_position_embeddings": LENGTH, "eos_token_id": 2},
  "vision_config": {**SHARED, "hidden_size": 20, "num_attention_heads": 1, "intermediate_size": 96,
                    "image_size": SIDE, "patch_size": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """A CLIP in a folder of transformers, its export, and a file as OpenAI's."""
  place = tmp_path_factory.mktemp("clip")
  (place / "folder").mkdir()
  letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *ENDS]
  backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.add_special_tokens(ENDS)
  backend.save(str(place / "folder" / "tokenizer.json"))
  published = {**PUBLISHED, "text_config": {**PUBLISHED["text_config"], "vocab_size": len(letters)}}
  (place / "folder" / "config.json").write_text(json.dumps(published))
  network = clip.CLIP(
    clip.TextConfig.from_transformers(published["text_config"]),
    clip.VisionConfig.from_transformers(published["vision_config"]),
  )
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), np.zeros((1, SIDE, SIDE, 3)), np.zeros((1, LENGTH), int)
  )["params"]
  random = np.random.default_rng(0)
  params = jax.tree.map(lambda x: np.asarray(random.normal(size=x.shape), "f4"), shapes)
  write_safetensors(place / "folder" / "model.safetensors", CLIP.save(params))
  write_safetensors(place / "file.safetensors", OPEN_CLIP.save(params))
  convert.main([f"--source={place / 'folder'}", f"--output={place / 'export'}", "--towers=both"])
  return place


def test_there_and_back_byte_for_byte(place, tmp_path):
  convert.main([f"--source={place / 'export'}", f"--output={tmp_path / 'back'}",
                "--to=huggingface"])
  name = "model.safetensors"
  assert (tmp_path / "back" / name).read_bytes() == (place / "folder" / name).read_bytes()
  convert.main([f"--source={tmp_path / 'back'}", f"--output={tmp_path / 'again'}",
                "--towers=both"])
  for name in ("variables.safetensors", "tokenizer.json"):
    assert (tmp_path / "again" / name).read_bytes() == (place / "export" / name).read_bytes()
  assert export.read(tmp_path / "again").config == export.read(place / "export").config
  # The text tower alone is read of it too, as before.
  convert.main([f"--source={tmp_path / 'back'}", f"--output={tmp_path / 'text'}"])
  assert export.read(tmp_path / "text").config.system == "pretrained_text"


def test_under_its_authors_names(place, tmp_path):
  tokens = f"--tokenizer={place / 'folder'}"
  convert.main([f"--source={place / 'file.safetensors'}", f"--output={tmp_path / 'file'}", tokens,
                "--towers=both", "--activation=quick_gelu"])
  # A folder of OpenCLIP's says its heads.
  folder = tmp_path / "folder"
  folder.mkdir()
  shutil.copy(place / "file.safetensors", folder / "open_clip_model.safetensors")
  (folder / "open_clip_config.json").write_text(json.dumps({
    "model_cfg": {"quick_gelu": True, "text_cfg": {"heads": 1}, "vision_cfg": {"head_width": 20}},
    "preprocess_cfg": {"mean": list(clip.MEAN)},
  }))  # fmt: skip
  convert.main([f"--source={folder}", f"--output={tmp_path / 'open'}", tokens, "--towers=both"])
  expected = export.read(place / "export")
  for name in ("file", "open"):
    found = export.read(tmp_path / name)
    assert found.config == expected.config and found.tokenizers == expected.tokenizers
    same = jax.tree.map(np.array_equal, found.variables, expected.variables)
    assert jax.tree.all(same)


def test_a_guide_starts_from_it(place):
  config = config_files.load_config(
    f"{ROOT}/configs/semantic_guidance.py:size=tiny", {"components.clip": str(place / "export")}
  )
  components = assembly.load_components(config)
  system = assembly.build_system(config, components.systems)
  batch = batch_spec.abstract_batch(system, 2)
  shapes = jax.eval_shape(
    lambda batch, frozen: system.init(jax.random.key(0), batch, frozen), batch,
    components.variables,
  )["params"]["image_encoder"]  # fmt: skip
  assert shapes["patches"]["kernel"].shape == (4, 4, 3, 20)
  assert system.clean_clip.activation == "quick_gelu" and system.clean_clip.mlp == 96


def fails(capfd, *flags):
  capfd.readouterr()
  with pytest.raises(SystemExit) as exit:
    convert.main([*map(str, flags), "--towers=both"])
  assert exit.value.code == 2
  (line,) = capfd.readouterr().err.splitlines()
  return line.removeprefix("error: ")


def test_what_has_not_both_is_one_line(place, tmp_path, capfd):
  copy, new = shutil.copytree(place / "folder", tmp_path / "copy"), f"--output={tmp_path / 'new'}"
  source, given = f"--source={copy}", json.loads((copy / "config.json").read_text())

  def changed(message, **values):
    (copy / "config.json").write_text(json.dumps({**given, **values}))
    assert message in fails(capfd, source, new)

  assert "--length is not read of both towers of CLIP" in fails(capfd, source, new, "--length=5")
  changed("is of CLIP's text tower alone", model_type="clip_text_model", vision_config=None,
          **given["text_config"])
  changed("--towers=both is of CLIP, and", model_type="t5")
  vision, text = given["vision_config"], given["text_config"]
  other = {**vision, "hidden_act": "gelu"}
  changed("has activation=quick_gelu and its vision", vision_config=other)
  changed("64 units in its MLPs", text_config={**text, "hidden_size": 32})
  changed("layer_norm_eps=1e-06 is not known", vision_config={**vision, "layer_norm_eps": 1e-6})
  changed("does not hold this model: missing", vision_config={**vision, "num_hidden_layers": 2})
  changed("ends texts by number 257", text_config={**text, "eos_token_id": 5})
  (copy / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5]}))
  changed("was trained on pictures of another mean than OpenAI's CLIP, [0.5, 0.5, 0.5]")

  tensors = {name: (t.shape, t.dtype, t.read)
             for name, t in open_weights(place / "file.safetensors").items()}
  path = tmp_path / "resnet.safetensors"
  write_safetensors(path, {n: t for n, t in tensors.items() if n != "visual.proj"})
  flags = [f"--source={path}", new, f"--tokenizer={copy}", "--activation=gelu"]
  assert "a ResNet or another network where" in fails(capfd, *flags)
  write_safetensors(path, {n: t for n, t in tensors.items() if not n.startswith("visual.")})
  assert "has nothing where CLIP's vision transformer" in fails(capfd, *flags)
  assert not (tmp_path / "new").exists()


def test_one_that_was_trained_here_does_not_go_back(place, tmp_path, capfd):
  exported = export.read(place / "export")
  with exported.config.unlocked():
    exported.config.model.end = 2
  export.write(tmp_path / "own", exported.config, 0, exported.variables, exported.tokenizers)
  assert "ends texts by token number 2" in fails(
    capfd, f"--source={tmp_path / 'own'}", f"--output={tmp_path / 'back'}", "--to=huggingface"
  )
