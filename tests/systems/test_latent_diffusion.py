"""Latent diffusion on a first stage that can be followed by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from two_stage import Shrinker

from t2i_jax.errors import UserError
from t2i_jax.networks.layers.embeddings import timestep_embedding
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Conditioning
from t2i_jax.systems.capabilities import make_options
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.diffusion.latent import LATENTS
from t2i_jax.systems.diffusion.ldm import LDM
from t2i_jax.systems.diffusion.stable_diffusion import SDXL, SDXLOptions, StableDiffusion
from t2i_jax.systems.pictures import normalize_images

TEXT = TextConditioner(length=4, vocab_size=16, width=8, layers=1, heads=2)
STAGE = Shrinker(TEXT, resolution=16)
TINY = dict(resolution=16, channels=8, multipliers=(1, 2), attention_levels=(0,), blocks=1, heads=2,
            groups=4, components={"first_stage": STAGE})  # fmt: skip
SYSTEM = LDM(TEXT, **TINY)
FROZEN = {"params": {"first_stage": {"shrinker": {
  "gain": jnp.float32(2.0), "log_variance": jnp.float32(-60.0),
}}}}  # fmt: skip


def a_batch():
  image = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
  ids = jnp.ones((4, 4), jnp.int32)
  return {"image": jnp.asarray(image), "text": {"text_encoder": {"ids": ids, "mask": ids > 0}}}


def with_scale(scale, shift):
  measured = {"scale": jnp.float32(scale), "shift": jnp.float32(shift)}
  return trees.merge(FROZEN, {LATENTS: {"denoiser": measured}})


def test_latents_are_scaled_to_mean_0_and_deviation_1():
  variables = jax.jit(SYSTEM.init)(jax.random.key(0), a_batch(), FROZEN)
  latents = SYSTEM.clean(trees.merge(variables, FROZEN), a_batch(), jax.random.key(1))
  assert latents.shape == (4, 4, 4, 3)
  np.testing.assert_allclose([latents.mean(), latents.std()], [0.0, 1.0], atol=1e-5)


@pytest.mark.parametrize(
  "changes, expected",
  [
    ({"latent_scale": 0.5, "latent_shift": 0.25}, (0.5, 0.25)),
    ({"latent_statistics": (0.2, 4.0)}, (0.25, 0.2)),
    ({"latent_scale": 0.5, "latent_statistics": (0.2, 4.0)}, (0.5, 0.0)),
  ],
)
def test_a_scale_that_is_given_is_taken(changes, expected):
  system = dataclasses.replace(SYSTEM, **changes)
  measured = jax.jit(
    lambda: system.init(jax.random.key(0), a_batch(), FROZEN)[LATENTS]["denoiser"]
  )()
  np.testing.assert_allclose((measured["scale"], measured["shift"]), expected, rtol=1e-6)


def test_finishing_inverts_what_encoding_did():
  image = jnp.repeat(jnp.repeat(jnp.linspace(-0.9, 0.9, 48).reshape(1, 4, 4, 3), 4, 1), 4, 2)
  variables = with_scale(0.4, 0.3)
  latents = SYSTEM.encoded(variables, image)
  np.testing.assert_allclose(latents, (2.0 * image[:, ::4, ::4] - 0.3) * 0.4, atol=1e-6)
  np.testing.assert_allclose(SYSTEM.finish(variables, latents), image, atol=1e-6)


def test_stored_moments_are_taken_as_the_encoder_s():
  moments = STAGE.encode(FROZEN["params"] and trees.group(FROZEN, "first_stage"),
                         normalize_images(a_batch()["image"]))
  stored = {**a_batch(), "latent": moments}
  del stored["image"]
  key, variables = jax.random.key(3), with_scale(1.0, 0.0)
  np.testing.assert_array_equal(
    SYSTEM.clean(variables, stored, key), SYSTEM.clean(variables, a_batch(), key)
  )


def test_a_latent_is_known_where_all_its_pixels_are():
  known = np.ones((1, 16, 16, 1), bool)
  known[0, 5, 9] = False
  expected = np.ones((1, 4, 4, 1))
  expected[0, 1, 2] = 0.0
  np.testing.assert_array_equal(SYSTEM.kept(jnp.asarray(known)), expected)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"components": {}}, "set components.first_stage=PATH"),
    ({"components": {"first_stage": STAGE, "other": STAGE}}, "takes no component 'other'"),
    ({"components": {"first_stage": SYSTEM}}, "needs a system with FirstStage"),
    ({"multipliers": (1, 1, 1, 1)}, "does not divide by 8"),
    ({"depths": (1,)}, "give one a level"),
    ({"attention": "none"}, "attention"),
  ],
)
def test_what_makes_no_system_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(SYSTEM, **changes)


def test_pictures_of_another_size_divide_as_the_network_does():
  assert SYSTEM.shape_of(24, 32) == (6, 8, 3)
  with pytest.raises(UserError, match="multiples of 8"):
    SYSTEM.shape_of(20, 16)


def test_the_vector_of_sdxl_is_the_pooled_text_and_six_embedded_numbers():
  # Podell et al. 2023, section 2.2: original size, crop and target size, each in 256 waves.
  system = SDXL(TEXT, **{**TINY, "depths": (1, 0), "heads": 0, "head_channels": 8})
  pooled = jnp.arange(10.0).reshape(2, 5)
  given = Conditioning(jnp.zeros((2, 4, 8)), pooled=pooled)
  given = given.replace(null=given.replace(pooled=0 * pooled))
  options = SDXLOptions(original_height=8, crop_left=3)
  prepared = system.prepared(given, options)
  vector = system.vector(prepared)
  assert vector.shape == (2, 5 + 6 * 256)
  np.testing.assert_array_equal(vector[:, :5], pooled)
  numbers = jnp.array([8, 16, 0, 3, 16, 16])
  np.testing.assert_allclose(
    vector[0, 5:].reshape(6, 256), timestep_embedding(numbers, 256), atol=1e-5
  )
  np.testing.assert_array_equal(system.vector(prepared.null)[:, 5:], vector[:, 5:])


def test_sdxl_reads_sizes_and_crops_of_its_batches():
  system = SDXL(TEXT, **{**TINY, "depths": (1, 0), "heads": 0, "head_channels": 8})
  spec = system.batch_spec()
  assert spec["size"] == spec["crop"] == base.Field((2,), "int32")


def test_heads_are_what_levels_divide_by():
  # 24 channels in 3 heads: units of 8, whatever the default width of a head.
  dataclasses.replace(SYSTEM, channels=24, heads=3)
  dataclasses.replace(SYSTEM, multipliers=(0.5, 2), heads=4)
  for changes, message in (
    ({"heads": 3}, "do not divide by model.heads=3"),
    ({"heads": 0, "head_channels": 6}, "do not divide by model.head_channels=6"),
    ({"heads": 0, "head_channels": 0}, "make no attention"),
    ({"multipliers": ()}, "positive one for each level"),
  ):
    with pytest.raises(UserError, match=message):
      dataclasses.replace(SYSTEM, **changes)


@pytest.mark.parametrize("kind, guidance", [(LDM, 2.0), (StableDiffusion, 7.5), (SDXL, 5.0)])
def test_latents_are_not_clipped_unless_asked(kind, guidance):
  # What a public model is drawn with where its files say nothing.
  options = make_options(kind, {})
  assert options.guidance == guidance and not options.clip
