"""An autoencoder that is trained on another system's export, and what its own export can do."""

import json
import os
import signal

import numpy as np
import pytest
from runs import assert_same_bits, config_of, metrics, saved_steps, train_on

from t2i_jax import assembly, export
from t2i_jax.errors import UserError
from t2i_jax.systems.capabilities import FirstStage

pytestmark = pytest.mark.usefixtures("compiled_programs")
QUIET = {"evaluate__every": 0, "sample__every": 0}


@pytest.fixture(scope="module")
def perceptual(tmp_path_factory, compiled_programs):
  """The export of a small classifier."""
  folder = tmp_path_factory.mktemp("classifier") / "run"
  # Its own optimizer, Muon, takes longest to compile, and is not what is asked here.
  given = config_of("configs/feature_net.py", train__duration=2, optimizer__name="adamw", **QUIET)
  train_on(given, folder)
  return folder / "export"


def config(path, **settings):
  return config_of("configs/kl_autoencoder.py", components__perceptual=path, **settings)


@pytest.fixture(scope="module")
def run(tmp_path_factory, perceptual):
  """Four steps, of which the discriminator moves in the last two."""
  folder = tmp_path_factory.mktemp("autoencoder") / "run"
  given = config(perceptual, sample__every=2, sample__count=3, evaluate__every=4,
                 evaluate__batches=1)
  return folder, train_on(given, folder)


def test_the_classifier_learned_nothing_of_text(perceptual):
  exported = export.read(perceptual)
  assert exported.tokenizers.of == {} and set(exported.variables["params"]) == {"network"}
  assert "components.NAME=PATH" in (perceptual / "README.md").read_text()


@pytest.mark.slow
def test_the_export_encodes_decodes_and_compares(run):
  folder, state = run
  exported = export.read(folder / "export")
  assert set(exported.variables["params"]) == {"encoder", "decoder", "perceptual"}
  system = assembly.build_with(exported.config, exported.components)
  assert isinstance(system, FirstStage) and system.perceptual.name == "feature_net"
  images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype("f4")
  moments = system.encode(exported.variables, images)
  assert moments.shape == (2, *system.latent_shape(16)[:2], 8)
  assert system.decode(exported.variables, moments[..., :4]).shape == images.shape
  assert state.updates["discriminator"] == 2 and state.updates["autoencoder"] == 4


@pytest.mark.slow
def test_metrics_bear_the_perceptual_network_s_name(run):
  folder, _ = run
  lines = metrics(folder)
  trained = {key for line in lines for key in line if key.startswith("autoencoder/")}
  assert {"autoencoder/feature_net", "autoencoder/adversarial_weight"} <= trained
  assert any("held_out_pairs/psnr" in line and "held_out_pairs/feature_net" in line
             for line in lines)  # fmt: skip
  assert "lpips" not in json.dumps(lines)
  weights = [line["autoencoder/adversarial_weight"] for line in lines
             if "autoencoder/adversarial_weight" in line]  # fmt: skip
  assert weights[:2] == [0, 0] and min(weights[2:]) > 0


@pytest.mark.slow
def test_reconstructions_are_drawn_beside_the_pictures(run):
  folder, _ = run
  names = sorted(path.name for path in (folder / "samples").iterdir())
  assert names == ["step_00000002.png", "step_00000004.png"]


@pytest.mark.slow
def test_resumes_bit_for_bit_over_the_discriminator_s_start(run, perceptual, tmp_path, at_step):
  """Asked to stop, so that both parts are steps of the whole run's own program."""
  given = config(perceptual, **QUIET)
  at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM))
  train_on(given, tmp_path / "parts")
  assert saved_steps(tmp_path / "parts")[-1] == 2
  at_step(None, None)
  parts = train_on(given, tmp_path / "parts")
  assert parts.step == 4 and parts.updates["discriminator"] == 2
  assert_same_bits(parts.replace(frozen={}), run[1].replace(frozen={}))


def test_without_the_component_nothing_begins(tmp_path):
  with pytest.raises(UserError, match="vgg16-397923af.pth .*feature_net"):
    train_on(config_of("configs/kl_autoencoder.py"), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


def test_data_without_labels_teaches_no_classifier(tmp_path):
  given = config_of("configs/feature_net.py", data__options__levels="one,two")
  with pytest.raises(UserError, match="levels one, two have no labels"):
    train_on(given, tmp_path / "run")
