"""Latents are drawn by one program and decoded by another, wherever the first stage lies."""

import jax
import numpy as np
import pytest
import two_stage
from runs import config_of, train_on

import t2i_jax
from t2i_jax import export
from t2i_jax.parallel.mesh import make_mesh
from t2i_jax.pipeline import Pipeline
from t2i_jax.systems import trees

pytestmark = pytest.mark.usefixtures("compiled_programs")
PROMPTS = ["a red ring", "a blue square", "a ring"]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """An export of a latent system and its first stage."""
  folder = tmp_path_factory.mktemp("two_stage")
  path = two_stage.make(folder / "first")
  given = config_of(two_stage.__file__, train__duration=2, components__first_stage=path)
  train_on(given, folder / "run")
  return folder / "run" / "export"


def test_the_export_holds_both_and_draws(built):
  exported = export.read(built)
  assert set(exported.variables["params"]) == {"text_encoder", "drawer", "first_stage"}
  pipeline = t2i_jax.load(built)
  drawn = pipeline(PROMPTS, seed=1, batch_size=2)
  assert drawn.shape == (3, 16, 16, 3) and drawn.dtype == np.uint8
  # Blocks of four: what the decoder makes of one latent.
  np.testing.assert_array_equal(drawn[:, ::4, ::4].repeat(4, 1).repeat(4, 2), drawn)
  np.testing.assert_array_equal(pipeline(PROMPTS, seed=1), drawn)


def test_a_first_stage_that_rests_draws_the_same(built):
  exported = export.read(built)
  pipeline = t2i_jax.load(built)
  resting, working = trees.split(exported.variables, ("first_stage",))
  mesh = make_mesh({"data": -1}, jax.devices()[:2])
  away = Pipeline(pipeline.system, pipeline.tokenizers, mesh, working, pipeline.config,
                  resting=resting)
  away.check(working)
  drawn = away(PROMPTS, seed=1, batch_size=2)
  np.testing.assert_array_equal(drawn, pipeline(PROMPTS, seed=1))
  # The program that draws does not see it, and the one that finishes does not draw.
  without = trees.flatten(away.variables)
  assert not any("first_stage" in name for name in without)
