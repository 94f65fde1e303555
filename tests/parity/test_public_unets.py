"""Our U-Net against diffusers' U-Nets: random weights through our key maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")
diffusers = pytest.importorskip("diffusers", reason="the reference: install t2i_jax[parity]")

from random_weights import randomised, stored  # noqa: E402

from t2i_jax.networks.layers.spatial import AttentionBlock  # noqa: E402
from t2i_jax.networks.unet import UNet  # noqa: E402
from t2i_jax.weights.stored import Stored  # noqa: E402
from t2i_jax.weights.unet import diffusers_map, widths_of  # noqa: E402
from t2i_jax.weights.unet_config import from_diffusers, linear_projections, to_diffusers  # noqa: E402
from t2i_jax.weights.unet_single_file import (  # noqa: E402
  SINGLE_FILE,
  averages,
  map_of,
  options_of,
  single_file_map,
)

TOLERANCE = 1e-4  # of the largest value
TOKENS = 5
SIDE = 16
# Stable Diffusion's, small: three levels, of which the last does not attend.
STABLE = {
  "block_out_channels": (32, 64, 64), "sample_size": SIDE, "cross_attention_dim": 24,
  "down_block_types": (*2 * ["CrossAttnDownBlock2D"], "DownBlock2D"),
  "up_block_types": ("UpBlock2D", *2 * ["CrossAttnUpBlock2D"]),
}  # fmt: skip
PLAIN = {
  "sample_size": SIDE, "block_out_channels": (16, 32, 32), "norm_num_groups": 8,
  "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
  "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
}  # fmt: skip
SHAPES = {
  # The first DDPMs: one head, zeros at two sides, sines first.
  "DDPM": (diffusers.UNet2DModel, {
    **PLAIN, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6,
    "attention_head_dim": None,
  }),
  # ADM's: scale and shift, residual blocks that change the size, labels, learned variances.
  "ADM": (diffusers.UNet2DModel, {
    **PLAIN, "out_channels": 6, "attention_head_dim": 8, "resnet_time_scale_shift": "scale_shift",
    "attn_norm_num_groups": 8, "num_class_embeds": 7, "downsample_type": "resnet",
    "upsample_type": "resnet",
    "down_block_types": ("ResnetDownsampleBlock2D", *2 * ["AttnDownBlock2D"]),
    "up_block_types": (*2 * ["AttnUpBlock2D"], "ResnetUpsampleBlock2D"),
  }),
  "SD1": (diffusers.UNet2DConditionModel, STABLE),
  "SD2": (diffusers.UNet2DConditionModel, {
    **STABLE, "attention_head_dim": [2, 4, 4], "use_linear_projection": True,
    "upcast_attention": True,
  }),
  "SDXL": (diffusers.UNet2DConditionModel, {
    **STABLE, "attention_head_dim": [2, 4, 4], "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 3], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + 20,
    "down_block_types": ("DownBlock2D", *2 * ["CrossAttnDownBlock2D"]),
    "up_block_types": (*2 * ["CrossAttnUpBlock2D"], "UpBlock2D"),
  }),
  # Latent diffusion's text-to-image model: another text, and one more level that attends.
  "LDM": (diffusers.UNet2DConditionModel, {
    **STABLE, "block_out_channels": (32, 64, 128, 128), "layers_per_block": 1,
    "cross_attention_dim": 40,
    "down_block_types": (*3 * ["CrossAttnDownBlock2D"], "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *3 * ["CrossAttnUpBlock2D"]),
  }),
}  # fmt: skip
CONDITIONED = [name for name, (kind, _) in SHAPES.items() if "Condition" in kind.__name__]


def made(shape):
  """The reference with He-normal kernels and noise on all else, so that every parameter matters."""
  kind, config = SHAPES[shape]
  model = kind(**config)
  return randomised(model)


def given(options, seed=1):
  """What the network is called with, and diffusers' names of it."""
  random = np.random.default_rng(seed)
  draw = lambda *shape: random.normal(size=shape).astype("f4")  # noqa: E731
  ours = {"x": draw(2, SIDE, SIDE, options["in_channels"]), "t": np.array([3, 801], "f4")}
  theirs = {"sample": torch.from_numpy(ours["x"].transpose(0, 3, 1, 2).copy()),
            "timestep": torch.tensor([3, 801])}
  if options["context_width"]:
    ours["context"] = draw(2, TOKENS, options["context_width"])
    theirs["encoder_hidden_states"] = torch.from_numpy(ours["context"])
  if options["classes"]:
    ours["label"] = np.array([2, 5], np.int32)
    theirs["class_labels"] = torch.tensor([2, 5])
  if options["pooled_width"]:
    from t2i_jax.networks.layers.embeddings import timestep_embedding

    sizes = np.array([[512, 768, 0, 64, 512, 512]] * 2)
    text = draw(2, options["pooled_width"] - 6 * 256)
    waves = np.asarray(timestep_embedding(jnp.asarray(sizes.reshape(-1)), 256)).reshape(2, -1)
    ours["pooled"] = np.concatenate([text, waves], axis=-1)
    theirs["added_cond_kwargs"] = {
      "text_embeds": torch.from_numpy(text), "time_ids": torch.from_numpy(sizes),
    }  # fmt: skip
  return ours, theirs


def network(options):
  """The network and the shapes of its parameters."""
  widths = ("resolution", "in_channels", "context_width", "pooled_width")
  built = UNet(**{k: v for k, v in options.items() if k not in widths})
  ours, _ = given(options)
  shapes = jax.eval_shape(lambda: built.init(jax.random.key(0), **ours))["params"]
  return built, shapes


@functools.cache
def loaded(shape):
  """The reference, its tensors, our options, and our tree of its weights."""
  model = made(shape)
  options = from_diffusers({**model.config, "_class_name": type(model).__name__})
  tensors = stored(model.state_dict())
  built, shapes = network(options)
  params = map_of(tensors, options).load(tensors, shapes, source="the reference")
  return model, tensors, options, built, params


@pytest.mark.parametrize("shape", SHAPES)
def test_predicts_as_the_reference(shape):
  model, tensors, options, built, params = loaded(shape)
  ours, theirs = given(options)
  out = np.asarray(jax.jit(built.apply)({"params": params}, **ours))
  with torch.no_grad():
    reference = model(**theirs).sample.numpy().transpose(0, 2, 3, 1)
  assert out.shape == reference.shape
  assert np.abs(out - reference).max() <= TOLERANCE * np.abs(reference).max()
  # Far from a network that ignores what it is given.
  assert np.std(reference) > 1e-2

  back = diffusers_map(options, not linear_projections(options)).save(params)
  assert set(back) == set(tensors)
  for name, (_, _, read) in back.items():
    assert np.asarray(read(), order="C").tobytes() == tensors[name].read().tobytes(), name


@pytest.mark.parametrize("shape", SHAPES)
def test_diffusers_builds_the_same_network_of_our_options(shape):
  kind, _ = SHAPES[shape]
  model, _, options, _, params = loaded(shape)
  assert from_diffusers(to_diffusers(options)) == options
  again = kind.from_config(to_diffusers({**options, **widths_of(params)}))
  assert {k: v.shape for k, v in again.state_dict().items()} == {
    k: v.shape for k, v in model.state_dict().items()
  }


@pytest.mark.parametrize("shape", CONDITIONED)
def test_the_authors_names_are_those_that_the_reference_converts(shape):
  """What we write in the single-file layout, the reference reads; and we read it again."""
  from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

  model, tensors, options, _, params = loaded(shape)
  written = single_file_map(options, not linear_projections(options)).save(params)
  file = {SINGLE_FILE + name: Stored(*parts) for name, parts in written.items()}
  converted = convert_ldm_unet_checkpoint(
    {name: torch.from_numpy(tensor.read().copy()) for name, tensor in file.items()}, model.config
  )
  assert set(converted) == set(tensors)
  for name, value in converted.items():
    assert torch.equal(value, model.state_dict()[name]), name

  others = stored({"first_stage_model.encoder.conv_in.weight": torch.zeros(3),
                   "betas": torch.zeros(3), "model_ema.decay": torch.zeros(())})  # fmt: skip
  for held in (file, {name.removeprefix(SINGLE_FILE): tensor for name, tensor in file.items()}):
    # Groups and the heads' width are not to be seen.
    unseen = {"resolution": 0, "heads": 8 if options["heads"] else 0, "head_channels": 64}
    assert options_of({**held, **others}) == {**options, **unseen}
    again = map_of(held, options).load(
      {**held, **others}, network(options)[1], source="the file"
    )
    assert jax.tree.all(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), again, params))


def test_the_averages_are_those_that_the_reference_extracts():
  from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

  model, _, options, _, params = loaded("SD1")
  named = single_file_map(options, True).save(params)
  file = {SINGLE_FILE + name: parts[2]() for name, parts in named.items()}
  averaged = {
    "model_ema." + name.removeprefix("model.").replace(".", ""): value + 1
    for name, value in file.items()
  }
  whole = {name: torch.from_numpy(value.copy()) for name, value in {**file, **averaged}.items()}
  expected = convert_ldm_unet_checkpoint(whole, model.config, extract_ema=True)
  held = averages(stored(whole))
  shapes = network(options)[1]
  ours = map_of(held, options).load(held, shapes, source="the file")
  back = diffusers_map(options, True).save(ours)
  assert set(back) == set(expected)
  for name, (_, _, read) in back.items():
    np.testing.assert_array_equal(read(), expected[name].numpy(), err_msg=name)


def test_the_attention_s_old_names():
  model, tensors, options, _, params = loaded("DDPM")
  named = diffusers_map(options, old=True).save(params)
  old = {name: Stored(*parts) for name, parts in named.items()}
  state = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in old.items()}
  assert "mid_block.attentions.0.proj_attn.weight" in state
  model._fix_state_dict_keys_on_load(state)
  assert set(state) == set(tensors)
  assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
  again = map_of(old, options).load(old, network(options)[1], source="the old file")
  assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


@pytest.mark.parametrize("new_order", [False, True])
def test_adm_s_fused_projections(new_order):
  """The attention of ADM written out: one convolution gives queries, keys and values.

  Of three heads they lie as (three, heads, width) in the new order and as (heads, three, width) in
  the old. With the authors' own UNetModel (five sets of options, both orders) and EncoderUNetModel
  (three pools, both orders) at random weights, run outside this suite, our networks differed by at
  most 2.9e-6 of the largest value, all tensors came back byte for byte, and the wrong order
  differed by 0.48 and more.
  """
  heads, width, channels = 3, 4, 12
  generator = torch.Generator().manual_seed(0)
  draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
  tensors = {
    "norm.weight": 1 + 0.2 * draw(channels), "norm.bias": 0.2 * draw(channels),
    "qkv.weight": draw(3 * channels, channels, 1) / channels**0.5,
    "qkv.bias": 0.2 * draw(3 * channels),
    "proj_out.weight": draw(channels, channels, 1), "proj_out.bias": draw(channels),
  }  # fmt: skip
  x = draw(2, channels, 4, 4)
  tokens = torch.nn.functional.group_norm(
    x.flatten(2), 4, tensors["norm.weight"], tensors["norm.bias"], 1e-5
  )
  fused = torch.nn.functional.conv1d(tokens, tensors["qkv.weight"], tensors["qkv.bias"])
  if new_order:
    query, key, value = fused.reshape(2, 3, heads, width, 16).unbind(1)
  else:
    query, key, value = fused.reshape(2, heads, 3, width, 16).unbind(2)
  scores = torch.einsum("bhct,bhcs->bhts", query, key) / width**0.5
  read = torch.einsum("bhts,bhcs->bhct", scores.softmax(-1), value).reshape(2, channels, 16)
  read = torch.nn.functional.conv1d(read, tensors["proj_out.weight"], tensors["proj_out.bias"])
  reference = (x + read.reshape(x.shape)).numpy().transpose(0, 2, 3, 1)

  options = {
    "channels": channels, "multipliers": (1,), "blocks": 1, "attention": "block",
    "attention_levels": (0,), "heads": heads,
  }  # fmt: skip
  block = AttentionBlock(heads, groups=4, epsilon=1e-5)
  given = x.numpy().transpose(0, 2, 3, 1)
  shapes = {"middle_attention": jax.eval_shape(block.init, jax.random.key(0), given)["params"]}
  file = stored({f"middle_block.1.{name}": value for name, value in tensors.items()})
  names = single_file_map(options, new_order=new_order)
  params = names.load(file, shapes, source="the reference")
  out = block.apply({"params": params["middle_attention"]}, given)
  assert np.abs(out - reference).max() <= 1e-5 * np.abs(reference).max()
  back = names.save(params)
  assert set(back) == set(file)
  assert all(np.array_equal(back[name][2](), file[name].read()) for name in file)
