"""Autoencoders' options as others write them; names are compared in tests/parity."""

import numpy as np
import pytest

from t2i_jax.errors import UserError
from t2i_jax.weights import autoencoder as maps
from t2i_jax.weights.stored import Stored

# The config.json of Stable Diffusion 1's, as it is published.
PUBLISHED = {
  "_class_name": "AutoencoderKL", "_diffusers_version": "0.2.2", "act_fn": "silu",
  "block_out_channels": [128, 256, 512, 512],
  "down_block_types": 4 * ["DownEncoderBlock2D"], "in_channels": 3, "latent_channels": 4,
  "layers_per_block": 2, "out_channels": 3, "sample_size": 512,
  "up_block_types": 4 * ["UpDecoderBlock2D"],
}  # fmt: skip


def test_diffusers_config_is_our_options_and_back():
  options = maps.from_diffusers(PUBLISHED)
  assert options == {
    "resolution": 512, "latent_channels": 4, "channels": 128, "multipliers": (1, 2, 4, 4),
    "blocks": 2, "attention_levels": (), "middle_attention": True, "pointwise": True,
    "groups": 32, "scale": 0.18215, "shift": 0.0,
  }  # fmt: skip
  other = {**options, "multipliers": (1, 2), "attention_levels": (1,), "shift": 0.1,
           "pointwise": False, "middle_attention": False}
  for given in (options, other):
    assert maps.from_diffusers(maps.to_diffusers(given)) == given
  written = maps.to_diffusers(options)
  assert all(written[k] == v for k, v in PUBLISHED.items() if k != "_diffusers_version")


@pytest.mark.parametrize(
  "wrong, named",
  [
    ({"act_fn": "gelu"}, "act_fn=gelu"), ({"in_channels": 4}, "in_channels=4"),
    ({"use_quant_conv": False}, "use_post_quant_conv"),
    ({"block_out_channels": [128, 200, 512, 512]}, "multiples of the first"),
    ({"down_block_types": 4 * ["AttnDownEncoderBlock2D"]}, "mirror"),
  ],
)
def test_what_our_networks_have_not_is_named(wrong, named):
  with pytest.raises(UserError, match=named):
    maps.from_diffusers({**PUBLISHED, **wrong})


def test_a_scale_that_is_not_known_is_not_written():
  with pytest.raises(UserError, match="scale .* was not measured"):
    maps.to_diffusers({**maps.from_diffusers(PUBLISHED), "scale": 0.0})


def tensors(**shapes):
  return {
    name: Stored(shape, np.dtype("f4"), lambda shape=shape: np.zeros(shape, "f4"))
    for name, shape in shapes.items()
  }


def test_weights_of_something_else():
  with pytest.raises(UserError, match="hold no autoencoder"):
    maps.options_of(tensors(**{"model.diffusion_model.out.2.bias": (4,)}))
  broken = {"encoder.mid.block_1.conv1.weight": (8, 8, 3, 3)}
  with pytest.raises(UserError, match="not whole"):
    maps.options_of(tensors(**broken))
  broken |= {
    "encoder.conv_in.weight": (8, 3, 3, 3), "decoder.conv_in.weight": (8, 4, 3, 3),
    "encoder.conv_out.weight": (4, 8, 3, 3), "encoder.down.0.block.0.conv1.weight": (8, 8, 3, 3),
  }  # fmt: skip
  with pytest.raises(UserError, match="4 channels for 4 of the latents"):
    maps.options_of(tensors(**broken))
