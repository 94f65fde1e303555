"""U-Nets' options as others write them; names and predictions are compared in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.errors import UserError
from t2i_jax.networks.encoder_unet import POOLS, EncoderUNet
from t2i_jax.networks.unet import UNet
from t2i_jax.weights import unet_single_file as single_file
from t2i_jax.weights.stored import Stored
from t2i_jax.weights.unet import diffusers_map, widths_of
from t2i_jax.weights.unet_config import from_diffusers, linear_projections, to_diffusers

# The config.json files as they are published, but for what diffusers takes anyway.
SD1 = {
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
  "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280],
  "center_input_sample": False, "cross_attention_dim": 768,
  "down_block_types": [*3 * ["CrossAttnDownBlock2D"], "DownBlock2D"], "downsample_padding": 1,
  "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
  "mid_block_scale_factor": 1, "norm_eps": 1e-5, "norm_num_groups": 32, "out_channels": 4,
  "sample_size": 64, "up_block_types": ["UpBlock2D", *3 * ["CrossAttnUpBlock2D"]],
}  # fmt: skip
SD2 = {
  **SD1, "attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "sample_size": 96,
  "dual_cross_attention": False, "num_class_embeds": None, "only_cross_attention": False,
  "upcast_attention": True, "use_linear_projection": True,
}  # fmt: skip
SDXL = {
  **SD1, "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280],
  "cross_attention_dim": 2048, "sample_size": 128, "use_linear_projection": True,
  "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
  "projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10],
  "down_block_types": ["DownBlock2D", *2 * ["CrossAttnDownBlock2D"]],
  "up_block_types": [*2 * ["CrossAttnUpBlock2D"], "UpBlock2D"], "upcast_attention": None,
}  # fmt: skip
DDPM = {
  "_class_name": "UNet2DModel", "act_fn": "silu", "attention_head_dim": None,
  "block_out_channels": [128, 256, 256, 256], "center_input_sample": False,
  "down_block_types": ["DownBlock2D", "AttnDownBlock2D", *2 * ["DownBlock2D"]],
  "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3,
  "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-6, "norm_num_groups": 32,
  "out_channels": 3, "sample_size": 32, "time_embedding_type": "positional",
  "up_block_types": [*2 * ["UpBlock2D"], "AttnUpBlock2D", "UpBlock2D"],
}  # fmt: skip
OURS = {
  "channels": 320, "multipliers": (1, 2, 4, 4), "blocks": 2, "attention": "transformer",
  "attention_levels": (0, 1, 2), "depths": (), "middle_depth": 1, "heads": 8, "head_channels": 64,
  "groups": 32, "epsilon": 1e-5, "scale_shift": False, "dropout": 0.0, "block_resample": False,
  "symmetric": True, "sine_first": False, "classes": 0, "pooled_mlp": False, "resolution": 64,
  "in_channels": 4, "out_channels": 4, "context_width": 768, "pooled_width": 0,
}  # fmt: skip


@pytest.mark.parametrize(
  "published, changed",
  [
    (SD1, {}),
    (SD2, {"heads": 0, "context_width": 1024, "resolution": 96}),
    (SDXL, {"heads": 0, "context_width": 2048, "resolution": 128, "multipliers": (1, 2, 4),
            "attention_levels": (1, 2), "depths": (0, 2, 10), "middle_depth": 10,
            "pooled_width": 2816, "pooled_mlp": True}),
    (DDPM, {"channels": 128, "multipliers": (1, 2, 2, 2), "attention": "block",
            "attention_levels": (1,), "heads": 1, "epsilon": 1e-6, "symmetric": False,
            "sine_first": True, "resolution": 32, "in_channels": 3, "out_channels": 3,
            "context_width": 0}),
  ],
  ids=["SD1", "SD2", "SDXL", "DDPM"],
)  # fmt: skip
def test_diffusers_config_is_our_options_and_back(published, changed):
  options = from_diffusers(published)
  assert options == {**OURS, **changed}
  written = to_diffusers(options)
  assert from_diffusers(written) == options
  dropped = ("_diffusers_version", "upcast_attention")
  expected = {k: v for k, v in published.items() if k not in dropped}
  if published is DDPM:
    expected["attention_head_dim"] = written["attention_head_dim"]
  assert {k: written[k] for k in expected} == expected


def test_heads_of_the_first_ddpm_are_one_at_every_level():
  assert to_diffusers(from_diffusers(DDPM))["attention_head_dim"] is None
  # Without the setting it is not so.
  silent = {k: v for k, v in DDPM.items() if k != "attention_head_dim"}
  assert from_diffusers(silent)["head_channels"] == 8 and from_diffusers(silent)["heads"] == 0


@pytest.mark.parametrize(
  "published, wrong, named",
  [
    (SD1, {"_class_name": "Transformer2DModel"}, "class Transformer2DModel"),
    (SD1, {"act_fn": "gelu"}, "act_fn=gelu"),
    (SD1, {"class_embed_type": "projection"}, "class_embed_type=projection"),
    (SD1, {"time_cond_proj_dim": 256}, "time_cond_proj_dim=256"),
    (SD1, {"encoder_hid_dim_type": "text_proj"}, "encoder_hid_dim_type=text_proj"),
    (SD1, {"invented": 3}, "invented=3"),
    (SD1, {"block_out_channels": [320, 640, 1280]}, "an entry for each level"),
    (SD1, {"block_out_channels": [56, 488, 488, 488]}, "multiples of the first"),
    (SD1, {"layers_per_block": [1, 2, 2, 2]}, "the same at every level"),
    (SD1, {"cross_attention_dim": [768, 768, 768, 1024]}, "the same at every level"),
    (SD1, {"attention_head_dim": [4, 5, 10, 10]}, "one width of a head"),
    (SD1, {"freq_shift": 1}, "freq_shift=1"),
    (SD1, {"time_embedding_dim": 512}, "four times its first channels, 1280"),
    (SD1, {"up_block_types": [*3 * ["CrossAttnUpBlock2D"], "UpBlock2D"]}, "on the way up"),
    (SD1, {"down_block_types": 4 * ["SimpleCrossAttnDownBlock2D"]}, "SimpleCrossAttnDownBlock2D"),
    (SD1, {"mid_block_type": None}, "mid_block_type=None"),
    (SDXL, {"addition_embed_type": "text"}, "addition_embed_type=text"),
    (SDXL, {"addition_time_embed_dim": 128}, "addition_time_embed_dim=128"),
    (DDPM, {"attention_head_dim": 7}, "attention_head_dim=7"),
    (DDPM, {"downsample_type": "resnet"}, "both by residual blocks and by convolutions"),
    (DDPM, {"resnet_time_scale_shift": "scale_shift"}, "attn_norm_num_groups=None"),
  ],
)
def test_what_our_network_has_not_is_named(published, wrong, named):
  with pytest.raises(UserError, match=named):
    from_diffusers({**published, **wrong})


@pytest.mark.parametrize(
  "changed, named",
  [
    ({"attention": "compact"}, "attention=compact"), ({"patch": 2}, "patch=2"),
    ({"coordinates": 3}, "coordinates=3"),
    ({"middle_depth": 3, "attention_levels": (0, 3)}, "blocks deep"),
    ({"attention": "block"}, "reads a text"), ({"context_width": 0}, "no text"),
    ({"block_resample": True}, "block_resample"), ({"pooled_width": 7}, "pooled_mlp=False"),
    ({"attention": "block", "context_width": 0}, "one width of all heads"),
  ],
)
def test_what_diffusers_has_not_is_named(changed, named):
  with pytest.raises(UserError, match=named):
    to_diffusers({**OURS, **changed})


def filled(shapes):
  random = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype("f4"), shapes)


def written(names, params, prefix=""):
  return {prefix + name: Stored(*parts) for name, parts in names.save(params).items()}


def shapes_of(network, **given):
  x = jnp.zeros((1, 16, 16, 3))
  return jax.eval_shape(lambda: network.init(jax.random.key(0), x, jnp.zeros(1), **given))["params"]


def options_of_network(network, params):
  fields = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)}
  return {**fields, "resolution": 0, **(widths_of(params) if "pool" not in fields else {})}


def assert_read_again(names, file, shapes, params):
  again = names.load(file, shapes, source="the file")
  assert jax.tree.all(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), again, params))


@pytest.mark.parametrize("prefix", ["", single_file.SINGLE_FILE])
@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize(
  "changed",
  [
    {"block_resample": True, "scale_shift": True, "classes": 5, "out_channels": 6},
    {"multipliers": (1, 2, 4), "attention_levels": (0,), "blocks": 3},
    {"multipliers": (1,), "attention_levels": ()},
    {"attention": "transformer", "depths": (0, 3), "middle_depth": 2, "pooled_mlp": True},
  ],
  ids=["ADM", "convolutions", "one level", "transformers"],
)  # fmt: skip
def test_a_file_of_the_authors_tells_its_options(changed, new_order, prefix):
  network = UNet(**{
    "channels": 32, "multipliers": (1, 2), "blocks": 2, "attention": "block", "groups": 32,
    "attention_levels": (1,), "head_channels": 64, "epsilon": 1e-5, "scale_shift": False,
    "symmetric": True, "out_channels": 3, **changed,
  })  # fmt: skip
  given = {"label": jnp.zeros(1, jnp.int32)} if network.classes else {}
  if network.attention == "transformer":
    given = {"context": jnp.zeros((1, 5, 12)), "pooled": jnp.zeros((1, 7))}
  shapes = shapes_of(network, **given)
  params = filled(shapes)
  options = options_of_network(network, shapes)
  names = single_file.single_file_map(options, not linear_projections(options), new_order)
  file = written(names, params, prefix)
  found = single_file.options_of(file)
  assert found == {name: options[name] for name in found}
  assert_read_again(single_file.map_of(file, found, new_order), file, shapes, params)


@pytest.mark.parametrize("names_of", [single_file.single_file_map, diffusers_map])
def test_stacked_blocks_are_in_the_same_files(names_of):
  apart = UNet(
    channels=8, multipliers=(1, 2), blocks=1, attention="transformer", attention_levels=(1,),
    depths=(0, 2), middle_depth=3, head_channels=8, groups=4, scale_shift=False, remat=True,
  )
  stacked = apart.clone(scan=True)
  given = {"context": jnp.ones((1, 5, 12)), "pooled": jnp.ones((1, 7))}
  shapes = shapes_of(stacked, **given)
  options = options_of_network(stacked, shapes)
  assert options == {**options_of_network(apart, shapes_of(apart, **given)), "scan": True}
  assert shapes["middle_attention"]["block"]["mlp_in"]["kernel"].shape == (3, 16, 128)

  names, params = names_of(options), filled(shapes)
  file = written(names, params, "")
  others = names.load(file, shapes_of(apart, **given), source="it")
  assert written(names_of(options_of_network(apart, others)), others, "").keys() == file.keys()
  assert_read_again(names, file, shapes, params)


@pytest.mark.parametrize("pool", POOLS)
def test_adm_s_classifier_is_written_and_read(pool):
  network = EncoderUNet(
    channels=32, multipliers=(1, 2), blocks=2, attention="block", attention_levels=(1,),
    head_channels=16, epsilon=1e-5, block_resample=True, out_channels=10, pool=pool,
  )
  shapes = shapes_of(network)
  params = filled(shapes)
  names = single_file.classifier_map(options_of_network(network, shapes))
  file = written(names, params)
  assert "input_blocks.3.0.in_layers.0.weight" in file and "middle_block.1.qkv.weight" in file
  out = {name: tensor.shape for name, tensor in file.items() if name.startswith("out.")}
  assert out == {
    "attention": {
      "out.0.weight": (64,), "out.0.bias": (64,), "out.2.positional_embedding": (64, 65),
      "out.2.qkv_proj.weight": (192, 64, 1), "out.2.qkv_proj.bias": (192,),
      "out.2.c_proj.weight": (10, 64, 1), "out.2.c_proj.bias": (10,),
    },
    "adaptive": {
      "out.0.weight": (64,), "out.0.bias": (64,), "out.3.weight": (10, 64, 1, 1),
      "out.3.bias": (10,),
    },
    "spatial": {
      "out.0.weight": (2048, 32 * 4 + 64 * 3), "out.0.bias": (2048,),
      "out.2.weight": (10, 2048), "out.2.bias": (10,),
    },
  }[pool]  # fmt: skip
  assert_read_again(names, file, shapes, params)


def test_weights_of_something_else():
  tensor = lambda *shape: Stored(shape, np.dtype("f4"), lambda: np.zeros(shape, "f4"))  # noqa: E731
  with pytest.raises(UserError, match="hold no U-Net"):
    single_file.options_of({"first_stage_model.encoder.conv_in.weight": tensor(8, 3, 3, 3)})
  network = UNet(channels=32, multipliers=(1, 2), blocks=1, attention="block", heads=1)
  shapes = shapes_of(network)
  options = options_of_network(network, shapes)
  file = written(single_file.single_file_map(options), filled(shapes), single_file.SINGLE_FILE)
  for name in ("middle_block.0.emb_layers.1.weight", "input_blocks.1.0.in_layers.2.weight"):
    broken = {k: v for k, v in file.items() if k != single_file.SINGLE_FILE + name}
    with pytest.raises(UserError, match=f"not whole .*{name}"):
      single_file.options_of(broken)
  with pytest.raises(UserError, match="blocks are missing"):
    single_file.options_of({k: v for k, v in file.items() if "output_blocks.2." not in k})
  with pytest.raises(UserError, match="holds no average of .*; leave --ema out"):
    single_file.averages(file)
