"""Public text encoders become exports, are trained on, and go back as they came."""

import io
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
import sentencepiece
from runs import ROOT, TOY, config_of, train_on
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

import t2i_jax
from t2i_jax import assembly, convert, data, export
from t2i_jax.errors import UserError
from t2i_jax.text import clip
from t2i_jax.text.public_tokenizer import read_tokenizer
from t2i_jax.text.tokenizer import Tokenizer, clean_as_clip
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import open_weights
from t2i_jax.weights.text_encoders import CLIP_TEXT, OPEN_CLIP_TEXT

pytestmark = pytest.mark.usefixtures("compiled_programs")

SPECIAL = ["<|startoftext|>", "<|endoftext|>"]
PUBLISHED = {
  "model_type": "clip_text_model", "hidden_size": 16, "num_hidden_layers": 2,
  "num_attention_heads": 2, "intermediate_size": 32, "hidden_act": "quick_gelu",
  "projection_dim": 12, "max_position_embeddings": 20, "eos_token_id": 2,
}  # fmt: skip


def backend_of_clip():
  """A small tokenizer with CLIP's conventions: its markers have the highest ids."""
  backend = Backend(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.decoder = decoders.ByteLevel()
  captions = data.open_source("scenes", "train", 16, 0, {"levels": ("one",)}).captions()
  backend.train_from_iterator(captions, trainers.BpeTrainer(
    vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
  ))
  backend.add_special_tokens(SPECIAL)
  return backend


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A text tower as transformers would save it, with float16 numbers."""
  path = tmp_path_factory.mktemp("clip")
  backend = backend_of_clip()
  published = {**PUBLISHED, "vocab_size": backend.get_vocab_size()}
  (path / "config.json").write_text(json.dumps(published))
  backend.save(str(path / "tokenizer.json"))
  (path / "special_tokens_map.json").write_text(json.dumps(
    {"bos_token": {"content": SPECIAL[0]}, "eos_token": SPECIAL[1], "pad_token": SPECIAL[1]}
  ))
  network = clip.CLIPText(clip.TextConfig.from_transformers(published))
  params = network.init(jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  write_safetensors(path / "model.safetensors", CLIP_TEXT.save(params, np.float16))
  return path


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
  output = tmp_path_factory.mktemp("converted") / "export"
  convert.main([f"--source={folder}", f"--output={output}", "--length=20", "--project"])
  return output


def test_the_export_encodes_as_the_network_does(folder, converted):
  exported = export.read(converted)
  system = assembly.build_with(exported.config, exported.components)
  (tokenizer,) = exported.tokenizers.of.values()
  text = tokenizer.encode(["a red ring", "a blue square at the top left"])
  end = tokenizer.end
  assert text["ids"][0, 0] == tokenizer.start == end - 1
  # Padded with the end, of which the first is the caption's.
  assert text["ids"][0, text["mask"][0].sum() - 1 :].tolist() == [end] * (
    21 - text["mask"][0].sum()
  )
  given = system.encode({"params": exported.variables["params"]}, text)
  assert given.mask is None and given.pooled.shape == (2, 12) and given.sequence.shape[1] == 20
  null = system.null_text()
  np.testing.assert_array_equal(null["ids"], tokenizer.encode([""])["ids"][0])
  assert null["mask"].sum() == 2
  kernel = exported.variables["params"]["encoder"]["projection"]["kernel"]
  stored = open_weights(folder)["text_projection.weight"].read()
  assert kernel.dtype == np.float16
  np.testing.assert_array_equal(kernel, stored.T)


def test_there_and_back_again_byte_for_byte(folder, converted, tmp_path):
  convert.main([f"--source={converted}", f"--output={tmp_path / 'back'}", "--to=huggingface"])
  name = "model.safetensors"
  assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
  again = read_tokenizer(tmp_path / "back", "clip", 20)
  assert {"text_encoder": again} == export.read(converted).tokenizers.of
  convert.main([f"--source={tmp_path / 'back'}", f"--output={tmp_path / 'new'}", "--length=20",
                "--project"])
  for name in ("variables.safetensors", "tokenizer.json"):
    assert (tmp_path / "new" / name).read_bytes() == (converted / name).read_bytes()


@pytest.mark.parametrize("path", [
  pytest.param(TOY, id="toy"),
  pytest.param(ROOT / "configs" / "ddpm.py", id="ddpm", marks=pytest.mark.full),
])
def test_a_model_is_trained_on_it_and_drawn_from(converted, tmp_path, path):
  config = config_of(path, train__duration=2, sample__every=0, evaluate__every=0,
                     text__encoder="component", components__text_encoder=converted)
  train_on(config, tmp_path / "run")
  held = export.read(tmp_path / "run" / "export")
  assert held.tokenizers == export.read(converted).tokenizers
  pictures = t2i_jax.load(tmp_path / "run" / "export")(["a red ring", "a blue square"])
  assert pictures.shape == (2, 16, 16, 3) and (pictures[0] != pictures[1]).any()


def fails(capfd, *flags):
  capfd.readouterr()
  with pytest.raises(SystemExit) as exit:
    convert.main([str(flag) for flag in flags])
  assert exit.value.code == 2
  (line,) = capfd.readouterr().err.splitlines()
  return line.removeprefix("error: ")


def test_what_cannot_be_converted_is_one_line(folder, converted, tmp_path, capfd):
  new = f"--output={tmp_path / 'new'}"
  assert "no config.json in" in fails(capfd, f"--source={tmp_path}", new)
  copy = shutil.copytree(folder, tmp_path / "copy")
  source = f"--source={copy}"
  message = fails(capfd, source, new, "--length=77")
  assert "text.length=77 is more than the 20 positions that this clip has" in message
  assert "there is no 9" in fails(capfd, source, new, "--length=20", "--layer=9")
  assert "unknown --dtype 'int8'" in fails(capfd, source, new, "--dtype=int8")
  (copy / "tokenizer.json").write_text("{}")
  assert "is no tokenizer" in fails(capfd, source, new, "--length=20")
  (copy / "tokenizer.json").unlink()
  assert "it has neither tokenizer.json nor" in fails(capfd, source, new, "--length=20")
  shutil.copy(folder / "tokenizer.json", copy)
  (copy / "special_tokens_map.json").write_text(json.dumps({"pad_token": "[PAD]"}))
  message = fails(capfd, source, new, "--length=20")
  assert "has no '[PAD]', its pad_token; is it the tokenizer of a clip model?" in message
  (copy / "special_tokens_map.json").unlink()
  wider = {**json.loads((copy / "config.json").read_text()), "hidden_size": 24}
  (copy / "config.json").write_text(json.dumps(wider))
  message = fails(capfd, source, new, "--length=20", "--project")
  assert f"{copy} does not hold this model: of another shape" in message
  (copy / "config.json").write_text(json.dumps({"model_type": "llama"}))
  assert "model_type 'llama', which is no text encoder" in fails(capfd, source, new)
  (copy / "config.json").write_text("[")
  assert "is not of such a model (JSON" in fails(capfd, source, new)
  assert not (tmp_path / "new").exists()
  message = fails(capfd, f"--source={converted}", f"--output={folder}", "--to=huggingface")
  assert "is there and not empty" in message
  message = fails(capfd, f"--source={folder}", f"--output={folder}")
  assert "is there and is no export, so it is not replaced" in message
  assert "unknown --to 'hugging'" in fails(capfd, source, new, "--to=hugging")


def test_padding_of_openai_s_own_tokenizer(folder):
  plain, own = (read_tokenizer(folder, "clip", 20, pad) for pad in ("", "!"))
  assert own.pad == own.encode(["a"])["ids"][0, -1] != plain.pad == plain.end
  np.testing.assert_array_equal(own.encode(["a"])["mask"], plain.encode(["a"])["mask"])


def test_captions_are_cleaned_as_clip_s_were():
  assert clean_as_clip("  it\u2019s &amp;lt;b&amp;gt;\n bold ") == "it's <b> bold"


def test_markers_that_a_model_does_not_have(folder):
  definition = (folder / "tokenizer.json").read_text()
  end = Backend.from_str(definition).token_to_id(SPECIAL[1])
  tokenizer = Tokenizer(definition, 5, None, end, 0)
  text = tokenizer.encode(["a red ring at the top left of it", "a"])
  assert text["ids"][0, -1] == end and text["mask"].sum(axis=1).tolist() == [5, 2]
  assert tokenizer.truncated("a") is None and tokenizer.truncated("a red ring at the top left")
  assert tokenizer.lengths(["a"]).tolist() == [2]
  again = Tokenizer.from_dict(tokenizer.to_dict())
  assert again.encode(["a red"])["ids"].tolist() == tokenizer.encode(["a red"])["ids"].tolist()
  with pytest.raises(ValueError):
    Tokenizer.from_dict({"definition": {}, "length": 5, "other": 1})


def test_a_folder_with_sentencepiece_s_own_model(tmp_path):
  """As Google published T5: no tokenizer.json."""
  source = data.open_source("scenes", "train", 32, 0, {"levels": ("one",)})
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=itertools.islice(source.captions(), 5000), model_writer=model,
    vocab_size=120, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
  )  # fmt: skip
  (tmp_path / "spiece.model").write_bytes(model.getvalue())
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
  tokenizer = read_tokenizer(tmp_path, "t5", 24)
  reference = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  captions = ["a red ring at the top", "Ein K\u00e4se", "two  spaces"]
  text = tokenizer.encode(captions)
  for ids, mask, caption in zip(text["ids"], text["mask"], captions, strict=True):
    assert ids[mask].tolist() == [*reference.encode(caption), 1]
  assert (tokenizer.start, tokenizer.end, tokenizer.pad) == (None, 1, 0)


def open_clip_weights(folder, path):
  """The folder's text tower under OpenCLIP's names, in float16."""
  published = json.loads((folder / "config.json").read_text())
  network = clip.CLIPText(clip.TextConfig.from_transformers(published))
  abstract = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 8), np.int32))["params"]
  params = CLIP_TEXT.load(open_weights(folder), abstract, source="it", dtype=np.float16)
  write_safetensors(path, OPEN_CLIP_TEXT.save(params))


def test_clip_under_its_authors_names(folder, converted, tmp_path, capfd):
  """A file as OpenAI has them, and a folder as OpenCLIP has them."""
  path = tmp_path / "clip.safetensors"
  open_clip_weights(folder, path)
  flags = ["--length=20", "--project", f"--output={tmp_path / 'out'}"]
  convert.main([f"--source={path}", f"--tokenizer={folder}", "--activation=quick_gelu", *flags])
  expected, found = export.read(converted), export.read(tmp_path / "out")
  same = jax.tree.map(
    lambda x, y: np.array_equal(x, y), found.variables["params"], expected.variables["params"]
  )
  assert jax.tree.all(same)
  published = json.loads(found.config.model.published)
  assert published["hidden_act"] == "quick_gelu" and published["num_hidden_layers"] == 2
  assert published["eos_token_id"] == published["vocab_size"] - 1
  # The same in a folder, with another activation and its number of heads.
  own = tmp_path / "folder"
  shutil.copytree(folder, own)
  for name in ("config.json", "model.safetensors"):
    (own / name).unlink()
  shutil.copy(path, own / "open_clip_model.safetensors")
  (own / "open_clip_config.json").write_text(
    json.dumps({"model_cfg": {"embed_dim": 12, "text_cfg": {"heads": 2}}})
  )
  convert.main([f"--source={own}", *flags])
  published = json.loads(export.read(tmp_path / "out").config.model.published)
  assert published["hidden_act"] == "gelu" and published["num_attention_heads"] == 2

  # Without the projection; and with the names that training on several devices gives.
  convert.main([f"--source={folder}", "--length=20", f"--output={tmp_path / 'out'}"])
  assert "projection" not in export.read(tmp_path / "out").variables["params"]["encoder"]
  tensors = {f"module.{name}": tensor for name, tensor in open_weights(path).items()}
  write_safetensors(
    tmp_path / "module.safetensors", {n: (t.shape, t.dtype, t.read) for n, t in tensors.items()}
  )
  convert.main([f"--source={tmp_path / 'module.safetensors'}", f"--tokenizer={folder}",
                "--activation=gelu", f"--output={tmp_path / 'out'}"])
  assert export.read(tmp_path / "out").config.text.length == 20  # as many as it has positions
  card = (tmp_path / "out" / "README.md").read_text()
  assert "A text encoder of kind clip" in card and "t2i_jax.sample" not in card
  # A folder of both forms is Hugging Face's.
  both = tmp_path / "both"
  shutil.copytree(folder, both)
  (both / "open_clip_config.json").write_text("{}")
  convert.main([f"--source={both}", *flags])

  assert "is a file, which has no tokenizer" in fails(
    capfd, f"--source={path}", "--activation=gelu", *flags
  )
  assert "give --activation=quick_gelu for" in fails(
    capfd, f"--source={path}", f"--tokenizer={folder}", *flags
  )
  assert "says its own" in fails(capfd, f"--source={own}", "--activation=gelu", *flags)
  assert "--length=2 leaves no room" in fails(capfd, f"--source={folder}", "--length=2", flags[-1])
  assert "is an export already; with --to" in fails(capfd, f"--source={converted}", flags[-1])
  (own / "open_clip_config.json").write_text("{}")
  assert "is not of such a model (KeyError" in fails(capfd, f"--source={own}", *flags)
  write_safetensors(path, {"x": ((1,), np.dtype("f4"), lambda: np.zeros(1, "f4"))})
  assert "token_embedding.weight, positional_embedding" in fails(
    capfd, f"--source={path}", f"--tokenizer={folder}", "--activation=gelu", *flags
  )


@pytest.mark.parametrize("values", [
  {"hidden_size": "x"}, {"num_attention_heads": 0}, {"num_hidden_layers": None},
  {"vocab_size": None}, {"max_position_embeddings": None}, {"hidden_act": ["gelu"]},
  {"model_type": ["clip"]}, {"eos_token_id": None},
])  # fmt: skip
def test_configs_that_make_no_sense_are_one_line(folder, tmp_path, capfd, values):
  path = tmp_path / "folder"
  shutil.copytree(folder, path)
  published = json.loads((path / "config.json").read_text())
  (path / "config.json").write_text(json.dumps(published | values))
  line = fails(capfd, f"--source={path}", f"--output={tmp_path / 'out'}", "--project")
  assert str(path) in line or "is not known" in line


@pytest.mark.parametrize("name, text", [
  ("tokenizer.json", '{"model": {}}'), ("special_tokens_map.json", "[1]"),
  ("special_tokens_map.json", '{"eos_token": {"x": 1}}'),
])  # fmt: skip
def test_tokenizers_that_make_no_sense_are_one_line(folder, tmp_path, capfd, name, text):
  path = tmp_path / "folder"
  shutil.copytree(folder, path)
  (path / name).write_text(text)
  assert "tokenizer" in fails(capfd, f"--source={path}", f"--output={tmp_path / 'out'}")


def test_a_folder_is_no_export(folder, tmp_path):
  with pytest.raises(UserError, match="is a Hugging Face folder, not an export; make one of it"):
    export.read(folder)
