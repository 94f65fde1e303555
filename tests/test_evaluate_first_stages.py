"""The command that measures, of autoencoders: what comes back of a split's pictures."""

import functools
import html
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import TOY, config_of, write_export

from t2i_jax import assembly, evaluate, export, run_data
from t2i_jax.evaluation import folder
from t2i_jax.evaluation.prompt_sets import real_pictures
from t2i_jax.metrics import latents, pixels
from t2i_jax.systems.capabilities import reconstruct

pytestmark = pytest.mark.usefixtures("compiled_programs")

SPLIT = "held_out_pairs"
METRICS = ("psnr", "ssim", "latents", "rfd_feature_net", "feature_net_distance", "fd_feature_net")


@pytest.fixture(scope="module")
def exports(tmp_path_factory, compiled_programs):
  """An autoencoder and a classifier with random numbers, and a system that draws."""
  path = tmp_path_factory.mktemp("exports")
  autoencoder = config_of("configs/kl_autoencoder.py", model__perceptual_weight=0.0)
  return {
    "autoencoder": write_export(path / "autoencoder", autoencoder),
    "network": write_export(path / "network", config_of("configs/feature_net.py")),
    "toy": write_export(path / "toy", config_of(TOY)),
  }


def flags(exports, *more, pictures=20, metrics=METRICS):
  return [f"--export={exports['autoencoder']}", f"--split={SPLIT}", f"--pictures={pictures}",
          "--batch-size=8", f"--network=feature-net={exports['network']}",
          *(f"--metric={name}" for name in metrics), *map(str, more)]


@pytest.fixture(scope="module")
def whole(exports, tmp_path_factory):
  path = tmp_path_factory.mktemp("whole") / "out"
  evaluate.main(flags(exports, f"--output={path}"))
  return path


@pytest.fixture
def fails(fails):
  """`fails(flag...)`, of `evaluate`."""
  return functools.partial(fails, evaluate)


def rows(path):
  found = json.loads((path / "scores.json").read_text())["results"]
  return [{k: v for k, v in row.items() if k not in ("seconds_a_picture", "warm")} for row in found]


def test_scores_are_of_what_the_autoencoder_gives_back(exports, whole):
  exported = export.read(exports["autoencoder"])
  system = assembly.build_with(exported.config, exported.components)
  (images,) = real_pictures(run_data.open_data(exported.config, SPLIT, 16), 20, 20)
  given = jax.jit(lambda x: reconstruct(system, exported.variables, x))(jnp.asarray(images))
  made, moments = map(np.asarray, given)
  (row,) = rows(whole)
  value = {name: result["value"] for name, result in row["results"].items()}
  assert value["psnr"] == pytest.approx(pixels.psnr(made, images).mean(), abs=0.01)
  assert value["ssim"] == pytest.approx(pixels.ssim(made, images).mean(), abs=0.01)
  mean, log_variance = np.split(moments.astype("f8"), 2, axis=-1)
  kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance)
  assert value["latent_kl"] == pytest.approx(kl.mean(), rel=1e-3)
  rng = np.random.default_rng(0)
  draws = mean + np.exp(log_variance / 2) * rng.normal(size=(200, *mean.shape))
  assert value["latent_std"] == pytest.approx(draws.std(), rel=0.01)
  assert value["latent_mean"] == pytest.approx(draws.mean(), abs=0.01)
  channels = row["results"]["latent_kl"]["about"]["channels"]
  np.testing.assert_allclose(channels["kl"], kl.mean(axis=(0, 1, 2)), rtol=1e-3)
  # As many real pictures of the same split: both are distances to the same ones.
  assert value["rfd_scenes"] == pytest.approx(value["fd_scenes"], rel=1e-6)


def test_every_score_says_what_it_is_of(exports, whole):
  (row,) = rows(whole)
  how = (f"scenes, split {SPLIT}, at 16 px, from mean latents in float32, autoencoder "
         f"{export.fingerprint(exports['autoencoder'])[:16]}")
  assert row["reconstruction"] == how and row["export"]["system"] == "kl_autoencoder"
  for name, result in row["results"].items():
    assert result["n"] == 20 and how in result["line"], name
    assert result["about"]["reconstruction"] == how
  better = {name: result["better"] for name, result in row["results"].items()}
  assert better == {"psnr": "higher", "ssim": "higher", "latent_kl": "", "latent_mean": "",
                    "latent_std": "", "rfd_scenes": "lower", "fd_scenes": "lower",
                    "feature_net_distance": "lower"}


def test_the_page_shows_originals_beside_their_reconstructions(whole):
  page = html.unescape((whole / "report.html").read_text())
  assert page.count("data:image/png") == 2 * 12
  assert "<th>original</th><th>autoencoder</th>" in page
  assert "20 real pictures of held_out_pairs, each against what becomes of it" in page
  assert Image.open(whole / "pictures" / f"{SPLIT}.png").width == 2 * (128 + 8)


class Killed(BaseException):
  """In place of a signal that cannot be caught."""


@pytest.mark.full
def test_an_interrupted_command_goes_on(exports, whole, tmp_path, monkeypatch):
  parts, write, count = tmp_path / "parts", folder.Shards.write, 0

  def dying(self, *arguments):
    nonlocal count
    count += 1
    if count == 3:
      raise Killed
    write(self, *arguments)

  with monkeypatch.context() as patch:
    patch.setattr(folder.Shards, "write", dying)
    with pytest.raises(Killed):
      evaluate.main(flags(exports, f"--output={parts}"))
  assert len(list(parts.glob("drawn/*/*/pictures_*.npz"))) == 2
  evaluate.main(flags(exports, f"--output={parts}"))
  assert rows(parts) == rows(whole)


def test_what_a_damaged_state_held_is_measured_again(exports, whole, tmp_path, capfd):
  parts = Path(shutil.copytree(whole, tmp_path / "parts"))
  (state,) = parts.glob("drawn/*/*/state_*.npz")
  content = state.read_bytes()
  state.write_bytes(content[:-40])
  capfd.readouterr()
  evaluate.main(flags(exports, f"--output={parts}"))
  warning = next(x for x in capfd.readouterr().err.splitlines() if x.startswith("warning: "))
  assert str(state) in warning and warning.endswith("; the pictures are measured again")
  assert rows(parts) == rows(whole) and len(state.read_bytes()) == len(content)


def test_another_data_set_size_and_no_metric(exports, tmp_path, capfd, fails):
  given = [f"--export={exports['autoencoder']}", "--data=scenes_two", "--resolution=24",
           "--pictures=8", f"--split={SPLIT}", f"--output={tmp_path / 'out'}"]
  evaluate.main(given)
  (row,) = rows(tmp_path / "out")
  assert list(row["results"]) == ["psnr", "ssim", "latent_kl", "latent_mean", "latent_std"]
  assert row["reconstruction"].startswith(f"scenes levels=('two',), split {SPLIT}, at 24 px")
  assert row["export"]["resolution"] == 24
  message = fails(*(flag for flag in given if not flag.startswith("--data")))
  assert "holds another evaluation: its " in message and "choose another --output" in message


def test_what_can_be_wrong_is_one_line(exports, fails):
  def refused(*more, metrics=("psnr",), pictures=20):
    return fails(*flags(exports, *more, metrics=metrics, pictures=pictures))

  assert refused(f"--export={exports['toy']}") == (
    f"--export={exports['toy']} draws pictures, and --export={exports['autoencoder']} encodes and "
    "decodes real ones; measure them in two commands")
  assert "--sweep is of drawing, and" in refused("--sweep=steps=1,2")
  assert "--each is of drawing, and" in refused("--each=2")
  assert "--guidance is of drawing, and" in refused("--guidance=2")
  assert "latents: pictures of 17 pixels" not in refused("--resolution=17")
  assert "pictures of 17 pixels do not divide by 2" in refused("--resolution=17")
  assert "codebook needs a tokenizer's codes, and a first stage gives" in refused(
    metrics=("codebook",))
  assert ("lpips_distance needs the network lpips-vgg, of which no file was given; give one, or "
          "take feature_net_distance") in refused(metrics=("lpips_distance",))
  message = refused(pictures=10**6)
  assert f"--pictures=1000000: split '{SPLIT}' has " in message and "take fewer" in message
  assert "unknown --data 'coc'; did you mean 'coco'?" in refused("--data=coc")
  assert "--resolution=32 is of first stages, and" in fails(
    f"--export={exports['toy']}", "--resolution=32", "--metric=loss")


def test_channels_that_carry_nothing_are_counted():
  moments = np.zeros((3, 2, 2, 4), np.float32)
  moments[..., 1] = 2.0  # the second channel's means
  found = latents.statistics(np.asarray(latents.sums_of(jnp.asarray(moments))))
  assert found["idle"] == 1
  np.testing.assert_allclose(found["channels"]["kl"], [0, 2])
  np.testing.assert_allclose(found["channels"]["mean"], [0, 2])
  np.testing.assert_allclose(found["channels"]["std"], [1, 1])
  assert found["mean"] == 1 and found["std"] == pytest.approx(np.sqrt(2))
