"""Stable Diffusion's systems, trained, exported and drawn from through the commands' own code."""

import encoder
import numpy as np
import pytest
import two_stage
from runs import ROOT, train_on

import t2i_jax
from t2i_jax import config_files

pytestmark = pytest.mark.usefixtures("compiled_programs")
ENCODERS = {"stable_diffusion": ("text_encoder",), "sdxl": ("text_encoder", "text_encoder_2")}


# XL has all that the others have; they are trained in the full tier.
@pytest.mark.parametrize("name", [
  pytest.param("sdxl", marks=pytest.mark.slow),
  pytest.param("stable_diffusion", marks=pytest.mark.full),
])  # fmt: skip
def test_it_trains_and_draws(name, tmp_path):
  given = {"components.first_stage": str(two_stage.make(tmp_path / "first")),
           "train.duration": "2", "sample.every": "0"}  # fmt: skip
  for i, part in enumerate(ENCODERS[name]):
    given[f"components.{part}"] = str(encoder.make(tmp_path / part, 1.0 + i))
  config = config_files.load_config(f"{ROOT / 'configs' / name}.py:size=tiny,dataset=scenes", given)
  train_on(config, tmp_path / "run")
  pipeline = t2i_jax.load(tmp_path / "run" / "export")
  drawn = pipeline(["a red ring", "a blue square"], seed=1, steps=2, guidance=3.0)
  assert drawn.shape == (2, 16, 16, 3) and drawn.dtype == np.uint8
  assert np.any(drawn[0] != drawn[1])
