"""`python -m t2i_jax.plan`: reports, advice, and what it refuses; a compilation where it can be."""

import dataclasses
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest
from ml_collections import ConfigDict
from runs import ROOT

from t2i_jax import config_files, plan
from t2i_jax.errors import UserError
from t2i_jax.parallel.chips import CHIPS
from t2i_jax.parallel.mesh import AXES, make_mesh
from t2i_jax.planning import published, report
from t2i_jax.planning.collectives import Traffic
from t2i_jax.planning.report import Report, advice, build, table
from t2i_jax.training.step import check_division

REPORT = Report(
  batch_size=64, chips=16, chip=CHIPS["v5e"], trained=1000, frozen=10, flops=16 * 197e12,
  needs={"arguments": 6 << 30, "outputs": 6 << 30, "temporaries": 4 << 30, "peak": 10 << 30},
  moved=819e9, collectives={"all-gather": Traffic(3, 2 << 30, 400e9)}, seconds=60.0,
  unit=16,
)  # fmt: skip


def test_the_slowest_part_bounds_the_step():
  assert REPORT.bounds == {"arithmetic": 1.0, "memory": 1.0, "links": 2.0}
  assert REPORT.fits
  text = table(REPORT)
  assert "2.00 s a step, bound by links: 32 pictures/s, 50% of the chips' arithmetic" in text
  assert "64 (4 a chip)" in text and "16.00 GiB, fits" in text


def test_the_data_centres_network_bounds_several_slices():
  sent = {**REPORT.collectives, "all-reduce between slices": Traffic(5, 1 << 30, network=12.5e9)}
  several = dataclasses.replace(REPORT, collectives=sent)
  assert several.bounds == {**REPORT.bounds, "network": 4.0}
  assert "4.00 s a step, bound by network" in table(several)
  # Of a chip whose network's speed is not published, nothing is said.
  assert "network" not in dataclasses.replace(several, chip=CHIPS["v4"]).bounds


SHAPE = dict.fromkeys(AXES, 1)


def config_of(**model):
  return ConfigDict({
    "model": model, "train": {"batch_size": 64, "accumulate": 1},
    "precision": {"frozen": "float32"},
  })  # fmt: skip


def test_what_does_not_fit_is_told_what_to_do():
  large = dataclasses.replace(REPORT, needs={**REPORT.needs, "peak": 20 << 30})
  assert not large.fits
  mesh = SimpleNamespace(size=16, shape=SHAPE)
  lines = advice(large, config_of(remat=False), mesh)
  assert lines[0].startswith("--config.mesh.data=1 --config.mesh.fsdp=-1 spreads parameters")
  assert "over 16 chips;" in lines[0]
  two = SimpleNamespace(size=16, shape={**SHAPE, "slice": 2})
  assert "over 8 chips of each slice;" in advice(large, config_of(), two)[0]
  assert "--config.model.remat=True" in lines[1]
  assert any("--config.train.batch_size=32" in line for line in lines)
  assert "precision.frozen=bfloat16" in " ".join(lines)
  spread = SimpleNamespace(size=32, shape={**SHAPE, "fsdp": 16, "tensor": 2})
  text = " ".join(advice(large, config_of(remat="full"), spread))
  assert "fsdp=-1" not in text and "remat" not in text and "tensor" not in text
  refused = dataclasses.replace(REPORT, needs={}, refusal="RESOURCE_EXHAUSTED: 20 GiB")
  assert not refused.fits and "RESOURCE_EXHAUSTED" in table(refused)


@pytest.mark.parametrize("pictures, accumulate, less", [(3, 3, 16), (8, 8, 64), (6, 6, 48)])
def test_advice_can_be_followed(pictures, accumulate, less):
  """Every part of the mesh gets a picture in every microbatch, as training wants it."""
  large = dataclasses.replace(REPORT, batch_size=16 * pictures, needs={}, refusal="no")
  text = " ".join(advice(large, config_of(), SimpleNamespace(size=16, shape=SHAPE)))
  assert f"train.accumulate={accumulate} " in text and f"train.batch_size={less} " in text
  parts = build(config_files.load_config(f"{ROOT / 'configs/vae.py'}"), {}, True)
  check_division(parts.system, large.batch_size, accumulate, 16)
  one_loss = " ".join(advice(dataclasses.replace(large, divisible=False), config_of(),
                             SimpleNamespace(size=16, shape=SHAPE)))
  assert "accumulate" not in one_loss and f"train.batch_size={less} " in one_loss


def test_what_training_refuses_is_refused(monkeypatch):
  config = config_files.load_config(
    f"{ROOT / 'configs/vae.py'}:size=tiny", {"train.batch_size": "8", "train.accumulate": "4"}
  )
  mesh = make_mesh({"data": 4}, jax.devices()[:4])
  with pytest.raises(UserError, match="does not divide into train.accumulate=4 microbatches, each"):
    report.measure(config, mesh, CHIPS["v5e"], build(config, {}, True))
  # A search takes none but batches that divide.
  tried = []

  def measured(config, mesh, chip, parts, effort):
    tried.append((config.model.get("remat"), config.train.batch_size))
    fits = config.train.batch_size <= 100
    return dataclasses.replace(REPORT, batch_size=tried[-1][1], refusal="" if fits else "no")

  monkeypatch.setattr(report, "measure", measured)
  monkeypatch.setattr("t2i_jax.parallel.topology.slice_mesh", lambda *given: mesh)
  plan.main([f"--config={ROOT / 'configs/vae.py'}:size=tiny", "--topology=v5e:2x2", "--search",
             "--config.train.accumulate=4"])
  assert tried and all(size % 16 == 0 for _, size in tried)
  assert max(size for _, size in tried if size <= 100) == 96


@pytest.mark.parametrize("name", published.NAMES)
def test_published_components_are_what_they_say(name):
  part = published.component(name, 256, "float32")
  if name in published.AUTOENCODERS:
    channels = 16 if "c16" in name else 4
    assert published.latents_of(part, 256).shape == (32, 32, 2 * channels)
    return
  width, pooled = {
    "clip-l": (768, 768), "clip-l-xl": (768, 768), "clip-l-sd3": (768, 768),
    "openclip-h": (1024, 1024), "openclip-bigg": (1280, 1280), "t5-xxl": (4096, None),
  }[name]
  features = published.features_of(part)
  assert features["sequence"].shape == (1, 256 if pooled is None else 77, width)
  assert pooled is None or features["pooled"].shape == (1, pooled)


def test_stored_features_and_latents_leave_encoders_out_of_the_step():
  config = config_files.load_config(f"{ROOT / 'configs/stable_diffusion.py'}")
  names = published.OF_SYSTEM["stable_diffusion"]
  parts = build(config, names, encode=False)
  assert parts.frozen == {} or not any(parts.frozen.values())
  assert "latent" in parts.system.batch_spec()
  whole = build(config, names, encode=True)
  assert set(whole.frozen["params"]) == {"first_stage", "text_encoder"}
  assert "image" in whole.system.batch_spec()


@pytest.mark.parametrize("arg, found", [
  ("dit.py:size=tiny", {}),
  ("sd3.py:size=small,encoder=transformer,dataset=scenes", {}),
  ("u_vit.py:size=S/2", {"first_stage": "kl-f8c4"}),
  ("ldm.py", {"first_stage": "kl-f8c4"}),
])  # fmt: skip
def test_what_models_pixels_has_no_first_stage(arg, found):
  config = config_files.load_config(f"{ROOT / 'configs'}/{arg}")
  assert published.names_of(config) == found
  named = {"first_stage": "kl-f8c16"}
  assert published.names_of(config, named) == named
  if not found:
    assert "image" in build(config, {}, encode=False).system.batch_spec()


@pytest.mark.parametrize("flags, message", [
  (["--topology=v9:2x2"], "topology 'v9:2x2' is unknown"),
  (["--topology=v5e:2x2x2"], "there is no slice v5e:2x2x2: those of v5e have 2 sides"),
  (["--topology=v5p:2x2"], "have 3 sides, such as v5p:4x4x4"),
  (["--topology=v6e:32x32"], "up to 256 chips; several slices are --slices=N"),
  (["--topology=v5e:0x4"], "there is no slice v5e:0x4"),
  (["--topology=v5e:4x4", "--slices=0"], "--slices=0: use 1 or more"),
  (["--topology=v5e:4x4", "--component=first_stage"], "write NAME=PUBLISHED"),
])  # fmt: skip
def test_wrong_flags_are_one_line(flags, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    plan.main([f"--config={ROOT / 'configs/ddpm.py'}:size=tiny", *flags])
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


def test_help_names_the_published_components(capsys):
  with pytest.raises(SystemExit):
    plan.main(["--help"])
  words = capsys.readouterr().out.replace(",", " ").replace(";", " ").split()
  assert set(published.NAMES) <= set(words)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler: pip install 'jax[tpu]'"
)
def test_a_step_is_compiled_for_a_slice():
  done = subprocess.run(
    [sys.executable, "-m", "t2i_jax.plan", f"--config={ROOT / 'configs/vae.py'}:size=tiny",
     "--topology=v5e:2x2", "--config.mesh.data=1", "--config.mesh.fsdp=-1"],
    capture_output=True, text=True, timeout=600, cwd=ROOT,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert "16.00 GiB, fits" in done.stdout and "all-" in done.stdout
