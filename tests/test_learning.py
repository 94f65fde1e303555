"""Every system learns: its loss falls, and what it draws is what the caption says."""

import json

import numpy as np
import pytest
from runs import ROOT, command, finish

pytestmark = pytest.mark.full

# The config, steps that are enough for places and colours, and a loss that falls.
CASES = {
  "quickstart": (500, "denoiser/loss"),
  "ddpm": (800, "denoiser/loss"),
  "vae": (1500, "vae/loss"),
  "gan_cls": (1000, "discriminator/mismatch"),
}

# Configs that this test cannot train by themselves.
APART = {
  **dict.fromkeys(
    ("clip", "feature_net", "kl_autoencoder", "noisy_classifier", "semantic_guidance"),
    "draws nothing of a text; its own test trains it",
  ),
  "adm": "is guided by a classifier, or told labels",
  **dict.fromkeys(("ldm", "lora", "sd3", "sdxl", "stable_diffusion"), "is built on other exports"),
  **dict.fromkeys(("dit", "u_vit"), "how long it must be trained is not known yet"),
}


def test_every_config_has_a_case():
  assert set(CASES) | set(APART) == {path.stem for path in ROOT.glob("configs/*.py")}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_the_text_matters(name, seed, tmp_path):
  steps, loss = CASES[name]
  finish(
    command(
      "main", f"--config={ROOT / 'configs' / name}.py", f"--workdir={tmp_path}",
      f"--config.train.duration={steps}", f"--config.seed={seed}", "--config.sample.every=0",
      "--config.checkpoint.every=0", "--config.evaluate.pictures=128",
      "--config.evaluate.splits=held_out_combinations",
      JAX_DISABLE_MOST_OPTIMIZATIONS="0",
    ),
    minutes=40,
  )
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  losses = [line[loss] for line in lines if loss in line]
  assert np.mean(losses[-2:]) < 0.7 * losses[0], losses

  (score,) = json.loads((tmp_path / "scores" / "scores.json").read_text()).values()
  right, shuffled = score["right"], score["shuffled"]
  print(name, seed, right, shuffled)
  for attribute in ("position", "colour"):
    assert right[attribute] >= 3 * shuffled[attribute], (attribute, right, shuffled)
