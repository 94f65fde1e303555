"""CLIP with both towers: folders of transformers, converted, and the other way round."""

import json

import numpy as np
import pytest
import transformers

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

from PIL import Image  # noqa: E402
from random_weights import randomised  # noqa: E402
from tokenizers import Tokenizer as Backend  # noqa: E402
from tokenizers import models, pre_tokenizers, trainers  # noqa: E402

from t2i_jax import assembly, convert, export  # noqa: E402
from t2i_jax.systems.text.clip import TOWERS  # noqa: E402
from t2i_jax.text import clip  # noqa: E402

PROMPTS = ["a red ring", "two small blue squares above a big yellow diamond on the left", ""]
LENGTH, SIDE, SIZE = 12, 16, 90
ENDS = ["<|startoftext|>", "<|endoftext|>"]


def made(folder, end=SIZE - 1):
  """A CLIP with random weights and the activation of OpenAI's, saved with its tokenizer."""
  backend = Backend(models.BPE())
  backend.pre_tokenizer = pre_tokenizers.Whitespace()
  backend.train_from_iterator(PROMPTS * 4, trainers.BpeTrainer(
    vocab_size=SIZE - 2, show_progress=False
  ))  # fmt: skip
  size = backend.get_vocab_size() + 2
  backend.add_special_tokens(ENDS)
  transformers.PreTrainedTokenizerFast(
    tokenizer_object=backend, bos_token=ENDS[0], eos_token=ENDS[1], pad_token=ENDS[1],
    model_max_length=LENGTH,
  ).save_pretrained(folder)
  shared = dict(num_hidden_layers=2, num_attention_heads=2, hidden_act="quick_gelu")
  model = randomised(transformers.CLIPModel(transformers.CLIPConfig(
    text_config=dict(
      hidden_size=32, intermediate_size=128, vocab_size=size, max_position_embeddings=LENGTH,
      bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1, **shared,
    ),
    vision_config=dict(
      hidden_size=48, intermediate_size=80, image_size=SIDE, patch_size=4, **shared
    ),
    projection_dim=24,
  )))  # fmt: skip
  model.save_pretrained(folder)
  return model


def test_embeddings_and_logits_are_the_same_and_so_is_the_folder_that_comes_back(tmp_path):
  model = made(tmp_path / "folder")
  convert.main([f"--source={tmp_path / 'folder'}", f"--output={tmp_path / 'export'}",
                "--towers=both"])
  exported = export.read(tmp_path / "export")
  system = assembly.build_with(exported.config, exported.components)
  variables = {"params": exported.variables["params"]}
  text = next(iter(exported.tokenizers.of.values())).encode(PROMPTS)
  pictures = np.random.default_rng(0).uniform(-1, 1, (3, SIDE, SIDE, 3)).astype("f4")
  prepared = np.asarray(clip.prepared(pictures, SIDE))
  given = dict(
    input_ids=torch.from_numpy(text["ids"]).long(),
    pixel_values=torch.from_numpy(prepared.transpose(0, 3, 1, 2).copy()),
  )
  with torch.no_grad():
    expected = model(**given)
  seen, read = system.embed_images(variables, pictures), system.embed_text(variables, text)
  np.testing.assert_allclose(seen, expected.image_embeds, atol=1e-5)
  np.testing.assert_allclose(read, expected.text_embeds, atol=1e-5)
  scale = np.exp(variables["params"][TOWERS]["logit_scale"])
  logits = expected.logits_per_image.numpy()
  np.testing.assert_allclose(scale * seen @ read.T, logits, atol=1e-4 * np.abs(logits).max())
  assert np.std(logits) > 0.1
  # What other systems take of it as their text encoder.
  null, empty = system.null_text(), {name: value[2] for name, value in text.items()}
  assert all(np.array_equal(null[name], empty[name]) for name in null)

  back = tmp_path / "back"
  convert.main([f"--source={tmp_path / 'export'}", f"--output={back}", "--to=huggingface"])
  again = transformers.CLIPModel.from_pretrained(back).eval()
  state = again.state_dict()
  assert set(state) == set(model.state_dict())
  assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
  with torch.no_grad():
    torch.testing.assert_close(again(**given).logits_per_image, expected.logits_per_image)
  tokens = transformers.CLIPTokenizer.from_pretrained(back)
  assert tokens.eos_token_id == exported.config.model.end
  prepared = json.loads((back / "preprocessor_config.json").read_text())
  assert prepared["crop_size"] == {"height": SIDE, "width": SIDE}


def test_pictures_are_made_smaller_as_by_pillow():
  """Which CLIP's own preparation uses, with bicubic interpolation over what a pixel covers."""
  at = np.arange(48) / 48
  wave = 0.5 + 0.3 * np.sin(9 * at[:, None] + 7 * at[None, :])
  picture = np.stack([wave, wave.T, 1 - wave], axis=-1)
  picture = np.round(255 * picture).astype(np.uint8)
  smaller = np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.BICUBIC), float) / 255
  expected = (smaller - clip.MEAN) / clip.DEVIATION
  ours = clip.prepared(picture[None] / 127.5 - 1, SIDE)[0]
  # Pillow rounds to 256 levels, and once for each axis.
  assert np.abs(ours - expected).max() <= 1.2 / 255 / min(clip.DEVIATION)
