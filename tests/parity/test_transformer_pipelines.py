"""Pipelines whose network is a transformer against diffusers: random weights, read by both."""

import json
import shutil

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
  fails,
  tensors,
  text_encoder,
  tokenizer,
)

import t2i_jax  # noqa: E402
from t2i_jax import convert, export  # noqa: E402
from t2i_jax.diffusion.solvers import start_noise  # noqa: E402
from t2i_jax.systems import trees  # noqa: E402
from t2i_jax.systems.randomness import picture_keys  # noqa: E402
from t2i_jax.weights.safetensors_file import write_safetensors  # noqa: E402
from t2i_jax.weights.stored import open_weights  # noqa: E402

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
  keys = picture_keys(jnp.uint32(SEED), jnp.arange(2))
  noise = np.asarray(start_noise(keys, (SIDE // 2, SIDE // 2, LATENTS[name])))
  theirs = drawn_by_diffusers(name, made, noise, monkeypatch)
  assert np.abs(ours - theirs).max() <= 2
  # The prompts, the guidance and the noise matter.
  assert np.std(theirs) > 10
  again = loaded(made, place / "back")
  assert np.abs(drawn_by_diffusers(name, again, noise, monkeypatch) - ours).max() <= 2


def saved(path, held):
  write_safetensors(path, {name: (t.shape, t.dtype, t.read) for name, t in held.items()})
  return path


def assert_same_export(found, expected):
  found, expected = export.read(found), export.read(expected)
  numbers, wanted = trees.flatten(found.variables), trees.flatten(expected.variables)
  assert set(numbers) == set(wanted)
  for key, value in wanted.items():
    assert np.asarray(numbers[key]).tobytes() == np.asarray(value).tobytes(), key
  for section in ("model", "text", "sample"):
    assert found.config[section] == expected.config[section]
  assert found.tokenizers == expected.tokenizers


def test_one_file_of_stable_diffusion_3(case, capfd):
  """In the layout that diffusers' own conversion reads, and ours again, with what it lacks."""
  from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_sd3_t5_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
  )

  name, made, place = case
  if not name.startswith("SD3"):
    pytest.skip("of Stable Diffusion 3")
  path = place / "model.safetensors"
  convert.main([f"--source={place / 'export'}", f"--output={path}", "--to=single_file"])
  file = open_weights(path)
  held = {key: torch.from_numpy(tensor.read()) for key, tensor in file.items()}
  encoders = [
    (made.text_encoder, lambda held: convert_ldm_clip_checkpoint(
      held, "text_encoders.clip_l.transformer.")),
    (made.text_encoder_2, lambda held: convert_ldm_clip_checkpoint(
      held, "text_encoders.clip_g.transformer.")),
    (made.text_encoder_3, convert_sd3_t5_checkpoint_to_diffusers),
  ]  # fmt: skip
  for model, convert_back in (
    (made.transformer, convert_sd3_transformer_checkpoint_to_diffusers),
    (made.vae, lambda held: convert_ldm_vae_checkpoint(held, made.vae.config)), *encoders,
  ):  # fmt: skip
    converted = {
      key.removeprefix("text_model."): value
      for key, value in (convert_back(dict(held)) if model else {}).items()
    }
    for key, value in model.state_dict().items() if model else ():
      if not key.endswith(("position_ids", "embed_tokens.weight")):
        expected = converted[key.removeprefix("text_model.")]
        np.testing.assert_allclose(value, expected, atol=1e-5 * key.startswith("pos_embed"))
  flags = [f"--parts={place / 'folder'}", f"--resolution={SIDE}", f"--length={T5_TOKENS}"]
  convert.main([f"--source={path}", f"--output={place / 'again'}", *flags])
  assert_same_export(place / "again", place / "export")
  # As the file without any text encoder was published.
  bare = {key: tensor for key, tensor in file.items() if not key.startswith("text_encoders.")}
  saved(place / "bare.safetensors", bare)
  convert.main([f"--source={place / 'bare.safetensors'}", f"--output={place / 'again'}", *flags])
  assert_same_export(place / "again", place / "export")
  shutil.rmtree(place / "again")
  new = [f"--output={place / 'new'}", *flags[1:]]
  message = fails(capfd, f"--source={path}", *new)
  assert "has no tokenizer: name the folder of a pipeline of diffusers" in message
  del bare["model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.bias"]
  saved(path, bare)
  message = fails(capfd, f"--source={path}", *new, flags[0])
  assert "missing (1) model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.bias" in message
  assert not (place / "new").exists()


def test_what_is_no_such_pipeline_is_one_line(case, tmp_path, capfd):
  name, _, place = case
  copy, new = shutil.copytree(place / "folder", tmp_path / "copy"), f"--output={tmp_path / 'new'}"

  def wrong(message, part="transformer/config.json", **values):
    given = json.loads((place / "folder" / part).read_text())
    (copy / part).write_text(json.dumps({**given, **values}))
    assert message in fails(capfd, f"--source={copy}", new)
    (copy / part).write_text(json.dumps(given))

  if name == "SD3":
    wrong("caption_projection_dim=9 is not known, only with 24", caption_projection_dim=9)
    wrong("dual_attention_layers=[1] is not known", dual_attention_layers=[1])
    wrong("with qk_norm=layer_norm is not known", qk_norm="layer_norm")
    wrong("with flux=3 is not known", flux=3)
    wrong("use_dynamic_shifting=True is not known", "scheduler/scheduler_config.json",
          use_dynamic_shifting=True)
    wrong("without one of its text encoders", "model_index.json", text_encoder_2=[None, None])
    shutil.rmtree(copy / "text_encoder_3")
    wrong("it has no folder text_encoder_3; copy it there, or write [null, null]", num_layers=2)
  if name == "PixArt-alpha":
    wrong("use_additional_conditions=True is not known", use_additional_conditions=True)
  if name == "DiT":
    wrong("of class FluxTransformer2DModel is not known", _class_name="FluxTransformer2DModel")
    wrong("of another shape", num_embeds_ada_norm=5)
    # As the published config is called.
    given = json.loads((copy / "transformer" / "config.json").read_text())
    (copy / "transformer" / "config.json").write_text(
      json.dumps({**given, "_class_name": "Transformer2DModel"})
    )
    convert.main([f"--source={copy}", new])
    assert_same_export(tmp_path / "new", place / "export")
  else:
    assert not (tmp_path / "new").exists()
