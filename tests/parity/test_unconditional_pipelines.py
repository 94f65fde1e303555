"""DDPMs of diffusers in pixels: the same pictures from the same noise, by folders of either."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")
diffusers = pytest.importorskip("diffusers", reason="the reference: install t2i_jax[parity]")

from diffusers.pipelines.ddim import pipeline_ddim  # noqa: E402

import t2i_jax  # noqa: E402
from t2i_jax import convert, export  # noqa: E402
from t2i_jax.diffusion.solvers import start_noise  # noqa: E402
from t2i_jax.systems.randomness import picture_keys  # noqa: E402
from t2i_jax.weights.stored import open_weights  # noqa: E402

SIDE, STEPS, SEED = 16, 10, 1
# As the first DDPMs: one head, zeros at two sides, sines first.
UNET = {
  "sample_size": SIDE, "block_out_channels": (32, 64), "layers_per_block": 1, "norm_eps": 1e-6,
  "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": None,
  "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "downsample_padding": 0,
  "flip_sin_to_cos": False, "freq_shift": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
  """The folder that diffusers writes, and our export of it."""
  torch.manual_seed(0)
  place = tmp_path_factory.mktemp("ddpm")
  # What random weights predict as v makes pictures between black and white; as noise it does not.
  scheduler = diffusers.DDPMScheduler(
    variance_type="fixed_large", prediction_type="v_prediction"
  )
  diffusers.DDPMPipeline(diffusers.UNet2DModel(**UNET), scheduler).save_pretrained(
    place / "folder"
  )
  convert.main([f"--source={place / 'folder'}", f"--output={place / 'export'}"])
  return place


def drawn_by_diffusers(folder, noise, monkeypatch):
  made = diffusers.DDIMPipeline.from_pretrained(folder, local_files_only=True)
  made.set_progress_bar_config(disable=True)
  start = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
  monkeypatch.setattr(pipeline_ddim, "randn_tensor", lambda *_, **__: start)
  # Like ours, the noise is that of the clipped picture.
  pictures = made(
    len(noise), num_inference_steps=STEPS, output_type="np", use_clipped_model_output=True
  ).images
  return 255 * pictures


def test_pictures_are_the_same(place, monkeypatch):
  """By the reference, by our export of its folder, and by the reference of our folder."""
  exported = export.read(place / "export")
  options = exported.config.sample.options.to_dict()
  assert (options["solver"], options["steps"], options["variance"]) == ("ddpm", 1000, "large")
  options |= {"solver": "ddim", "steps": STEPS, "variance": "small"}
  ours = t2i_jax.load(place / "export")(["", "what is asked for is nothing"], seed=SEED, **options)
  keys = picture_keys(jnp.uint32(SEED), jnp.arange(2))
  noise = np.asarray(start_noise(keys, (SIDE, SIDE, 3)))
  theirs = drawn_by_diffusers(place / "folder", noise, monkeypatch)
  assert np.abs(ours - theirs).max() <= 2
  assert 10 < np.std(theirs) < 100 and np.abs(theirs[0] - theirs[1]).max() > 10

  convert.main([f"--source={place / 'export'}", f"--output={place / 'back'}", "--to=diffusers"])
  assert np.abs(drawn_by_diffusers(place / "back", noise, monkeypatch) - ours).max() <= 2
  again = diffusers.DiffusionPipeline.from_pretrained(place / "back", local_files_only=True)
  assert isinstance(again, diffusers.DDPMPipeline)
  assert again.scheduler.config.variance_type == "fixed_large"
  back, given = (open_weights(place / folder / "unet") for folder in ("back", "folder"))
  assert set(back) == set(given)
  assert all(back[name].read().tobytes() == given[name].read().tobytes() for name in given)


def test_all_in_one_folder(place, tmp_path):
  """As the first ones were published."""
  flat = tmp_path / "flat"
  for part in ("unet", "scheduler"):
    shutil.copytree(place / "folder" / part, flat, dirs_exist_ok=True)
  shutil.copy(place / "folder" / "model_index.json", flat)
  convert.main([f"--source={flat}", f"--output={tmp_path / 'export'}"])
  names = ("variables.safetensors", "tokenizer.json")
  assert all(
    (tmp_path / "export" / name).read_bytes() == (place / "export" / name).read_bytes()
    for name in names
  )


def test_what_is_no_such_pipeline_is_one_line(place, tmp_path, capfd):
  copy = shutil.copytree(place / "folder", tmp_path / "copy")

  def fails(message, part="unet/config.json", **values):
    given = json.loads((place / "folder" / part).read_text())
    (copy / part).write_text(json.dumps({**given, **values}))
    with pytest.raises(SystemExit):
      convert.main([f"--source={copy}", f"--output={tmp_path / 'new'}"])
    (line,) = capfd.readouterr().err.splitlines()
    assert message in line
    (copy / part).write_text(json.dumps(given))

  fails("a U-Net with labels", num_class_embeds=5)
  fails("a U-Net from 1 channels to 1", in_channels=1, out_channels=1)
  fails("give the side of the pictures with --resolution", sample_size=None)
  fails("a U-Net of class UNet1DModel is not known", _class_name="UNet1DModel")
  fails("beta_schedule=sigmoid", "scheduler/scheduler_config.json", beta_schedule="sigmoid")
  fails("known: StableDiffusionPipeline", "model_index.json", _class_name="ScoreSdeVePipeline")
  assert not (tmp_path / "new").exists()
