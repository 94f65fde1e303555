"""An autoencoder alone: a folder of diffusers, and a file of its authors'."""

import json

import jax
import numpy as np
import pytest

from t2i_jax import assembly, convert, export
from t2i_jax.networks.autoencoder import Decoder, Encoder
from t2i_jax.systems.capabilities import FirstStage
from t2i_jax.weights import autoencoder as maps
from t2i_jax.weights.safetensors_file import write_safetensors

OPTIONS = {
  "resolution": 16, "latent_channels": 4, "channels": 32, "multipliers": (1, 2), "blocks": 1,
  "attention_levels": (), "middle_attention": True, "pointwise": True, "groups": 32,
  "scale": 0.18215, "shift": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def params():
  own = {k: v for k, v in OPTIONS.items() if k not in ("resolution", "scale", "shift")}
  shapes = {
    name: jax.eval_shape(kind(**own).init, jax.random.key(0), np.zeros(shape, "f4"))["params"]
    for name, kind, shape in (
      ("encoder", Encoder, (1, 16, 16, 3)), ("decoder", Decoder, (1, 8, 8, 4))
    )
  }  # fmt: skip
  random = np.random.default_rng(0)
  return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype("f2"), shapes)


@pytest.fixture
def folder(params, tmp_path):
  path = tmp_path / "vae"
  path.mkdir()
  (path / "config.json").write_text(json.dumps(maps.to_diffusers(OPTIONS)))
  write_safetensors(
    path / "diffusion_pytorch_model.safetensors", maps.diffusers_map(2).save(params)
  )
  return path


def assert_same(found, expected):
  assert jax.tree.all(jax.tree.map(
    lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), found, expected
  ))


def test_a_folder_there_and_back(folder, params, tmp_path):
  convert.main([f"--source={folder}", f"--output={tmp_path / 'export'}"])
  exported = export.read(tmp_path / "export")
  assert_same(exported.variables["params"], params)
  system = assembly.build_with(exported.config, exported.components)
  assert isinstance(system, FirstStage) and system.scale == 0.18215
  assert system.latent_shape(16) == (8, 8, 4)
  convert.main([f"--source={tmp_path / 'export'}", f"--output={tmp_path / 'back'}",
                "--to=diffusers"])
  name = "diffusion_pytorch_model.safetensors"
  assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
  ours, theirs = (json.loads((place / "config.json").read_text()) for place in (
    tmp_path / "back", folder
  ))
  assert ours == theirs


def fails(capfd, *flags):
  capfd.readouterr()
  with pytest.raises(SystemExit) as exit:
    convert.main([str(flag) for flag in flags])
  assert exit.value.code == 2
  (line,) = capfd.readouterr().err.splitlines()
  return line.removeprefix("error: ")


def test_a_file(params, tmp_path, capfd):
  path, output = tmp_path / "vae.safetensors", tmp_path / "export"
  write_safetensors(path, maps.single_file_map().save(params))
  flags = [f"--source={path}", f"--output={output}"]
  assert "give --scale=0.18215 for" in fails(capfd, *flags)
  assert "--layer is not read of an autoencoder in a file" in fails(capfd, *flags, "--layer=-2")
  convert.main([*flags, "--scale=0.5", "--resolution=16", "--dtype=float32"])
  exported = export.read(output)
  assert exported.config.model.scale == 0.5 and exported.config.model.resolution == 16
  assert_same(exported.variables["params"], jax.tree.map(lambda x: x.astype("f4"), params))


def test_what_is_none_is_one_line(folder, tmp_path, capfd):
  flags = [f"--source={folder}", f"--output={tmp_path / 'export'}"]
  assert "--scale is not read of an autoencoder's folder" in fails(capfd, *flags, "--scale=1")
  given = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps({**given, "layers_per_block": 2}))
  assert "does not hold this model: missing" in fails(capfd, *flags)
  (folder / "config.json").write_text(json.dumps({**given, "layers_per_block": "two"}))
  assert str(folder) in fails(capfd, *flags)
  (folder / "config.json").write_text(json.dumps({**given, "_class_name": "Transformer2DModel"}))
  assert "is of class Transformer2DModel, which is a part of a model" in fails(capfd, *flags)
  assert not (tmp_path / "export").exists()


def test_exports_that_others_do_not_have(folder, tmp_path, capfd):
  convert.main([f"--source={folder}", f"--output={tmp_path / 'export'}"])
  flags = [f"--source={tmp_path / 'export'}", f"--output={tmp_path / 'new.safetensors'}"]
  assert "whole models are those of" in fails(capfd, *flags, "--to=single_file")
  assert "only text encoders" in fails(capfd, *flags, "--to=huggingface")
  assert not (tmp_path / "new.safetensors").exists()
