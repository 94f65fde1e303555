"""Training over pictures of several shapes: compilations, resuming, and who takes which shape."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import ROOT, assert_same_bits, config_of, metrics, saved_steps, train_on
from two_stage import Shrinker

from t2i_jax import bucketing, caches, main
from t2i_jax.errors import UserError
from t2i_jax.systems import base, load, trees
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.diffusion.ddpm import DDPM
from t2i_jax.systems.diffusion.dit import DiT
from t2i_jax.systems.diffusion.sd3 import SD3
from t2i_jax.systems.diffusion.stable_diffusion import SDXL
from t2i_jax.systems.diffusion.u_vit import UViT
from t2i_jax.training.compiled import CompiledStep

SHAPES = ((24, 8), (16, 16), (8, 24))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  folder = tmp_path_factory.mktemp("photos")
  rng, lines = np.random.default_rng(0), []
  for n in range(24):
    size = ((30, 90), (60, 60), (90, 30))[n % 3]
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(folder / f"{n}.png")
    lines.append({"file": f"{n}.png", "caption": f"thing {n}",
                  "split": "test" if n >= 18 else "train"})
  (folder / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return folder


def bucketed(path, photos, **settings):
  return config_of(path, dataset="folder", **{
    "data__options__path": photos, "data__options__buckets": "24x8,16x16,8x24",
    "train__batch_size": 4, **settings,
  })  # fmt: skip


def small_text(name):
  """A config, and a text encoder that is trained with it."""
  return ROOT / "configs" / f"{name}.py", {
    "text__encoder": "transformer", "text__width": 32, "text__layers": 1, "text__heads": 2,
    "text__vocab_size": 300, "text__length": 8,
  }  # fmt: skip


@pytest.mark.usefixtures("compiled_programs")
@pytest.mark.parametrize("path, settings", [
  pytest.param(ROOT / "tests" / "many_shapes.py", {}, id="one convolution"),
  pytest.param(*small_text("dit"), id="dit", marks=pytest.mark.full),
])  # fmt: skip
def test_a_run_over_three_shapes_is_killed_and_goes_on(
  path, settings, photos, tmp_path, at_step, monkeypatch
):
  config = bucketed(path, photos, train__duration=9, checkpoint__every=2, sample__every=0,
                    evaluate__every=9, evaluate__batches=2, log__every=1, **settings)
  steps, build, due = [], CompiledStep.__init__, [True]
  monkeypatch.setattr(CompiledStep, "__init__",
                      lambda self, *given: (steps.append(self), build(self, *given))[1])
  whole = train_on(config, tmp_path / "whole")
  shapes = {shape for _, leaves in steps[0]._programs for shape, kind in leaves if kind == np.uint8}
  assert shapes == {(4, *shape, 3) for shape in SHAPES}

  def kill():
    if due:
      due.pop()
      raise RuntimeError("killed")

  at_step(5, kill)
  with pytest.raises(RuntimeError, match="killed"):
    train_on(config, tmp_path / "halves")
  assert saved_steps(tmp_path / "halves")[-1] == 4
  halves = train_on(config, tmp_path / "halves")
  assert_same_bits(whole, halves)
  assert [step.compilations for step in steps] == [3, 3, 3]
  one, other = metrics(tmp_path / "whole"), metrics(tmp_path / "halves")
  assert one == other and {"denoiser/loss"} < {key for line in one for key in line}


TEXT = TextConditioner(length=4, vocab_size=16, width=8, layers=1, heads=2)
UNET = dict(channels=8, multipliers=(1, 2), blocks=1, groups=4, head_channels=8,
            attention_levels=(1,))
STAGE = {"components": {"first_stage": Shrinker(TEXT, resolution=16)}}
TRANSFORMER = dict(width=8, depth=2, heads=2)
TINY = {
  "ddpm": DDPM(TEXT, resolution=16, draft=4, patch=2, coordinates=2, **UNET),
  "dit": DiT(TEXT, resolution=16, cross_attention=True, **TRANSFORMER),
  "sd3": SD3(TEXT, resolution=16, grid=8, largest=16, **TRANSFORMER, **STAGE),
  "sdxl": SDXL(TEXT, resolution=16, heads=0, depths=(1, 1), middle_depth=1, **UNET, **STAGE),
}


def a_batch(height, width):
  ids = jnp.ones((2, 4), jnp.int32)
  return {
    "image": jnp.zeros((2, height, width, 3), jnp.uint8),
    "text": {"text_encoder": {"ids": ids, "mask": ids > 0}},
    "size": jnp.array([[30, 90], [90, 30]]), "crop": jnp.array([[0, 1], [2, 0]]),
  }  # fmt: skip


@pytest.mark.parametrize("name", TINY)
def test_systems_train_on_every_shape(name):
  """By tracing alone: parameters that were made for squares take others."""
  system = TINY[name]
  shapes = ((32, 16), (16, 48))
  bucketing.check(system, shapes)
  frozen = {}
  if STAGE["components"].items() <= system.components.items():
    frozen = {"params": {"first_stage": jax.eval_shape(
      system.components["first_stage"].init, jax.random.key(0), a_batch(16, 16)
    )["params"]}}
  made = jax.eval_shape(system.init, jax.random.key(0), a_batch(16, 48), frozen)
  variables = trees.merge(made, frozen)
  for shape in shapes:
    loss, _ = jax.eval_shape(system.loss, variables, a_batch(*shape), jax.random.key(1), 0)
    assert loss.shape == ()


def test_the_target_of_sdxl_is_the_shape_of_the_bucket():
  system, batch = TINY["sdxl"], a_batch(16, 48)

  def sizes(batch):
    variables = system.text.init(jax.random.key(0), batch, {})
    return system.given(variables, batch).extra["sizes"]

  np.testing.assert_array_equal(jax.jit(sizes)(batch), [[30, 90, 0, 1, 16, 48],
                                                        [90, 30, 2, 0, 16, 48]])
  latent = {**batch, "latent": jnp.zeros((2, 8, 8, 8))}
  del latent["image"]
  np.testing.assert_array_equal(jax.jit(sizes)(latent)[:, 4:], [[16, 16]] * 2)


def test_systems_that_take_squares_alone_say_which_take_others(photos, tmp_path):
  assert all(hasattr(load(name), "shape_of") for name in bucketing.SYSTEMS if name != "lora")
  others = "systems whose networks take several shapes: ddpm"
  with pytest.raises(UserError, match=f"learned the place of each token.*{others}"):
    bucketing.check(UViT(TEXT, resolution=16, **TRANSFORMER), SHAPES)
  with pytest.raises(UserError, match="pictures of 20 x 8 do not fit the network: use multiples"):
    bucketing.check(TINY["ddpm"], ((20, 8),))
  path, settings = small_text("vae")
  config = bucketed(path, photos, train__duration=1, train__batch_size=8, **settings)
  with pytest.raises(UserError, match=f"ConditionalVAE trains on squares alone.*{others}"):
    main.train(config, str(tmp_path / "vae"))


def test_latents_are_of_squares(photos, tmp_path):
  config = bucketed(ROOT / "tests" / "many_shapes.py", photos)

  class Cache:
    shape, dtype, statistics = (8, 8, 8), np.dtype(np.float16), {"mean": 0.0, "std": 1.0}
    data = {"seed": 0}

  latents = caches.Latents.__new__(caches.Latents)
  latents._config, latents.field = config, base.Field((8, 8, 8), "float16")
  latents._open = lambda split: Cache
  with pytest.raises(UserError, match="latents are of squares; leave it or data.options.buckets"):
    latents.source("train", 16)
