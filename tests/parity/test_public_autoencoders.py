"""Our autoencoder against diffusers' AutoencoderKL: random weights through our key maps."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")
diffusers = pytest.importorskip("diffusers", reason="the reference: install t2i_jax[parity]")

from random_weights import randomised, stored  # noqa: E402

from t2i_jax.networks.autoencoder import Decoder, Encoder  # noqa: E402
from t2i_jax.weights import autoencoder as maps  # noqa: E402
from t2i_jax.weights.stored import Stored  # noqa: E402

TOLERANCE = 1e-4  # of the largest value
RESOLUTION = 32
SHAPES = {
  # As Stable Diffusion's, XL's among them; as Stable Diffusion 3's; and what older ones have.
  "4 channels": {"latent_channels": 4, "scaling_factor": 0.18215},
  "16 channels": {
    "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False,
    "shift_factor": 0.0609,
  },
  "attending levels": {
    "latent_channels": 3, "mid_block_add_attention": True,
    "down_block_types": (*3 * ["DownEncoderBlock2D"], "AttnDownEncoderBlock2D"),
    "up_block_types": ("AttnUpDecoderBlock2D", *3 * ["UpDecoderBlock2D"]),
  },
}  # fmt: skip


def made(shape):
  """The reference with He-normal kernels and noise on all else, so that every parameter matters."""
  levels = {"down_block_types": 4 * ("DownEncoderBlock2D",),
            "up_block_types": 4 * ("UpDecoderBlock2D",)}
  model = diffusers.AutoencoderKL(**{
    "block_out_channels": (16, 32, 64, 64), "layers_per_block": 2, "norm_num_groups": 8,
    "sample_size": RESOLUTION, **levels, **SHAPES[shape],
  })  # fmt: skip
  return randomised(model)


def networks(options):
  """Encoder, decoder, and the shapes of their parameters."""
  own = {k: v for k, v in options.items() if k not in ("resolution", "scale", "shift")}
  encoder, decoder = Encoder(**own), Decoder(**own)
  side = RESOLUTION // 2 ** (len(options["multipliers"]) - 1)
  shapes = lambda network, *shape: jax.eval_shape(  # noqa: E731
    network.init, jax.random.key(0), np.zeros(shape, "f4")
  )["params"]
  return encoder, decoder, {
    "encoder": shapes(encoder, 1, RESOLUTION, RESOLUTION, 3),
    "decoder": shapes(decoder, 1, side, side, options["latent_channels"]),
  }


def assert_close(ours, reference):
  reference = reference.detach().numpy().transpose(0, 2, 3, 1)
  assert ours.shape == reference.shape
  scale = np.abs(reference).max()
  assert scale > 1e-3
  assert np.abs(ours - reference).max() <= TOLERANCE * scale


@pytest.mark.parametrize("shape", SHAPES)
def test_encodes_and_decodes_as_the_reference(shape):
  model = made(shape)
  options = maps.from_diffusers(model.config)
  encoder, decoder, abstract = networks(options)
  tensors = stored(model.state_dict())
  params = maps.map_of(tensors, 4).load(tensors, abstract, source="the reference")
  random = np.random.default_rng(1)
  images = random.uniform(-1, 1, (2, RESOLUTION, RESOLUTION, 3)).astype("f4")
  moments = encoder.apply({"params": params["encoder"]}, images)
  given = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
  expected = model.encoder(given)
  assert_close(moments, model.quant_conv(expected) if options["pointwise"] else expected)
  latents = random.normal(size=(2, 4, 4, options["latent_channels"])).astype("f4")
  given = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
  assert_close(decoder.apply({"params": params["decoder"]}, latents), model.decode(given).sample)

  named = maps.diffusers_map(4).save(params)
  assert set(named) == set(tensors)
  for name, (_, _, read) in named.items():
    assert np.asarray(read(), order="C").tobytes() == tensors[name].read().tobytes(), name
  again = diffusers.AutoencoderKL.from_config(maps.to_diffusers(options))
  assert {k: v.shape for k, v in again.state_dict().items()} == {
    k: v.shape for k, v in model.state_dict().items()
  }


@pytest.mark.parametrize("whole", [False, True], ids=["alone", "in a whole model's file"])
@pytest.mark.parametrize("shape", ["4 channels", "16 channels"])
def test_the_authors_names_are_those_that_the_reference_converts(shape, whole):
  """What we write in the single-file layout, the reference reads; and we read it again."""
  from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

  model = made(shape)
  options = maps.from_diffusers(model.config)
  *_, abstract = networks(options)
  tensors = stored(model.state_dict())
  params = maps.map_of(tensors, 4).load(tensors, abstract, source="the reference")
  named = {
    maps.SINGLE_FILE * whole + name: Stored(*parts)
    for name, parts in maps.single_file_map().save(params).items()
  }
  others = {
    "model.diffusion_model.out.2.bias": torch.zeros(3), "loss.logvar": torch.zeros(()),
    "cond_stage_model.transformer.text_model.encoder.layers.0.bias": torch.zeros(3),
  }  # fmt: skip
  converted = convert_ldm_vae_checkpoint(
    {name: torch.from_numpy(tensor.read().copy()) for name, tensor in named.items()}, model.config
  )
  assert set(converted) == set(tensors)
  for name, value in converted.items():
    assert torch.equal(value, model.state_dict()[name]), name
  file = {**named, **stored(others)} if whole else named
  assert maps.options_of(file) == {
    k: v for k, v in options.items() if k not in ("resolution", "scale", "shift", "groups")
  }
  again = maps.map_of(file, 4).load(file, abstract, source="the file")
  assert jax.tree.all(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), again, params))


def test_the_attention_s_old_names():
  model = made("4 channels")
  *_, abstract = networks(maps.from_diffusers(model.config))
  tensors = stored(model.state_dict())
  params = maps.map_of(tensors, 4).load(tensors, abstract, source="the reference")
  old = maps.diffusers_map(4, old_attention=True)
  named = {name: Stored(*parts) for name, parts in old.save(params).items()}
  state = {name: torch.from_numpy(tensor.read().copy()) for name, tensor in named.items()}
  assert "decoder.mid_block.attentions.0.proj_attn.weight" in state
  model._fix_state_dict_keys_on_load(state)
  assert set(state) == set(tensors)
  assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
  again = maps.map_of(named, 4).load(named, abstract, source="the old file")
  assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
