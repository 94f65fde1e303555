"""DINOv2 from a folder of transformers, against transformers' own model."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

import jax  # noqa: E402
from random_weights import randomised  # noqa: E402
from transformers import Dinov2Config, Dinov2Model  # noqa: E402

from t2i_jax.errors import UserError  # noqa: E402
from t2i_jax.metrics.dinov2 import DINOv2  # noqa: E402
from t2i_jax.metrics.resize import torch_bicubic_weights  # noqa: E402
from t2i_jax.weights.dinov2 import load_dinov2  # noqa: E402

SIDE, PATCH = 20, 4


def made(folder, **options):
  config = Dinov2Config(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=PATCH,
    **options,
  )  # fmt: skip
  model = randomised(Dinov2Model(config))
  model.save_pretrained(folder)
  return model


@pytest.mark.parametrize("height, width, gated", [
  (SIDE, SIDE, False), (12, 12, True), (32, 24, False)
])  # fmt: skip
def test_the_class_token_is_the_references_at_any_resolution(
  tmp_path, height, width, gated, compiled_programs
):
  model = made(tmp_path, use_swiglu_ffn=gated, qkv_bias=not gated)
  images = np.random.default_rng(0).normal(size=(2, height, width, 3)).astype("f4")
  with torch.no_grad():
    expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).pooler_output.numpy()
  config, variables = load_dinov2(tmp_path)
  assert config.gated == gated
  found = jax.jit(DINOv2(config).apply)(variables, images)
  assert expected.std(0).max() > 0.01
  np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("size, wanted", [(37, 16), (16, 37), (5, 5)])
def test_positions_are_interpolated_as_torch_does(size, wanted):
  x = np.random.default_rng(0).normal(size=(size, size))
  expected = torch.nn.functional.interpolate(
    torch.from_numpy(x)[None, None], (wanted, wanted), mode="bicubic", align_corners=False
  )
  weights = torch_bicubic_weights(size, wanted)
  np.testing.assert_allclose(weights @ x @ weights.T, expected[0, 0], atol=1e-12)


def test_folders_of_something_else_are_refused(tmp_path):
  made(tmp_path)
  config = json.loads((tmp_path / "config.json").read_text())
  for change, message in (
    ({"num_hidden_layers": 1}, r"does not hold this model: unexpected \(18\) encoder.layer.1"),
    ({"model_type": "vit"}, "model_type is 'vit', not 'dinov2'"),
    ({"hidden_act": "relu"}, "hidden_act='relu' is not known"),
    ({"hidden_size": "x"}, "config.json is no config of DINOv2"),
  ):
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
      load_dinov2(tmp_path)
  (tmp_path / "config.json").unlink()
  with pytest.raises(UserError, match="no config.json in"):
    load_dinov2(tmp_path)
