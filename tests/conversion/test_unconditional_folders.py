"""A DDPM of pixels without a text, as diffusers writes it: there and back."""

import json

import jax
import numpy as np
import pytest

from t2i_jax import convert, export
from t2i_jax.networks.unet import UNet
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.unet import diffusers_map
from t2i_jax.weights.unet_config import to_diffusers

NETWORK = {
  "out_channels": 3, "channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": "block",
  "attention_levels": (1,), "heads": 1, "scale_shift": False, "sine_first": True,
}  # fmt: skip
# As the first DDPMs were published, but for the sizes.
SCHEDULER = {
  "_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_schedule": "linear",
  "beta_start": 0.0001, "clip_sample": True, "num_train_timesteps": 1000, "trained_betas": None,
  "variance_type": "fixed_large",
}  # fmt: skip
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
  """All in one folder, the attention under its old names."""
  network, path = UNet(**NETWORK), tmp_path / "folder"
  options = {name: getattr(network, name) for name in network.__dataclass_fields__}
  options |= {"resolution": 16, "in_channels": 3, "context_width": 0, "pooled_width": 0}
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), np.zeros((1, 16, 16, 3)), np.zeros(1)
  )["params"]
  random = np.random.default_rng(0)
  params = jax.tree.map(lambda x: random.normal(size=x.shape).astype("f4"), shapes)
  path.mkdir()
  (path / "config.json").write_text(json.dumps(to_diffusers(options)))
  (path / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
  (path / "model_index.json").write_text(json.dumps({"_class_name": "DDPMPipeline"}))
  write_safetensors(path / WEIGHTS, diffusers_map(options, old=True).save(params))
  return path


def test_a_folder_there_and_back(folder, tmp_path, capfd):
  with pytest.raises(SystemExit):
    convert.main([f"--source={folder}", f"--output={tmp_path / 'export'}", "--length=9"])
  assert "--length is of T5, and a DDPMPipeline has none" in capfd.readouterr().err
  convert.main([f"--source={folder}", f"--output={tmp_path / 'export'}"])
  exported = export.read(tmp_path / "export")
  model, options = exported.config.model, exported.config.sample.options
  assert exported.config.system == "ddpm" and exported.config.text.encoder == "none"
  assert {name: model[name] for name in NETWORK if name in model} == {
    name: value for name, value in NETWORK.items() if name in model
  }  # fmt: skip
  assert (model.resolution, model.schedule, model.beta_end, model.draft) == (16, "linear", 0.02, 0)
  assert (options.solver, options.steps, options.variance, options.clip) == (
    "ddpm", 1000, "large", True
  )  # fmt: skip
  back = tmp_path / "back"
  convert.main([f"--source={tmp_path / 'export'}", f"--output={back}", "--to=diffusers"])
  ours, theirs = (json.loads((place / "config.json").read_text())
                  for place in (back / "unet", folder))
  assert ours == theirs
  index = json.loads((back / "model_index.json").read_text())
  assert index["_class_name"] == "DDPMPipeline" and index["scheduler"][1] == "DDPMScheduler"
  convert.main([f"--source={back}", f"--output={tmp_path / 'again'}"])
  name = "variables.safetensors"
  assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "export" / name).read_bytes()
  assert export.read(tmp_path / "again").config == exported.config

  # What reads a text has no such pipeline.
  with exported.config.unlocked():
    exported.config.text.encoder = "transformer"
  export.write(tmp_path / "text", exported.config, 0, exported.variables, exported.tokenizers)
  capfd.readouterr()
  with pytest.raises(SystemExit):
    convert.main([f"--source={tmp_path / 'text'}", f"--output={tmp_path / 'new'}",
                  "--to=diffusers"])
  assert "reads a text or has components" in capfd.readouterr().err
  assert not (tmp_path / "new").exists()
