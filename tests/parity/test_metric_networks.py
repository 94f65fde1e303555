"""Metrics of whole pictures through public folders, against the published formulas in torch."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

from PIL import Image  # noqa: E402
from test_clip_folders import PROMPTS, SIDE, made  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402

from t2i_jax.feature_networks import Networks  # noqa: E402
from t2i_jax.metrics import registry  # noqa: E402
from t2i_jax.metrics.reference import Reference  # noqa: E402
from t2i_jax.parallel.mesh import make_mesh  # noqa: E402
from t2i_jax.text.clip import DEVIATION, MEAN  # noqa: E402


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  model = made(folder)
  mesh = make_mesh({"data": -1}, jax.devices()[:1])
  return model, PreTrainedTokenizerFast.from_pretrained(folder), Networks(
    {"clip-vit": folder}, mesh, batch_size=4
  )  # fmt: skip


def pictures(n, seed):
  random = np.random.default_rng(seed)
  return np.clip(random.integers(0, 256, (n, 1, 1, 3)) + random.integers(-90, 90, (n, 30, 30, 3)),
                 0, 255).astype(np.uint8)  # fmt: skip


def seen(model, levels):
  """Unit vectors by transformers of pictures [N, side, side, 3] with values to 255."""
  x = (np.asarray(levels) / 255 - MEAN) / DEVIATION
  with torch.no_grad():
    found = model.visual_projection(model.vision_model(
      torch.from_numpy(x.transpose(0, 3, 1, 2).astype("f4"))
    ).pooler_output).numpy()  # fmt: skip
  return found / np.linalg.norm(found, axis=1, keepdims=True)


def read(model, tokenizer, captions):
  given = [[tokenizer.bos_token_id, *tokenizer(c, add_special_tokens=False)["input_ids"][:10],
            tokenizer.eos_token_id] for c in captions]  # fmt: skip
  found = []
  for ids in given:
    with torch.no_grad():
      pooled = model.text_model(torch.tensor([ids])).pooler_output
      found.append(model.text_projection(pooled)[0].numpy())
  return np.stack([x / np.linalg.norm(x) for x in found])


def test_clip_score_and_cosine_are_the_formulas_on_transformers(clip):
  model, tokenizer, networks = clip
  images, captions = pictures(3, 0), PROMPTS[:2] + ["a blue ring"]
  small = [Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
           for image in images]  # fmt: skip
  vectors = seen(model, np.stack(small))
  scores = registry.make(["clip_score", "clip_cosine"], networks)
  scores.update(images, captions=captions)
  found = scores.results()
  cosines = np.sum(vectors * read(model, tokenizer, captions), axis=1)
  np.testing.assert_allclose(found["clip_cosine"].value, 100 * cosines.mean(), atol=1e-3)
  prefixed = read(model, tokenizer, ["A photo depicts " + caption for caption in captions])
  expected = 2.5 * np.maximum(np.sum(vectors * prefixed, axis=1), 0)
  np.testing.assert_allclose(found["clip_score"].value, expected.mean(), atol=1e-5)
  assert np.abs(prefixed - read(model, tokenizer, captions)).max() > 0.01


def test_cmmd_is_the_formula_on_transformers(clip):
  model, _, networks = clip
  fake, real = pictures(6, 1), pictures(8, 2)
  features = registry.reference_networks(["cmmd"], networks)["clip-vit"]
  reference = Reference.measure(features, [real], "noise", rows=True)
  scores = registry.make(["cmmd"], networks, {"clip-vit": reference})
  scores.update(fake)
  x, y = (seen(model, jax.image.resize(z.astype("f4"), (len(z), SIDE, SIDE, 3), "bicubic"))
          for z in (fake, real))  # fmt: skip

  def mean(a, b):
    return np.exp(-torch.cdist(*map(torch.from_numpy, (a, b))).double().numpy() ** 2 / 200).mean()

  expected = 1000 * (mean(x, x) + mean(y, y) - 2 * mean(x, y))
  assert expected > 0.1
  np.testing.assert_allclose(scores.results()["cmmd"].value, expected, rtol=1e-4)
