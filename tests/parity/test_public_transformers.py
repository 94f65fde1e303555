"""Our diffusion transformers against diffusers': random weights through our key maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")
diffusers = pytest.importorskip("diffusers", reason="the reference: install t2i_jax[parity]")

from random_weights import randomised, stored  # noqa: E402

from t2i_jax.errors import UserError  # noqa: E402
from t2i_jax.networks.dit import DiT  # noqa: E402
from t2i_jax.networks.mmdit import MMDiT  # noqa: E402
from t2i_jax.weights import dit as dit_maps  # noqa: E402
from t2i_jax.weights import mmdit as mmdit_maps  # noqa: E402
from t2i_jax.weights.stored import Stored  # noqa: E402

TOLERANCE = 1e-4  # of the largest value
SIDE, TOKENS = 8, 5
SMALL = {
  "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 3, "sample_size": SIDE,
}  # fmt: skip
OURS = {"width": 24, "depth": 3, "heads": 2}
SD3 = {
  **SMALL, "num_attention_heads": 3, "num_layers": 4, "joint_attention_dim": 20,
  "caption_projection_dim": 36, "pooled_projection_dim": 14, "in_channels": 4, "out_channels": 4,
  "pos_embed_max_size": 12,
}  # fmt: skip
OURS_3 = {"width": 36, "depth": 4, "heads": 3, "grid": 4, "largest": 12}


def draws(*shapes, seed=1):
  random = np.random.default_rng(seed)
  return [random.normal(size=shape).astype("f4") for shape in shapes]


def dit():
  """DiT's, whose attention is the authors' only with their frequencies and their epsilon."""
  model = diffusers.DiTTransformer2DModel(
    **SMALL, in_channels=4, out_channels=8, num_embeds_ada_norm=7, norm_eps=1e-6
  )
  randomised(model)
  first = model.transformer_blocks[0].norm1.emb
  for block in model.transformer_blocks:
    block.norm1.emb.time_proj.downscale_freq_shift = 0
    block.norm1.emb.load_state_dict(first.state_dict())
  (x,) = draws((2, SIDE, SIDE, 4))
  theirs = {
    "hidden_states": torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
    "timestep": torch.tensor([3, 801]), "class_labels": torch.tensor([2, 7]),
  }  # fmt: skip
  # 7 is the row of no label.
  given = {"x": x, "t": np.array([3, 801], "f4"), "label": np.array([2, -1], np.int32)}
  options = {**OURS, "classes": 7, "out_channels": 8}
  return model, theirs, DiT(**options), given, dit_maps.diffusers_map({**options, "patch": 2})


def pixart():
  model = randomised(diffusers.PixArtTransformer2DModel(
    **SMALL, in_channels=4, out_channels=8, cross_attention_dim=24, caption_channels=20,
    use_additional_conditions=False, interpolation_scale=2,
  ))  # fmt: skip
  x, context = draws((2, SIDE, SIDE, 4), (2, TOKENS, 20))
  mask = np.arange(TOKENS) < np.array([[3], [5]])
  theirs = {
    "hidden_states": torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
    "timestep": torch.tensor([3, 801]), "encoder_hidden_states": torch.from_numpy(context),
    "encoder_attention_mask": torch.from_numpy(mask),
  }  # fmt: skip
  given = {"x": x, "t": np.array([3, 801], "f4"), "context": context, "mask": mask}
  network = DiT(**OURS, modulation="single", position_scale=2.0, out_channels=8)
  return model, theirs, network, given, dit_maps.pixart_map({**OURS, "patch": 2})


def sd3(**version):
  """Stable Diffusion 3's, on a picture that is not square."""
  theirs = {"dual_attention_layers": tuple(range(version.get("dual", 0)))}
  if version.get("norm"):
    theirs["qk_norm"] = "rms_norm"
  model = randomised(diffusers.SD3Transformer2DModel(**SD3, **theirs))
  x, context, pooled = draws((2, SIDE, SIDE + 4, 4), (2, TOKENS, 20), (2, 14))
  theirs = {
    "hidden_states": torch.from_numpy(x.transpose(0, 3, 1, 2).copy()),
    "timestep": torch.tensor([3.5, 801.0]), "encoder_hidden_states": torch.from_numpy(context),
    "pooled_projections": torch.from_numpy(pooled),
  }  # fmt: skip
  given = {"x": x, "t": np.array([3.5, 801], "f4"), "context": context, "pooled": pooled}
  options = {**OURS_3, "norm": False, "dual": 0, **version}
  return model, theirs, MMDiT(**options), given, mmdit_maps.diffusers_map({**options, "patch": 2})


MODELS = {
  "DiT": dit,
  "PixArt-alpha": pixart,
  "SD3": sd3,
  "SD3.5 large": functools.partial(sd3, norm=True),
  "SD3.5 medium": functools.partial(sd3, norm=True, dual=2),
}  # fmt: skip


@functools.cache
def made(name):
  """The reference with its tensors, and our network with its weights."""
  model, theirs, network, given, names = MODELS[name]()
  tensors = stored(model.state_dict())
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), **given))["params"]
  return model, theirs, tensors, network, given, names, names.load(tensors, shapes, source="it")


@pytest.mark.parametrize("name", MODELS)
def test_predicts_as_the_reference(name):
  model, theirs, tensors, network, given, names, params = made(name)
  out = np.asarray(jax.jit(network.apply)({"params": params}, **given))
  with torch.no_grad():
    reference = model(**theirs).sample.numpy().transpose(0, 2, 3, 1)
  assert out.shape == reference.shape
  assert np.abs(out - reference).max() <= TOLERANCE * np.abs(reference).max()
  assert np.std(reference) > 1e-2

  back = names.save(params)
  assert set(back) == set(tensors)
  for key, (_, _, read) in back.items():
    if key == "pos_embed.pos_embed":  # computed, there with fewer digits
      np.testing.assert_allclose(read(), tensors[key].read(), atol=1e-5)
    else:
      assert np.asarray(read(), order="C").tobytes() == tensors[key].read().tobytes(), key


@pytest.mark.parametrize("name", ["SD3", "SD3.5 large", "SD3.5 medium"])
def test_the_authors_names_are_those_that_the_reference_converts(name):
  """What we write in the single-file layout, the reference reads; and we read it again."""
  from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

  model, _, tensors, network, given, _, params = made(name)
  options = {**OURS_3, "patch": 2, "dual": network.dual}
  names = mmdit_maps.single_file_map(options)
  file = {
    mmdit_maps.SINGLE_FILE + key: Stored(*parts) for key, parts in names.save(params).items()
  }
  converted = convert_sd3_transformer_checkpoint_to_diffusers(
    {key: torch.from_numpy(np.array(tensor.read())) for key, tensor in file.items()}
  )
  assert set(converted) == set(tensors)
  for key, value in converted.items():
    np.testing.assert_allclose(value.numpy(), tensors[key].read(), atol=1e-5, err_msg=key)
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), **given))["params"]
  others = stored({"first_stage_model.encoder.conv_in.weight": torch.zeros(3),
                   "text_encoders.t5xxl.logit_scale": torch.zeros(())})  # fmt: skip
  for held in (file, {key.removeprefix(mmdit_maps.SINGLE_FILE): x for key, x in file.items()}):
    again = names.load({**held, **others}, shapes, source="the file")
    assert jax.tree.all(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), again, params))


def test_dit_s_own_names():
  """The authors' file has queries, keys and values in one, every embedder once, and positions.

  With the authors' own DiT at random weights, run outside this suite, our network differed by at
  most 8.8e-6 of the largest value, and all tensors came back byte for byte, the positions too; with
  the authors' own U-ViT (a text; labels, with and without the last convolution) by at most 6.2e-6,
  and byte for byte.
  """
  _, _, tensors, network, given, _, params = made("DiT")
  names = dit_maps.authors_map({**OURS, "patch": 2, "grid": SIDE // 2})
  written = {key: Stored(*parts) for key, parts in names.save(params).items()}
  assert written["blocks.1.attn.qkv.weight"].shape == (3 * 24, 24)
  parts = [tensors[f"transformer_blocks.1.attn1.to_{x}.weight"].read() for x in "qkv"]
  np.testing.assert_array_equal(written["blocks.1.attn.qkv.weight"].read(), np.concatenate(parts))
  assert written["pos_embed"].shape == (1, 16, 24)
  # One block's six parts, and a table, positions, embedders and the last layer.
  assert len(written) == 3 * 10 + 1 + 1 + 2 + 4 + 4
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), **given))["params"]
  again = names.load(written, shapes, source="the file")
  assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def test_what_is_no_such_model_is_refused():
  _, _, tensors, network, given, names, _ = made("DiT")
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), **given))["params"]
  other = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
  moved = {**tensors, **stored({other: torch.ones(24)})}
  with pytest.raises(UserError, match="two versions of one tensor"):
    names.load(moved, shapes, source="the file")
  with pytest.raises(UserError, match="missing"):
    names.load({k: v for k, v in tensors.items() if ".1.attn1" not in k}, shapes, source="it")
  _, _, tensors, network, given, _, _ = made("SD3")
  shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), **given))["params"]
  with pytest.raises(UserError, match="other positions"):
    mmdit_maps.diffusers_map({**OURS_3, "patch": 2, "dual": 0, "grid": 8}).load(
      tensors, shapes, source="the file"
    )


@pytest.mark.parametrize("name", ["DiT", "SD3.5 medium"])
def test_blocks_that_are_not_stacked_hold_the_same(name):
  _, _, tensors, network, given, names, params = made(name)
  apart = network.clone(scan=False)
  shapes = jax.eval_shape(lambda: apart.init(jax.random.key(0), **given))["params"]
  loaded = names.load(tensors, shapes, source="it")
  np.testing.assert_array_equal(
    loaded["blocks_2"]["image" if "SD3" in name else "attention"]["query"]["kernel"],
    params["blocks"]["image" if "SD3" in name else "attention"]["query"]["kernel"][-1],
  )
  one, two = (
    jax.jit(net.apply)({"params": tree}, **jax.tree.map(jnp.asarray, given))
    for net, tree in ((network, params), (apart, loaded))
  )
  np.testing.assert_allclose(one, two, atol=1e-5 * np.abs(one).max())
