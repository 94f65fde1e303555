"""Parameters of the published text encoders, counted without making them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.errors import UserError
from t2i_jax.text import bert, clip, t5

IDS = jax.ShapeDtypeStruct((1, 77), jnp.int32)


def parameters(network, *inputs):
  shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)
  return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))


# Of CLIP's text towers with a projection where the published file has one.
@pytest.mark.parametrize("network, expected", [
  (clip.CLIPText(clip.TEXT["L"], project=False), 123_060_480),
  (clip.CLIPText(clip.TEXT["H"], project=False), 352_984_064),
  (clip.CLIPText(clip.TEXT["bigG"]), 694_659_840),
  # The published 581,994,042 with the head that predicts tokens, which conditioning leaves out.
  (bert.LDMTransformer(bert.LDMConfig()), 581_994_042 - 1281 * 30522),
  (bert.BERT(bert.Config()), 109_482_240),
], ids=["CLIP L", "CLIP H", "CLIP bigG", "LDM", "BERT"])  # fmt: skip
def test_published_sizes(network, expected):
  assert parameters(network, IDS) == expected


@pytest.mark.parametrize("size, millions", [
  ("S", 35.33), ("B", 109.6), ("L", 341.2), ("XL", 1223.5), ("XXL", 4762.3)
])  # fmt: skip
def test_t5_sizes(size, millions):
  found = parameters(t5.T5Encoder(t5.SIZES[size]), IDS) / 1e6
  assert f"{found:.4g}" == f"{millions:.4g}" or abs(found - millions) < 0.051, found


def test_clip_vision_sizes():
  images = lambda side: jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)  # noqa: E731
  both = clip.CLIP(clip.TEXT["B"], clip.VISION["B/32"])
  assert parameters(both, images(224), IDS) == 151_277_313
  both = clip.CLIP(clip.TEXT["L"], clip.VISION["L/14"])
  assert parameters(both, images(224), IDS) == 427_616_513


def test_layers_that_are_not_there():
  for layer in (13, -14):
    with pytest.raises(UserError, match="12 layers"):
      jax.eval_shape(clip.CLIPText(clip.TEXT["B"], layer).init, jax.random.key(0), IDS)


def test_unknown_activations_are_named():
  with pytest.raises(UserError, match="hidden_act='swish'"):
    clip.TextConfig.from_transformers({"hidden_act": "swish"})
  with pytest.raises(UserError, match="feed_forward_proj='swish'"):
    t5.Config.from_transformers({"feed_forward_proj": "swish"})
  with pytest.raises(UserError, match="hidden_act='relu'"):
    bert.Config.from_transformers({"hidden_act": "relu"})


def test_old_configs_of_clip_name_the_wrong_end():
  assert clip.TextConfig.from_transformers({"eos_token_id": 2}).end == 49407
  assert clip.TextConfig.from_transformers({"eos_token_id": 7}).end == 7


def test_t5_buckets():
  table = t5.relative_buckets(200, 32, 128)
  assert table.shape == (200, 200)
  # Exact to 7, then logarithmic, the last bucket from 128 on; keys ahead are in the other half.
  np.testing.assert_array_equal(table[:8, 0], np.arange(8))
  np.testing.assert_array_equal(table[0, 1:8], 16 + np.arange(1, 8))
  assert table[127, 0] == table[128, 0] == table[199, 0] == 15 and table[90, 0] == 14
  assert (np.diff(table[:, 0]) >= 0).all()
