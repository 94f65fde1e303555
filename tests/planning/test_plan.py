"""`python -m t2i_jax.plan`: reports, advice, and what it refuses; a compilation where it can be."""

import dataclasses
import importlib.util
import subprocess
import sys
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict
from runs import ROOT

from t2i_jax import config_files, plan
from t2i_jax.parallel.chips import CHIPS
from t2i_jax.planning import published
from t2i_jax.planning.collectives import Traffic
from t2i_jax.planning.report import Report, advice, build, table

REPORT = Report(
  batch_size=64, chips=16, chip=CHIPS["v5e"], trained=1000, frozen=10, flops=16 * 197e12,
  needs={"arguments": 6 << 30, "outputs": 6 << 30, "temporaries": 4 << 30, "peak": 10 << 30},
  moved=819e9, collectives={"all-gather": Traffic(3, 2 << 30, 400e9)}, seconds=60.0,
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


def config_of(**model):
  return ConfigDict({
    "model": model, "train": {"batch_size": 64}, "precision": {"frozen": "float32"}
  })  # fmt: skip


def test_what_does_not_fit_is_told_what_to_do():
  large = dataclasses.replace(REPORT, needs={**REPORT.needs, "peak": 20 << 30})
  assert not large.fits
  mesh = SimpleNamespace(size=16, shape={"fsdp": 1, "tensor": 1})
  lines = advice(large, config_of(remat=False), mesh)
  assert lines[0].startswith("--config.mesh.data=1 --config.mesh.fsdp=-1 spreads parameters")
  assert "--config.model.remat=True" in lines[1]
  assert any("--config.train.batch_size=32" in line for line in lines)
  assert "precision.frozen=bfloat16" in " ".join(lines)
  spread = SimpleNamespace(size=16, shape={"fsdp": 16, "tensor": 2})
  text = " ".join(advice(large, config_of(remat="full"), spread))
  assert "fsdp=-1" not in text and "remat" not in text and "tensor" not in text
  refused = dataclasses.replace(REPORT, needs={}, refusal="RESOURCE_EXHAUSTED: 20 GiB")
  assert not refused.fits and "RESOURCE_EXHAUSTED" in table(refused)


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


@pytest.mark.parametrize("flags, message", [
  (["--topology=v9:2x2"], "topology 'v9:2x2' is unknown"),
  (["--topology=v5e:4x4", "--slices=0"], "--slices=0: use 1 or more"),
  (["--topology=v5e:4x4", "--component=first_stage"], "write NAME=PUBLISHED"),
])  # fmt: skip
def test_wrong_flags_are_one_line(flags, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    plan.main([f"--config={ROOT / 'configs/ddpm.py'}:size=tiny", *flags])
  assert stopped.value.code == 2
  assert message in capsys.readouterr().err


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
