"""Our text encoders against transformers and diffusers: random weights through our key maps."""

import jax
import numpy as np
import pytest
import transformers

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

from random_weights import randomised, stored  # noqa: E402

from t2i_jax.text import bert, clip, t5  # noqa: E402
from t2i_jax.weights import text_encoders as maps  # noqa: E402

TOLERANCE = 1e-5  # of the largest value
LENGTH = 12
VOCAB, END = 100, 99


def loaded(network, key_map, model, *inputs):
  """Our variables with the reference's numbers."""
  abstract = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
  return {"params": key_map.load(stored(model.state_dict()), abstract, source="the reference")}


def captions(full=False):
  """Token ids [3, L] that end with the end-of-text token and are padded with it, and the mask."""
  random = np.random.default_rng(1)
  ids = random.integers(1, END, (3, LENGTH))
  lengths = np.array([LENGTH] * 3 if full else [LENGTH, 5, 2])
  at = np.arange(LENGTH)
  ids = np.where(at >= lengths[:, None] - 1, END, ids)
  return ids, at < lengths[:, None]


def assert_close(ours, reference, valid=None):
  ours, reference = np.asarray(ours), reference.detach().numpy()
  assert ours.shape == reference.shape
  scale = np.abs(reference).max()
  assert scale > 1e-3
  error = np.abs(ours - reference) / scale
  if valid is not None:
    error = error[valid]
  assert error.max() <= TOLERANCE, error.max()


CLIP_SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64)


def clip_reference(kind, activation):
  config = transformers.CLIPTextConfig(
    vocab_size=VOCAB, max_position_embeddings=LENGTH, hidden_act=activation, projection_dim=24,
    bos_token_id=0, eos_token_id=END, pad_token_id=1, **CLIP_SIZES,
  )  # fmt: skip
  model = randomised(kind(config))
  return model, clip.TextConfig.from_transformers(config.to_dict())


# Stable Diffusion 1's L, 2's H and XL's bigG differ in activation, layer, norm and projection.
@pytest.mark.parametrize("full", [False, True], ids=["padded", "full"])
@pytest.mark.parametrize("masked", [False, True], ids=["padding attended to", "masked"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_text(activation, masked, full):
  model, config = clip_reference(transformers.CLIPTextModelWithProjection, activation)
  ids, mask = captions(full)
  given = torch.from_numpy(mask.astype(int)) if masked else None
  expected = model(torch.from_numpy(ids), attention_mask=given, output_hidden_states=True)
  mask = mask if masked else None
  whole = clip.CLIPText(config)
  variables = loaded(whole, maps.CLIP_TEXT, model, ids, mask)
  # What padding holds is not compared where it is not attended to.
  valid = mask
  sequence, pooled = whole.apply(variables, ids, mask)
  assert_close(sequence, expected.last_hidden_state, valid)
  assert_close(pooled, expected.text_embeds)
  for layer in (0, 1, -1, -2):
    sequence, _ = clip.CLIPText(config, layer, final_norm=False).apply(variables, ids, mask)
    assert_close(sequence, expected.hidden_states[layer], valid)
  # The penultimate layer behind the last norm, as in Stable Diffusion 2, without running the last.
  sequence, none = clip.CLIPText(config, -2, pool=False).apply(variables, ids, mask)
  norm = getattr(model, 'text_model', model).final_layer_norm
  assert_close(sequence, norm(expected.hidden_states[-2]), valid)
  assert none is None


def test_clip_text_without_projection():
  model, config = clip_reference(transformers.CLIPTextModel, "quick_gelu")
  ids, _ = captions()
  network = clip.CLIPText(config, project=False)
  variables = loaded(network, maps.CLIP_TEXT, model, ids)
  assert_close(network.apply(variables, ids)[1], model(torch.from_numpy(ids)).pooler_output)


def test_clip_end_is_found_by_its_id():
  """Other tokenizers give higher ids than the end-of-text token's, among them added words'."""
  config = transformers.CLIPTextConfig(
    vocab_size=VOCAB, max_position_embeddings=LENGTH, projection_dim=24, eos_token_id=7,
    bos_token_id=0, pad_token_id=1, **CLIP_SIZES,
  )  # fmt: skip
  model = randomised(transformers.CLIPTextModelWithProjection(config))
  ids = np.full((2, LENGTH), 1)
  ids[0, :4], ids[1, :6] = [0, 98, 50, 7], [0, 3, 98, 20, 98, 7]
  network = clip.CLIPText(clip.TextConfig.from_transformers(config.to_dict()))
  variables = loaded(network, maps.CLIP_TEXT, model, ids)
  assert_close(network.apply(variables, ids)[1], model(torch.from_numpy(ids)).text_embeds)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_with_both_towers(activation):
  sizes = {**CLIP_SIZES, "hidden_act": activation}
  config = transformers.CLIPConfig(
    text_config=dict(vocab_size=VOCAB, max_position_embeddings=LENGTH, eos_token_id=END,
                     bos_token_id=0, pad_token_id=1, **sizes),
    vision_config=dict(image_size=24, patch_size=8, **sizes), projection_dim=20,
  )  # fmt: skip
  model = randomised(transformers.CLIPModel(config))
  given = config.to_dict()
  shared = {"projection_dim": 20}
  network = clip.CLIP(
    clip.TextConfig.from_transformers({**given["text_config"], **shared}),
    clip.VisionConfig.from_transformers({**given["vision_config"], **shared}),
  )
  (ids, mask), images = captions(), np.random.default_rng(2).normal(size=(2, 24, 24, 3))
  images = images.astype(np.float32)
  variables = loaded(network, maps.CLIP, model, images, ids, mask)
  pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  expected = model(torch.from_numpy(ids), pixels, torch.from_numpy(mask.astype(int)))
  assert_close(network.apply(variables, images, ids, mask), expected.logits_per_image)

  tower = randomised(transformers.CLIPVisionModelWithProjection(model.config.vision_config))
  network = clip.CLIPVision(
    clip.VisionConfig.from_transformers(model.config.vision_config.to_dict())
  )
  variables = loaded(network, maps.CLIP_VISION, tower, images)
  sequence, pooled = network.apply(variables, images)
  expected = tower(pixels)
  assert_close(sequence, expected.last_hidden_state)
  assert_close(pooled, expected.image_embeds)


# Lengths beyond the distances that have buckets of their own.
@pytest.mark.parametrize("length", [LENGTH, 200])
@pytest.mark.parametrize("masked", [False, True], ids=["padding attended to", "masked"])
@pytest.mark.parametrize("version", ["relu", "gated-gelu"])
def test_t5(version, masked, length):
  config = transformers.T5Config(
    vocab_size=VOCAB, d_model=24, d_kv=8, num_heads=4, d_ff=40, num_layers=3,
    feed_forward_proj=version,
  )  # fmt: skip
  model = randomised(transformers.T5EncoderModel(config))
  # T5 has no scale in its scores; with He-normal projections the softmax would be all or nothing.
  with torch.no_grad():
    for block in model.encoder.block:
      block.layer[0].SelfAttention.q.weight.mul_(0.2)
  ids = np.random.default_rng(0).integers(1, VOCAB, (3, length))
  mask = np.arange(length) < np.array([length, length // 2, 1])[:, None]
  expected = model(
    torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(int)) if masked else None
  ).last_hidden_state
  mask = mask if masked else None
  network = t5.T5Encoder(t5.Config.from_transformers(config.to_dict()))
  variables = loaded(network, maps.T5, model, ids, mask)
  assert_close(network.apply(variables, ids, mask), expected, mask)


def test_bert():
  config = transformers.BertConfig(
    vocab_size=VOCAB, max_position_embeddings=LENGTH, **CLIP_SIZES
  )
  model = randomised(transformers.BertModel(config))
  (ids, mask), random = captions(), np.random.default_rng(3)
  segments = random.integers(0, 2, ids.shape)
  network = bert.BERT(bert.Config.from_transformers(config.to_dict()))
  variables = loaded(network, maps.BERT, model, ids, mask)
  for given in (None, segments):
    expected = model(
      torch.from_numpy(ids), torch.from_numpy(mask.astype(int)),
      None if given is None else torch.from_numpy(given),
    )  # fmt: skip
    sequence, pooled = network.apply(variables, ids, mask, given)
    assert_close(sequence, expected.last_hidden_state, mask)
    assert_close(pooled, expected.pooler_output)


def test_latent_diffusion():
  pytest.importorskip("diffusers", reason="the reference is theirs: install t2i_jax[parity]")
  from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as reference

  config = reference.LDMBertConfig(
    vocab_size=VOCAB, max_position_embeddings=LENGTH, encoder_layers=3, encoder_ffn_dim=64,
    encoder_attention_heads=4, head_dim=8, d_model=24,
  )  # fmt: skip
  model = randomised(reference.LDMBertModel(config))
  ids, _ = captions()
  network = bert.LDMTransformer(bert.LDMConfig.from_diffusers(config.to_dict()))
  variables = loaded(network, maps.LDM_TEXT, model, ids)
  assert_close(network.apply(variables, ids), model(torch.from_numpy(ids)).last_hidden_state)
