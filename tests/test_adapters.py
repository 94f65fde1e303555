"""Adapters by the commands: trained on an export, drawn with, merged, saved and loaded."""

import json
import os
import signal

import numpy as np
import pytest
from runs import ROOT, assert_same_bits, config_of, metrics, saved_steps, train_on

import t2i_jax
from t2i_jax import adapters, assembly, export
from t2i_jax.errors import UserError
from t2i_jax.systems import trees

pytestmark = pytest.mark.usefixtures("compiled_programs")

DDPM, LORA = ROOT / "configs" / "ddpm.py", ROOT / "configs" / "lora.py"
QUIET = {"sample__every": 0, "evaluate__every": 0}
# One level with every kind of layer that takes adapters: each more is compiled in every program.
BASE = {"model__multipliers": "(1,)", "model__attention_levels": "(0,)", "model__draft": 0,
        "model__attention": "transformer", "sample__options__steps": 2}
PROMPTS = ["a red ring", "a blue square at the top"]


@pytest.fixture(scope="module")
def base(tmp_path_factory, compiled_programs):
  """An export to adapt."""
  workdir = tmp_path_factory.mktemp("base")
  train_on(config_of(DDPM, train__duration=2, optimizer__learning_rate=1e-2,
                     **BASE, **QUIET), workdir)
  return workdir / "export"


def lora_config(base, duration, **settings):
  return config_of(LORA, components__base=base, train__duration=duration, checkpoint__every=2,
                   optimizer__learning_rate=0.1, optimizer__schedule="constant", ema__decay=0,
                   **{**QUIET, **settings})


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
  """A work directory of adapters that were trained for four steps, and the last state."""
  workdir = tmp_path_factory.mktemp("lora")
  config = lora_config(base, 4, sample__every=4, model__alpha=3.0)
  return workdir, train_on(config, workdir)


def command(*words):
  adapters.main([str(word) for word in words])


@pytest.mark.slow
def test_training_changes_the_adapters_alone(run, base):
  workdir, state = run
  given = export.read(base)
  assert_same_bits(state.frozen["params"]["base"], given.variables["params"])
  assert set(state.params) == {"adapters"}
  ups = [x for path, x in trees.flatten(state.params).items() if path.endswith("/up")]
  assert ups and all(np.any(x) for x in ups)
  exported = export.read(workdir / "export")
  assert_same_bits(exported.variables["params"]["base"], given.variables["params"])
  assert exported.tokenizers == given.tokenizers
  # The base's sampling options, which the tiny one has otherwise than the class.
  assert exported.config.sample.options.to_dict() == given.config.sample.options.to_dict()
  assert exported.config.sample.options.steps == 2
  assert (workdir / "samples" / "step_00000004.png").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on(run, base, tmp_path, at_step):
  config = lora_config(base, 4, model__alpha=3.0)
  at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
  train_on(config, tmp_path)
  assert saved_steps(tmp_path)[-1] == 2
  at_step(None, None)
  again = train_on(config, tmp_path)
  assert again.step == 4
  assert_same_bits(again, run[1])


@pytest.mark.full
def test_several_devices_compute_the_same(run, base, tmp_path):
  config = lora_config(base, 4, sample__every=4, model__alpha=3.0, mesh__fsdp=2)
  train_on(config, tmp_path, devices=4)
  losses = [[line["adapters/loss"] for line in metrics(where)] for where in (run[0], tmp_path)]
  np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_merged_they_draw_the_same(run, base, tmp_path):
  source = run[0] / "export"
  command("merge", f"--export={source}", f"--output={tmp_path / 'merged'}")
  merged = export.read(tmp_path / "merged")
  assert merged.config.to_dict() == export.read(base).config.to_dict()
  drawn = [t2i_jax.load(path)(PROMPTS, seed=1).astype(int)
           for path in (source, tmp_path / "merged", base)]
  assert np.abs(drawn[0] - drawn[1]).max() <= 1
  assert np.abs(drawn[0] - drawn[2]).max() > 10
  command("merge", f"--export={source}", f"--output={tmp_path / 'none'}", "--strength=0")
  assert_same_bits(export.read(tmp_path / "none").variables, export.read(base).variables)


@pytest.mark.slow
@pytest.mark.parametrize("options", [
  {}, {"model__targets": "middle_attention/.*(query|out)$,^denoiser/conv_in$"},
], ids=["default", "chosen"])  # fmt: skip
def test_saved_and_loaded_they_are_the_same(run, base, tmp_path, options):
  source, file = run[0] / "export", tmp_path / "lora.safetensors"
  if options:
    train_on(lora_config(base, 2, model__alpha=3.0, **options), tmp_path / "run")
    source = tmp_path / "run" / "export"
  command("save", f"--export={source}", f"--output={file}")
  command("load", f"--base={base}", f"--source={file}", f"--output={tmp_path / 'loaded'}")
  one, other = export.read(source), export.read(tmp_path / "loaded")
  assert_same_bits(other.variables, one.variables)
  assert other.tokenizers == one.tokenizers and other.config.data == one.config.data
  assert other.config.sample.options == one.config.sample.options
  command("save", f"--export={tmp_path / 'loaded'}", f"--output={tmp_path / 'again.safetensors'}")
  assert file.read_bytes() == (tmp_path / "again.safetensors").read_bytes()
  pictures = [t2i_jax.load(path)(PROMPTS, seed=1) for path in (source, tmp_path / "loaded")]
  np.testing.assert_array_equal(*pictures)
  # And trained further.
  layers = other.config.model.layers
  assert len(layers) == (7 if options else 0)
  settings = {"model__layers": json.dumps(layers)} if layers else {}
  further = lora_config(base, 1, init_from=tmp_path / "loaded", **settings)
  assert train_on(further, tmp_path / "further").step == 1


@pytest.mark.parametrize("words, message", [
  (["loda"], "unknown what to do with adapters 'loda'; did you mean 'load'?"),
  (["load", "--base=x"], "load needs --source; see python -m t2i_jax.adapters --help"),
  (["merge", "--export=x", "--output=y", "--source=z"], "--source is not of merge; leave it out"),
  (["merge", "--export=nowhere", "--output=y"], "no export at 'nowhere'"),
  (["save", "--export=x", "--output=y"], "--output=y is no .safetensors file; name one"),
  (["save", "--export=x", "--output=y.safetensors", "--dtype=int8"], "unknown --dtype 'int8'"),
])  # fmt: skip
def test_flags_that_are_wrong(words, message, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as exit:
    command(*words)
  assert exit.value.code == 2
  assert message in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_has_no_adapters_is_said(base, tmp_path, capsys):
  with pytest.raises(SystemExit):
    command("merge", f"--export={base}", f"--output={tmp_path / 'a'}")
  assert "is an export of ddpm, which has no adapters" in capsys.readouterr().err


def test_layers_without_public_names_are_said():
  system = assembly.build_system(config_of(DDPM))
  with pytest.raises(UserError, match="the layers of DDPM have no public names"):
    adapters.parts_of(system)


@pytest.mark.slow
def test_options_of_sampling_are_the_base_s(base, tmp_path):
  with pytest.raises(UserError, match="unknown sampling option of components.base 'stepz'; did"):
    train_on(lora_config(base, 1, sample__options__stepz=3), tmp_path)
  with pytest.raises(UserError, match="config key sample.options.steps=many: expected int"):
    train_on(lora_config(base, 1, sample__options__steps="many"), tmp_path)
