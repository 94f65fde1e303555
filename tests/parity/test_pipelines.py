"""Whole pipelines against diffusers: random weights, written by either, read by both."""

import functools
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")
diffusers = pytest.importorskip("diffusers", reason="the reference: install t2i_jax[parity]")
transformers = pytest.importorskip("transformers", reason="install t2i_jax[parity]")

from tokenizers import Tokenizer as Backend  # noqa: E402
from tokenizers import models, pre_tokenizers, trainers  # noqa: E402

import t2i_jax  # noqa: E402
from t2i_jax import convert, export  # noqa: E402
from t2i_jax.diffusion.solvers import start_noise  # noqa: E402
from t2i_jax.systems import trees  # noqa: E402
from t2i_jax.systems.randomness import picture_keys  # noqa: E402
from t2i_jax.weights.stored import open_weights  # noqa: E402

PROMPTS = ["a red ring", "two small blue squares above a big yellow diamond on the left"]
LENGTH, WIDTH, SIDE = 16, 64, 16
STEPS, GUIDANCE, SEED = 20, 7.5, 1
ENDS = ["<|startoftext|>", "<|endoftext|>"]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SCHEDULE = {"beta_schedule": "scaled_linear", "beta_start": 8.5e-4, "beta_end": 0.012,
            "steps_offset": 1}  # fmt: skip
UNET = {
  "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": SIDE // 2,
  "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": WIDTH,
}  # fmt: skip
UNETS = {
  "SD1": UNET,
  "LDM": UNET,
  "SD2": {**UNET, "use_linear_projection": True, "attention_head_dim": [1, 1],
          "block_out_channels": (64, 64)},
  "SDXL": {
    **UNET, "use_linear_projection": True, "attention_head_dim": [1, 1],
    "transformer_layers_per_block": [1, 2], "cross_attention_dim": 2 * WIDTH,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 32 + 6 * 256,
  },
}  # fmt: skip
SCHEDULERS = {
  # As published: PNDM of version 1, DDIM of version 2 and latent diffusion, Euler of XL.
  "LDM": lambda: diffusers.DDIMScheduler(
    **{**SCHEDULE, "steps_offset": 0}, clip_sample=False
  ),
  "SD1": lambda: diffusers.PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
  "SD2": lambda: diffusers.DDIMScheduler(
    **SCHEDULE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction"
  ),
  "SDXL": lambda: diffusers.EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
}
SCALES = {"LDM": 0.18215, "SD1": 0.18215, "SD2": 0.18215, "SDXL": 0.13025}


@functools.cache
def words():
  """Vocabulary and merges of CLIP's kind. Its trainer orders what is as frequent by chance."""
  backend = Backend(models.BPE(end_of_word_suffix="</w>"))
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  backend.train_from_iterator(PROMPTS * 4, trainers.BpeTrainer(
    vocab_size=600, initial_alphabet=ALPHABET, end_of_word_suffix="</w>", show_progress=False
  ))
  model = json.loads(backend.to_str())["model"]
  known = [*model["vocab"], *(f"{letter}</w>" for letter in ALPHABET)]
  vocabulary = {word: i for i, word in enumerate([*dict.fromkeys(known), *ENDS])}
  return vocabulary, [tuple(pair) for pair in model["merges"]]


def tokenizer(pad):
  vocabulary, merges = words()
  return transformers.CLIPTokenizer(
    vocab=dict(vocabulary), merges=list(merges), model_max_length=LENGTH, pad_token=pad
  )


def text_encoder(tokens, activation, projected=False):
  size = len(tokens)
  kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
  return kind(transformers.CLIPTextConfig(
    vocab_size=size, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=1,
    intermediate_size=96, max_position_embeddings=LENGTH, hidden_act=activation,
    projection_dim=32 if projected else WIDTH, bos_token_id=size - 2, eos_token_id=size - 1,
    pad_token_id=tokens.pad_token_id,
  ))  # fmt: skip


def bert():
  """Latent diffusion's text encoder, and its tokenizer."""
  from diffusers.pipelines.latent_diffusion import pipeline_latent_diffusion as latent_diffusion

  special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  letters = sorted(set("".join(PROMPTS)) - {" "})
  known = [*special, *letters, *(f"##{letter}" for letter in letters), "red", "ring", "blue"]
  config = latent_diffusion.LDMBertConfig(
    vocab_size=len(known), max_position_embeddings=77, encoder_layers=2, encoder_ffn_dim=96,
    encoder_attention_heads=2, head_dim=64, d_model=WIDTH,
  )  # fmt: skip
  return {
    "bert": latent_diffusion.LDMBertModel(config).eval(),
    "tokenizer": transformers.BertTokenizer(
      vocab={word: i for i, word in enumerate(known)}, model_max_length=77
    ),
  }  # fmt: skip


def pipeline(name):
  """Diffusers' pipeline with random weights."""
  torch.manual_seed(0)
  parts = {
    "unet": diffusers.UNet2DConditionModel(**UNETS[name]),
    "vae": diffusers.AutoencoderKL(
      block_out_channels=(32, 64), layers_per_block=1, sample_size=SIDE, norm_num_groups=32,
      down_block_types=2 * ("DownEncoderBlock2D",), up_block_types=2 * ("UpDecoderBlock2D",),
      scaling_factor=SCALES[name],
    ),
    "scheduler": SCHEDULERS[name](),
  }  # fmt: skip
  if name == "LDM":
    vae = parts.pop("vae")
    return diffusers.LDMTextToImagePipeline(**parts, vqvae=vae, **bert())
  absent = {"feature_extractor": None, "image_encoder": None}
  if name == "SDXL":
    first, second = tokenizer(ENDS[1]), tokenizer("!")
    return diffusers.StableDiffusionXLPipeline(
      **parts, **absent, tokenizer=first, tokenizer_2=second,
      text_encoder=text_encoder(first, "quick_gelu"),
      text_encoder_2=text_encoder(second, "gelu", projected=True),
    )  # fmt: skip
  tokens = tokenizer(ENDS[1] if name == "SD1" else "!")
  return diffusers.StableDiffusionPipeline(
    **parts, **absent, tokenizer=tokens, safety_checker=None, requires_safety_checker=False,
    text_encoder=text_encoder(tokens, "quick_gelu" if name == "SD1" else "gelu"),
  )  # fmt: skip


@pytest.fixture(scope="module", params=list(UNETS))
def case(request, tmp_path_factory):
  """A version's name, its pipeline, the folder that diffusers writes, and our export of it."""
  place = tmp_path_factory.mktemp("pipeline")
  made = pipeline(request.param)
  made.save_pretrained(place / "folder")
  convert.main([f"--source={place / 'folder'}", f"--output={place / 'export'}"])
  return request.param, made, place


def tensors(folder):
  """All numbers of a folder's parts, in one spelling of CLIP's names."""
  found = {}
  for part in sorted(path for path in folder.iterdir() if path.is_dir()):
    if list(part.glob("*.safetensors")):
      for name, tensor in open_weights(part).items():
        # The head of latent diffusion's, which writes text, is not read.
        if not name.startswith("to_logits."):
          found[f"{part.name}/{name.removeprefix('text_model.')}"] = tensor
  return found


def assert_same_numbers(found, expected):
  assert set(found) == set(expected)
  for name, tensor in expected.items():
    assert found[name].read().tobytes() == tensor.read().tobytes(), name


def test_the_folder_comes_back_number_by_number(case):
  name, made, place = case
  convert.main([f"--source={place / 'export'}", f"--output={place / 'back'}", "--to=diffusers"])
  assert_same_numbers(tensors(place / "back"), tensors(place / "folder"))
  again = type(made).from_pretrained(place / "back", local_files_only=True)
  for part, model in made.components.items():
    if hasattr(model, "state_dict"):
      ours, theirs = getattr(again, part).state_dict(), model.state_dict()
      assert all(
        torch.equal(ours[key], theirs[key]) for key in theirs if not key.startswith("to_logits.")
      ), part
    if part.startswith("tokenizer"):
      ids = getattr(again, part)(PROMPTS, padding="max_length", truncation=True).input_ids
      assert ids == model(PROMPTS, padding="max_length", truncation=True).input_ids
  kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type",
          "timestep_spacing", "steps_offset", "set_alpha_to_one")  # fmt: skip
  assert type(again.scheduler) is type(made.scheduler)
  for setting in kept:
    ours, theirs = again.scheduler.config.get(setting), made.scheduler.config.get(setting)
    assert ours == pytest.approx(theirs) if isinstance(theirs, float) else ours == theirs, setting


def test_one_file_holds_the_same(case):
  """In the layout that diffusers' own conversion reads, and ours again."""
  from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
  )

  name, made, place = case
  path = place / "model.safetensors"
  convert.main([f"--source={place / 'export'}", f"--output={path}", "--to=single_file"])
  held = {key: torch.from_numpy(tensor.read()) for key, tensor in open_weights(path).items()}
  for convert_back, model in (
    (convert_ldm_unet_checkpoint, made.unet),
    (convert_ldm_vae_checkpoint, made.vqvae if name == "LDM" else made.vae),
  ):
    converted = convert_back(dict(held), model.config)
    state = model.state_dict()
    assert set(converted) == set(state)
    assert all(torch.equal(converted[key], value) for key, value in state.items())
  of_clip = lambda encoder: convert_ldm_clip_checkpoint(dict(held))  # noqa: E731
  encoder = getattr(made, "text_encoder", None)
  encoders = {
    "LDM": [],  # the package has no converter of it; see below
    "SD1": [(encoder, of_clip)],
    "SD2": [(encoder, lambda encoder: convert_open_clip_checkpoint(encoder, dict(held)))],
    "SDXL": [
      (encoder, of_clip),
      (getattr(made, "text_encoder_2", None), lambda encoder: convert_open_clip_checkpoint(
        encoder, dict(held), prefix="conditioner.embedders.1.model."
      )),
    ],
  }[name]  # fmt: skip
  if name == "LDM":  # some names of the second layer
    own, second = made.bert.state_dict(), "cond_stage_model.transformer.attn_layers.layers."
    for key, theirs in (
      ("2.1.to_k.weight", "self_attn.k_proj.weight"), ("3.1.net.0.0.bias", "fc1.bias"),
      ("2.0.weight", "self_attn_layer_norm.weight"), ("3.0.bias", "final_layer_norm.bias"),
    ):
      assert torch.equal(held[second + key], own[f"model.layers.1.{theirs}"])
  for encoder, convert_back in encoders:
    converted = {
      key.removeprefix("text_model."): value for key, value in convert_back(encoder).items()
    }
    for key, value in encoder.state_dict().items():
      assert torch.equal(converted[key.removeprefix("text_model.")], value), key

  flags = ["--prediction=v"] if name == "SD2" else []
  convert.main([f"--source={path}", f"--output={place / 'again'}", f"--resolution={SIDE}",
                f"--tokenizer={place / 'folder' / 'tokenizer'}", *flags])
  again, first = export.read(place / "again"), export.read(place / "export")
  numbers, expected = trees.flatten(again.variables), trees.flatten(first.variables)
  # What a text encoder that reads no projection is not given.
  assert set(numbers) == set(expected)
  for key, value in expected.items():
    assert np.asarray(numbers[key]).tobytes() == np.asarray(value).tobytes(), key
  assert again.config.model == first.config.model
  assert again.tokenizers.of.keys() == first.tokenizers.of.keys()
  for part, tokens in first.tokenizers.of.items():
    mine, theirs = (given.encode(PROMPTS)["ids"] for given in (again.tokenizers.of[part], tokens))
    np.testing.assert_array_equal(mine, theirs)


def drawn_by_diffusers(made, noise):
  made.set_progress_bar_config(disable=True)
  # One of them takes every first stage for one that halves the side three times.
  side = 8 * (SIDE // 2) if isinstance(made, diffusers.LDMTextToImagePipeline) else SIDE
  pictures = made(
    PROMPTS, latents=torch.from_numpy(noise.transpose(0, 3, 1, 2).copy()), output_type="np",
    num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=side, width=side,
  ).images  # fmt: skip
  return 255 * pictures


def drawn_by_us(path):
  """Pictures of an export as its sampling options say, and the noise that they began with."""
  exported = export.read(path)
  options = {**exported.config.sample.options.to_dict(), "steps": STEPS, "guidance": GUIDANCE}
  pictures = t2i_jax.load(path)(PROMPTS, seed=SEED, **options)
  keys = picture_keys(jnp.uint32(SEED), jnp.arange(len(PROMPTS)))
  return pictures.astype(float), np.asarray(start_noise(keys, (SIDE // 2, SIDE // 2, 4)))


def test_pictures_are_the_same(case):
  """By the reference, by our export of its folder, and by the reference of our folder."""
  name, made, place = case
  ours, noise = drawn_by_us(place / "export")
  theirs = drawn_by_diffusers(made, noise)
  assert np.abs(ours - theirs).max() <= 2
  # The prompts, the guidance and the noise matter.
  assert np.std(theirs) > 10
  if not (place / "back").exists():
    convert.main([f"--source={place / 'export'}", f"--output={place / 'back'}", "--to=diffusers"])
  again = type(made).from_pretrained(place / "back", local_files_only=True)
  assert np.abs(drawn_by_diffusers(again, noise) - ours).max() <= 2


def fails(capfd, *flags):
  capfd.readouterr()
  with pytest.raises(SystemExit) as exit:
    convert.main([str(flag) for flag in flags])
  assert exit.value.code == 2
  return capfd.readouterr().err.splitlines()[-1].removeprefix("error: ")


def test_what_is_no_whole_pipeline_is_one_line(case, tmp_path, capfd):
  name, _, place = case
  if name != "SD1":
    pytest.skip("the messages do not depend on the version: one will do")
  new = f"--output={tmp_path / 'new'}"
  copy = shutil.copytree(place / "folder", tmp_path / "copy")
  source = f"--source={copy}"
  assert "--layer is not read of a pipeline" in fails(capfd, source, new, "--layer=-2")
  assert "which is a part of a model" in fails(capfd, f"--source={copy / 'unet'}", new)
  assert "does not divide" in fails(capfd, source, new, "--resolution=18")

  def changed(path, **values):
    given = json.loads((place / "folder" / path).read_text())
    (copy / path).write_text(json.dumps({**given, **values}))

  changed("unet/config.json", in_channels=9)
  assert "and its latents have 4: a model for inpainting" in fails(capfd, source, new)
  changed("unet/config.json", act_fn="gelu")
  assert "act_fn=gelu is not known" in fails(capfd, source, new)
  changed("unet/config.json", block_out_channels=[32, 128])
  assert "of another shape" in fails(capfd, source, new)
  changed("unet/config.json")
  changed("scheduler/scheduler_config.json", beta_schedule="sigmoid")
  assert "beta_schedule=sigmoid is not known" in fails(capfd, source, new)
  changed("scheduler/scheduler_config.json", _class_name="LMSDiscreteScheduler")
  convert.main([source, new])
  assert "LMSDiscreteScheduler is not known, ddim takes its place" in capfd.readouterr().out
  shutil.rmtree(tmp_path / "new")
  changed("model_index.json", _class_name="FluxPipeline")
  assert "is of a FluxPipeline, which is not known" in fails(capfd, source, new)
  changed("model_index.json", text_encoder=[None, None])
  assert "without one of its text encoders, such as XL's refiner" in fails(capfd, source, new)
  changed("model_index.json")
  changed("vae/config.json", _class_name="VQModel")
  assert "is of class VQModel, not AutoencoderKL" in fails(capfd, source, new)
  changed("vae/config.json")
  broken = {n: torch.from_numpy(t.read()) for n, t in open_weights(copy / "unet").items()}
  broken["conv_out.bias"][0] = torch.nan
  from safetensors.torch import save_file

  save_file(broken, copy / "unet" / "diffusion_pytorch_model.safetensors")
  assert "NaN or infinity in (1) conv_out.bias" in fails(capfd, source, new)
  shutil.rmtree(copy / "tokenizer")
  assert "it has no folder tokenizer" in fails(capfd, source, new)
  # Nothing is left of what failed.
  assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_what_is_no_whole_file_is_one_line(case, tmp_path, capfd):
  name, _, place = case
  if name == "LDM":
    pytest.skip("the messages are those of the other versions")
  path = tmp_path / "model.safetensors"
  convert.main([f"--source={place / 'export'}", f"--output={path}", "--to=single_file"])
  new, tokens = f"--output={tmp_path / 'new'}", f"--tokenizer={place / 'folder' / 'tokenizer'}"
  source = f"--source={path}"
  if name == "SD2":
    assert "give --prediction=epsilon" in fails(capfd, source, new, tokens)
    assert "unknown --prediction 'x0'" in fails(capfd, source, new, tokens, "--prediction=x0")
    return
  assert "name the folder of CLIP's with --tokenizer" in fails(capfd, source, new)
  assert "leave --ema out" in fails(capfd, source, new, tokens, "--ema")
  held = {n: torch.from_numpy(t.read()) for n, t in open_weights(path).items()}
  from safetensors.torch import save_file

  def without(word, message):
    save_file({n: t for n, t in held.items() if word not in n}, path)
    assert message in fails(capfd, source, new, tokens, f"--resolution={SIDE}")

  without("middle_block.0.emb_layers", "the U-Net in these weights is not whole")
  without("first_stage_model", "these weights hold no autoencoder")
  without("output_blocks.0.0.out_layers.0", "missing (2) model.diffusion_model.output_blocks.0.0")
  encoder = "cond_stage_model" if name == "SD1" else "conditioner.embedders.1"
  without(encoder, "its text encoders are neither")
  assert "is there already" in fails(
    capfd, f"--source={place / 'export'}", f"--output={path}", "--to=single_file"
  )
  assert "let it end in .safetensors" in fails(
    capfd, f"--source={place / 'export'}", f"--output={tmp_path / 'x'}", "--to=single_file"
  )
  assert not (tmp_path / "new").exists()
