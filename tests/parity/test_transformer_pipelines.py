"""Pipelines whose network is a transformer against diffusers: random weights, read by both."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")
diffusers = pytest.importorskip("diffusers", reason="the reference: install t2i_jax[parity]")
transformers = pytest.importorskip("transformers", reason="install t2i_jax[parity]")

from diffusers.pipelines.dit import pipeline_dit  # noqa: E402
from random_weights import randomised  # noqa: E402
from test_pipelines import (  # noqa: E402
  ENDS,
  PROMPTS,
  SIDE,
  STEPS,
  assert_same_numbers,
  tensors,
  text_encoder,
  tokenizer,
)

import t2i_jax  # noqa: E402
from t2i_jax import convert, export  # noqa: E402
from t2i_jax.diffusion.solvers import start_noise  # noqa: E402
from t2i_jax.systems import base  # noqa: E402

CONTEXT, T5_TOKENS, SEED = 160, 24, 1
SMALL = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
         "sample_size": SIDE // 2}  # fmt: skip
LATENTS = {"SD3": 16, "SD3 without T5": 16, "DiT": 4, "PixArt-alpha": 4}
GUIDANCE = 4.0


def vae(channels, **settings):
  return diffusers.AutoencoderKL(
    block_out_channels=(32, 64), layers_per_block=1, sample_size=SIDE, latent_channels=channels,
    down_block_types=2 * ("DownEncoderBlock2D",), up_block_types=2 * ("UpDecoderBlock2D",),
    **settings,
  )  # fmt: skip


def t5():
  """T5's encoder, and a tokenizer of words."""
  letters = sorted(set("".join(PROMPTS)) - {" "})
  known = ["<pad>", "</s>", "<unk>", "\u2581", *letters, "\u2581red", "\u2581blue", "ring"]
  words = transformers.T5Tokenizer(vocab=[(word, -float(i)) for i, word in enumerate(known)],
                                   extra_ids=0, model_max_length=T5_TOKENS)  # fmt: skip
  model = transformers.T5EncoderModel(transformers.T5Config(
    vocab_size=len(words), d_model=CONTEXT, d_kv=16, num_heads=2, d_ff=64, num_layers=2,
    feed_forward_proj="gated-gelu",
  ))  # fmt: skip
  return randomised(model), words


def stable_diffusion_3(with_t5):
  torch.manual_seed(0)
  first, second = tokenizer(ENDS[1]), tokenizer("!")
  third, words = t5() if with_t5 else (None, None)
  return diffusers.StableDiffusion3Pipeline(
    transformer=randomised(diffusers.SD3Transformer2DModel(
      **SMALL, joint_attention_dim=CONTEXT, caption_projection_dim=24, pooled_projection_dim=64,
      in_channels=16, out_channels=16, pos_embed_max_size=6, qk_norm="rms_norm",
      dual_attention_layers=(0,),
    )),
    scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    vae=vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
            use_post_quant_conv=False),
    text_encoder=text_encoder(first, "quick_gelu", projected=True), tokenizer=first,
    text_encoder_2=text_encoder(second, "gelu", projected=True), tokenizer_2=second,
    text_encoder_3=third, tokenizer_3=words,
  )  # fmt: skip


def dit():
  """DiT's, with the authors' frequencies; see `weights.dit.diffusers_map`."""
  torch.manual_seed(0)
  model = randomised(diffusers.DiTTransformer2DModel(
    **SMALL, in_channels=4, out_channels=8, num_embeds_ada_norm=1000, norm_eps=1e-6
  ))  # fmt: skip
  first = model.transformer_blocks[0].norm1.emb
  for block in model.transformer_blocks:
    block.norm1.emb.load_state_dict(first.state_dict())
  scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
  return diffusers.DiTPipeline(
    model, vae(4, scaling_factor=0.18215), scheduler, id2label={207: "golden retriever"}
  )


def pixart():
  torch.manual_seed(0)
  encoder, words = t5()
  return diffusers.PixArtAlphaPipeline(
    words, encoder, vae(4, scaling_factor=0.18215),
    randomised(diffusers.PixArtTransformer2DModel(
      **SMALL, in_channels=4, out_channels=8, cross_attention_dim=24, caption_channels=CONTEXT,
      use_additional_conditions=False, interpolation_scale=1,
    )),
    diffusers.DPMSolverMultistepScheduler(prediction_type="v_prediction"),
  )  # fmt: skip


PIPELINES = {
  "SD3": lambda: stable_diffusion_3(True), "SD3 without T5": lambda: stable_diffusion_3(False),
  "DiT": dit, "PixArt-alpha": pixart,
}  # fmt: skip


@pytest.fixture(scope="module", params=PIPELINES)
def case(request, tmp_path_factory):
  """A name, its pipeline, the folder that diffusers writes, our export, and our folder of it."""
  place = tmp_path_factory.mktemp("pipeline")
  made = PIPELINES[request.param]()
  made.save_pretrained(place / "folder")
  length = [f"--length={T5_TOKENS}"] * (request.param != "DiT")
  convert.main([f"--source={place / 'folder'}", f"--output={place / 'export'}", *length])
  convert.main([f"--source={place / 'export'}", f"--output={place / 'back'}", "--to=diffusers"])
  return request.param, made, place


def loaded(made, folder):
  """Diffusers' pipeline of a folder; what is left out must be said to it again."""
  left_out = {part: None for part in ("text_encoder_3", "tokenizer_3")
              if part in made.components and getattr(made, part) is None}  # fmt: skip
  return type(made).from_pretrained(folder, local_files_only=True, **left_out)


def test_the_folder_comes_back_number_by_number(case):
  name, made, place = case
  back, folder = tensors(place / "back"), tensors(place / "folder")
  for found in (back, folder):
    # Computed, there with fewer digits; and a second name of the tokens.
    found.pop("transformer/pos_embed.pos_embed", None)
    found.pop("text_encoder_3/encoder.embed_tokens.weight", None)
    found.pop("text_encoder/encoder.embed_tokens.weight", None)
  assert_same_numbers(back, folder)
  ours, theirs = (json.loads((place / at / "transformer" / "config.json").read_text())
                  for at in ("back", "folder"))  # fmt: skip
  assert all(theirs[key] == value for key, value in ours.items())
  again = loaded(made, place / "back")
  assert set(again.components) == set(made.components)
  assert type(again.scheduler) is type(made.scheduler)
  for setting in ("shift", "num_train_timesteps", "prediction_type", "timestep_spacing"):
    assert again.scheduler.config.get(setting) == made.scheduler.config.get(setting)
  for part in ("tokenizer", "tokenizer_2", "tokenizer_3"):
    given = getattr(made, part, None)
    if given is not None:
      ids = getattr(again, part)(PROMPTS, padding="max_length", truncation=True).input_ids
      assert ids == given(PROMPTS, padding="max_length", truncation=True).input_ids


def drawn_by_diffusers(name, made, noise, monkeypatch):
  made.set_progress_bar_config(disable=True)
  noise = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
  shared = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "np"}
  if name == "DiT":
    for block in made.transformer.transformer_blocks:
      block.norm1.emb.time_proj.downscale_freq_shift = 0
    monkeypatch.setattr(pipeline_dit, "randn_tensor", lambda *_, **__: noise)
    return 255 * made([207, 3], **shared).images
  own = {"clean_caption": False, "use_resolution_binning": False} if "Pix" in name else {}
  return 255 * made(
    PROMPTS, latents=noise, height=SIDE, width=SIDE, max_sequence_length=T5_TOKENS, **shared, **own
  ).images


def test_pictures_are_the_same(case, monkeypatch):
  """By the reference, by our export of its folder, and by the reference of our folder."""
  name, made, place = case
  exported = export.read(place / "export")
  options = {**exported.config.sample.options.to_dict(), "steps": STEPS, "guidance": GUIDANCE}
  prompts = ["207", "3"] if name == "DiT" else PROMPTS
  ours = t2i_jax.load(place / "export")(prompts, seed=SEED, **options).astype(float)
  keys = base.picture_keys(jnp.uint32(SEED), jnp.arange(2))
  noise = np.asarray(start_noise(keys, (SIDE // 2, SIDE // 2, LATENTS[name])))
  theirs = drawn_by_diffusers(name, made, noise, monkeypatch)
  assert np.abs(ours - theirs).max() <= 2
  # The prompts, the guidance and the noise matter.
  assert np.std(theirs) > 10
  again = loaded(made, place / "back")
  assert np.abs(drawn_by_diffusers(name, again, noise, monkeypatch) - ours).max() <= 2
