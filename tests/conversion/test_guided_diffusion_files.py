"""Guided diffusion's U-Nets and classifiers: files there and back, and pictures by class number.

With the authors' own networks and samplers at random weights, run outside this suite (UNetModel of
64, 128 and 16 px, EncoderUNetModel of 64 and 16 px with three pools), ours differed by at most
4.4e-6 of the largest value, every tensor came back bit for bit, and pictures of 10 steps by DDIM
and by the ancestral sampler with learned variances, with the classifier and without, differed by
no more than the rounding to 256 levels.
"""

import jax
import numpy as np
import pytest
from runs import ROOT

from t2i_jax import assembly, batch_spec, config_files, convert, export, guiding
from t2i_jax.errors import UserError
from t2i_jax.pipeline import Pipeline
from t2i_jax.weights import guided_diffusion as files
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import Stored
from t2i_jax.weights.unet_single_file import classifier_map, single_file_map

pytestmark = pytest.mark.usefixtures("compiled_programs")
SMALL = {
  "resolution": 16, "channels": 32, "multipliers": (1, 2), "blocks": 1, "attention_levels": (1,),
  "groups": 32, "head_channels": 64, "dropout": 0.0,
}  # fmt: skip


def tensors_of(config):
  """What the file of a config's network holds, by name, random and small."""
  system = assembly.build_system(config)
  shapes = jax.eval_shape(
    lambda batch: system.init(jax.random.key(0), batch), batch_spec.abstract_batch(system, 1)
  )
  (group,) = system.ema_groups
  network, random = system.network, np.random.default_rng(0)
  options = {name: getattr(network, name) for name in (
    "channels", "multipliers", "blocks", "attention", "attention_levels", "heads", "head_channels"
  )}  # fmt: skip
  new_order = config.system == "adm" and config.model.resolution == 64
  names = (
    single_file_map(options, new_order=new_order) if config.system == "adm"
    else classifier_map({**options, "pool": network.pool})
  )
  return {
    name: Stored(shape, np.dtype("f4"), lambda shape=shape: (
      random.normal(size=shape) / np.sqrt(max(np.prod(shape[1:]), 25))
    ).astype("f4"))
    for name, (shape, _, _) in names.save(shapes["params"][group]).items()
  }  # fmt: skip


def config_of(system, size, **model):
  config = config_files.load_config(f"{ROOT}/configs/{system}.py:size={size}")
  config.text.encoder = "none"
  config.model.update(classes=(("class", 7),), **model)
  return config


def saved(path, tensors):
  write_safetensors(path, {name: (t.shape, t.dtype, t.read) for name, t in tensors.items()})
  return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """Small files of both kinds, and their exports."""
  folder = tmp_path_factory.mktemp("guided_diffusion")
  for name in ("adm", "noisy_classifier"):
    config = config_of(name, "tiny", **{**SMALL, "schedule": "linear", "steps": 1000})
    saved(folder / f"{name}.safetensors", tensors_of(config))
    flags = ["--resolution=16"] if name == "adm" else []
    convert.main([f"--source={folder / name}.safetensors", f"--output={folder / name}", *flags])
  return folder


@pytest.mark.parametrize("name", ["adm", "noisy_classifier"])
def test_a_file_there_and_back(place, name, tmp_path):
  config = export.read(place / name).config
  assert config.system == name and config.model.classes == (("class", 7),)
  expected = {**SMALL, "schedule": "linear", "block_resample": True, "scale_shift": True}
  assert {key: config.model[key] for key in expected} == expected
  assert config.model.get("learned_variance", True)
  convert.main([f"--source={place / name}", f"--output={tmp_path / 'back.safetensors'}",
                "--to=single_file"])
  back, original = tmp_path / "back.safetensors", place / f"{name}.safetensors"
  assert back.read_bytes() == original.read_bytes()


@pytest.mark.parametrize("name, size", [
  ("adm", "imagenet64"), ("noisy_classifier", "imagenet512")
])  # fmt: skip
def test_the_published_networks_are_recognised(name, size):
  config = config_of(name, size)
  tensors = tensors_of(config)
  assert files.kind_of(tensors) == name
  found = files.options_of(name, tensors, "it")
  # Nothing of the training is seen.
  assert {**found, "dropout": config.model.dropout} == {
    key: config.model[key] for key in (*found, "dropout")
  }  # fmt: skip


@pytest.mark.parametrize(
  "size", ["imagenet64", "imagenet128", "imagenet256", "imagenet512", "lsun"]
)
def test_what_no_file_says_is_as_the_configs_have_it(size):
  model = config_files.load_config(f"{ROOT}/configs/adm.py:size={size}").model
  assert files.SIDES[model.multipliers] == model.resolution
  found = files.flags_of("adm", model.resolution)
  assert found == {name: model[name] for name in found}
  assert found["heads"] == (4 if size == "imagenet128" else 0)


def test_prompts_are_class_numbers_and_the_classifier_is_a_guide(place):
  pipeline = Pipeline.load(place / "adm", guide=place / "noisy_classifier")
  assert pipeline.read(["3", " 6"], 4)["label"].tolist() == [[3], [6], [-1], [-1]]
  for prompt in ("a goldfish", "7", "-1", ""):
    with pytest.raises(UserError, match="no number of a class; give one of 0 to 6"):
      pipeline(["3", prompt])
  pipeline.check(pipeline.variables, **pipeline.config.sample.options)
  # Labels are read of captions alone where the data set's say them, or where there are several.
  with pipeline.config.unlocked():
    pipeline.config.data.name = "scenes"
  with pytest.raises(UserError, match="by the labels class .7., which the captions of data set"):
    guiding.check_labels(pipeline.system, pipeline.config)


def fails(capfd, *flags):
  capfd.readouterr()
  with pytest.raises(SystemExit) as exit:
    convert.main([str(flag) for flag in flags])
  assert exit.value.code == 2
  (line,) = capfd.readouterr().err.splitlines()
  return line.removeprefix("error: ")


def test_what_is_another_model_is_one_line(place, tmp_path, capfd):
  path, new = tmp_path / "it.safetensors", f"--output={tmp_path / 'new'}"
  source = f"--source={path}"
  file = saved(path, unet := tensors_of(export.read(place / "adm").config))
  assert "give their side with --resolution=PIXELS" in fails(capfd, f"--source={file}", new)
  assert "--tokenizer is not read of a file of guided diffusion" in fails(
    capfd, source, new, "--tokenizer=x"
  )

  def changed(name, shape, message, drop=(), of=unet):
    added = {name: Stored(shape, np.dtype("f4"), lambda: np.zeros(shape, "f4"))}
    saved(path, {k: t for k, t in {**of, **added}.items() if not k.startswith(drop or "-")})
    assert message in fails(capfd, source, new, "--resolution=16")

  changed("input_blocks.0.0.weight", (32, 6, 3, 3), "holds an upsampler of guided diffusion")
  changed("out.2.weight", (4, 32, 3, 3), "a U-Net from 3 channels to 4")
  changed("middle_block.1.proj_in.weight", (1,), "the U-Net of a latent diffusion model alone")
  changed("input_blocks.2.0.op.weight", (32, 32, 3, 3), "models of improved diffusion do",
          "input_blocks.2.0.in_layers")
  changed("x", (1,), "is not whole ('middle_block.0.emb_layers.1.weight')", "middle_block.0")
  changed("out.3.weight", (1,), "does not hold this model: unexpected (1) out.3.weight")
  classifier = tensors_of(export.read(place / "noisy_classifier").config)
  changed("out.0.weight", (2048, 96), "whose pool is spatial_v2", "out.2.", classifier)
  changed("x", (1,), "cannot be told from one another", "input_blocks.3.1", classifier)
  saved(path, classifier)
  assert "has positions for pictures of 16 px" in fails(capfd, source, new, "--resolution=32")
  assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes, message", [
  ({"patch": 2}, "model.patch=2"), ({"schedule": "cosine"}, "networks with linear, at 16 px"),
  ({"classes": (("colour", 3), ("shape", 4))}, "reads the labels colour, shape"),
])  # fmt: skip
def test_networks_that_guided_diffusion_has_not(place, tmp_path, changes, message):
  exported = export.read(place / "adm")
  with exported.config.unlocked():
    exported.config.model.update(changes)
  from t2i_jax.conversion import guided_diffusion

  with pytest.raises(UserError, match=message):
    guided_diffusion.write(exported, str(tmp_path / "new.safetensors"))
  assert not list(tmp_path.iterdir())
