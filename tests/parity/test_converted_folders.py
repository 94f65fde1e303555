"""Folders that transformers saves, converted, and the other way round: the same features."""

import json

import numpy as np
import pytest
import transformers

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

from tokenizers import Tokenizer as Backend  # noqa: E402
from tokenizers import models, pre_tokenizers, trainers  # noqa: E402

from t2i_jax import assembly, convert, export  # noqa: E402

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
PROMPTS = ["a red ring", "two small blue squares above a big yellow diamond on the left", ""]
LENGTH = 12


def trained(special, kind=models.BPE, trainer=trainers.BpeTrainer, **options):
  """A tokenizer's backend whose special tokens stand where the model's own has them."""
  backend = Backend(kind(**options))
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.train_from_iterator(PROMPTS * 4, trainer(
    vocab_size=90, special_tokens=special, show_progress=False
  ))
  return backend


def references():
  clip_tokens = transformers.PreTrainedTokenizerFast(
    tokenizer_object=trained(["<|startoftext|>", "<|endoftext|>"]), bos_token="<|startoftext|>",
    eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=LENGTH,
  )  # fmt: skip
  ids = dict(bos_token_id=0, eos_token_id=1, pad_token_id=1)
  yield "clip", clip_tokens, transformers.CLIPTextModelWithProjection(
    transformers.CLIPTextConfig(vocab_size=90, max_position_embeddings=LENGTH, projection_dim=24,
                                **ids, **SIZES)
  ), ("--project", "--layer=-2", "--no-final-norm")
  t5_tokens = transformers.PreTrainedTokenizerFast(
    tokenizer_object=trained(["<pad>", "</s>", "<unk>"]), eos_token="</s>", pad_token="<pad>",
    unk_token="<unk>", model_max_length=LENGTH,
  )  # fmt: skip
  yield "t5", t5_tokens, transformers.T5EncoderModel(transformers.T5Config(
    vocab_size=96, d_model=32, d_kv=8, num_heads=2, d_ff=48, num_layers=2,
    feed_forward_proj="gated-gelu",
  )), ("--masked",)  # fmt: skip
  bert_tokens = transformers.PreTrainedTokenizerFast(
    tokenizer_object=trained(["[PAD]", "[UNK]", "[CLS]", "[SEP]"], models.WordPiece,
                             trainers.WordPieceTrainer, unk_token="[UNK]"),
    cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]",
  )  # fmt: skip
  yield "bert", bert_tokens, transformers.BertModel(
    transformers.BertConfig(vocab_size=90, max_position_embeddings=LENGTH, **SIZES)
  ), ("--masked",)
  from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as latent_diffusion

  yield "ldm", bert_tokens, latent_diffusion.LDMBertModel(latent_diffusion.LDMBertConfig(
    vocab_size=90, max_position_embeddings=LENGTH, encoder_layers=2, encoder_ffn_dim=48,
    encoder_attention_heads=2, head_dim=8, d_model=32,
  )), ()  # fmt: skip


CASES = list(references())


@pytest.mark.parametrize("kind, tokens, model, flags", CASES, ids=[case[0] for case in CASES])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_folder_of_transformers(tmp_path, kind, tokens, model, flags, safe):
  folder = tmp_path / "folder"
  model = model.eval()
  model.save_pretrained(folder)
  tokens.save_pretrained(folder)
  if not safe:
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
  convert.main([f"--source={folder}", f"--output={tmp_path / 'export'}", f"--length={LENGTH}",
                *flags])
  exported = export.read(tmp_path / "export")
  (tokenizer,) = exported.tokenizers.of.values()
  text = tokenizer.encode(PROMPTS)
  # The markers, set by hand where the reference's tokenizer was made without a rule for them.
  ids, mask = torch.from_numpy(text["ids"]).long(), torch.from_numpy(text["mask"]).long()
  plain = [tokens(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
  start = int(tokenizer.start is not None)
  for row, (given, expected) in enumerate(zip(text["ids"], plain, strict=True)):
    room = LENGTH - start - 1
    assert given[start : start + len(expected[:room])].tolist() == expected[:room], PROMPTS[row]

  system = assembly.build_with(exported.config, exported.components)
  given = system.encode({"params": exported.variables["params"]}, text)
  with torch.no_grad():
    found = model(ids, attention_mask=mask if "--masked" in flags else None,
                  output_hidden_states=True)
  expected = found.hidden_states[-2] if kind == "clip" else found.last_hidden_state
  valid = text["mask"] if "--masked" in flags else np.ones_like(text["mask"])
  np.testing.assert_allclose(
    np.asarray(given.sequence)[valid], expected.numpy()[valid], rtol=1e-4, atol=1e-5
  )
  if kind == "clip":
    np.testing.assert_allclose(given.pooled, found.text_embeds, rtol=1e-4, atol=1e-5)

  back = tmp_path / "back"
  convert.main([f"--source={tmp_path / 'export'}", f"--output={back}", "--to=huggingface"])
  again = type(model).from_pretrained(back).eval()
  for name, value in model.state_dict().items():
    # Latent diffusion's head, which writes text, is not read.
    assert name.startswith("to_logits.") or torch.equal(again.state_dict()[name], value), name
  assert json.loads((back / "config.json").read_text())["model_type"] == model.config.model_type
