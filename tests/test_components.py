"""Runs that are built on exports of other systems keep what they began with."""

import shutil

import encoder
import numpy as np
import pytest
from runs import ROOT, TOY, assert_same_bits, config_of, train_on

import t2i_jax
from t2i_jax import export, main
from t2i_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_programs")


def config(path, duration, **settings):
  return config_of(TOY, train__duration=duration, text__encoder="component", sample__every=0,
                   evaluate__every=0, components__text_encoder=path, **settings)


@pytest.fixture
def built(tmp_path):
  """A run of four steps, stopped at two, on an encoder."""
  path = encoder.make(tmp_path / "encoder", 1.0)
  train_on(config(path, 2), tmp_path / "run")
  return tmp_path / "run", path


def test_the_frozen_system_travels_in_the_export(built, tmp_path):
  run, path = built
  rows = export.read(path).variables["params"]["table"]["rows"]
  shutil.rmtree(path)
  exported = export.read(run / "export")
  held = exported.variables["params"]["text_encoder"]["table"]["rows"]
  np.testing.assert_array_equal(held, rows)
  assert exported.components["text_encoder"]["config"]["system"] == "encoder"
  pictures = t2i_jax.load(run / "export")(["a red ring", "a blue square at the top"], seed=1)
  assert pictures.shape == (2, 16, 16, 3) and (pictures[0] != pictures[1]).any()
  # And in one that is made from a checkpoint.
  export.main([f"--workdir={run}", f"--output={tmp_path / 'again'}"])
  again = t2i_jax.load(tmp_path / "again")(["a red ring", "a blue square at the top"], seed=1)
  np.testing.assert_array_equal(again, pictures)


@pytest.mark.parametrize("fate", ["gone", "replaced"])
def test_a_run_goes_on_with_the_system_that_it_began_with(built, tmp_path, fate):
  run, path = built
  whole = train_on(config(path, 4), tmp_path / "whole")
  shutil.rmtree(path)
  if fate == "replaced":
    encoder.make(path, 100.0)
  state = train_on(config(path, 4), run)
  assert state.step == 4
  assert_same_bits(state.replace(frozen={}), whole.replace(frozen={}))
  assert_same_bits(state.frozen, whole.frozen)
  # And one that goes on from it elsewhere, unless it names another system.
  if fate == "replaced":
    with pytest.raises(UserError, match="is another one than resume=.* was trained with"):
      train_on(config(path, 4, resume=run), tmp_path / "other")
    return
  other = train_on(config(path, 4, resume=run), tmp_path / "other")
  assert_same_bits(other.frozen, whole.frozen)
  with pytest.raises(UserError, match="has no component 'guide', only text_encoder"):
    train_on(config(path, 4, resume=run, components__guide=path), tmp_path / "guided")


def test_what_a_failed_command_left_is_not_taken_for_the_run_s(built, tmp_path):
  run, path = built
  (run / "config.json").unlink()  # as if it had been killed before it was a run
  shutil.rmtree(run / "checkpoints" / "state")
  encoder.make(path, 100.0)
  state = train_on(config(path, 2), run)
  rows = state.frozen["params"]["text_encoder"]["table"]["rows"]
  np.testing.assert_array_equal(rows, export.read(path).variables["params"]["table"]["rows"])


def test_the_frozen_encoder_brings_its_tokenizer(built, tmp_path):
  run, path = built
  export.read(path)
  assert (run / "tokenizer.json").read_bytes() == (path / "tokenizer.json").read_bytes()
  # Not one that would be trained on the same captions with another size.
  other = config(path, 1, text__vocab_size=400)
  train_on(other, tmp_path / "other")
  same = (tmp_path / "other" / "tokenizer.json").read_bytes()
  assert same == (path / "tokenizer.json").read_bytes()
  # Whose length it is, too.
  train_on(config(path, 1, text__length=12), tmp_path / "short")
  assert (tmp_path / "short" / "tokenizer.json").read_bytes() == same


def test_all_encoders_that_are_missing_are_named(fails, tmp_path):
  message = fails(main, f"--config={ROOT / 'configs/sdxl.py'}", f"--workdir={tmp_path}")
  assert "components.text_encoder=PATH, components.text_encoder_2=PATH" in message


def test_a_component_that_is_no_text_encoder(run_of_toy):
  with pytest.raises(UserError, match="components.text_encoder needs a system with TextEncoder"):
    train_on(config(run_of_toy / "export", 2), run_of_toy.parent / "other")


@pytest.fixture
def run_of_toy(tmp_path):
  train_on(config_of(TOY, train__duration=1, sample__every=0, evaluate__every=0), tmp_path / "toy")
  return tmp_path / "toy"

