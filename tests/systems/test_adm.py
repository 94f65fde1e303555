"""ADM's own parts: labels, their dropout, and what its published configs amount to."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import ROOT

from t2i_jax import assembly, batch_spec, config_files
from t2i_jax.errors import UserError
from t2i_jax.systems.base import GUIDE
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.diffusion.adm import ADM
from t2i_jax.systems.guides.noisy_classifier import NoisyClassifier

TEXT = TextConditioner(encoder="none")
CLASSES = (("colour", 3), ("shape", 2))
SYSTEM = ADM(
  TEXT, resolution=8, schedule="cosine", steps=10, classes=CLASSES, channels=8, multipliers=(1,),
  blocks=1, attention_levels=(), head_channels=8, groups=4,
)  # fmt: skip
LABELS = jnp.array([[0, 1], [2, 0], [1, 1]], jnp.int32)


def batch(labels=LABELS):
  image = np.random.default_rng(0).integers(0, 256, (len(labels), 8, 8, 3), np.uint8)
  return {"image": jnp.asarray(image), "label": labels}


@pytest.fixture(scope="module")
def variables():
  """Of all its arrays, none of which is zero."""
  shapes = jax.eval_shape(SYSTEM.init, jax.random.key(0), batch())
  random = np.random.default_rng(1)
  return jax.tree.map(lambda x: jnp.asarray(0.2 * random.normal(size=x.shape), x.dtype), shapes)


@jax.jit
def outputs(variables, labels):
  x = jnp.broadcast_to(jnp.linspace(-1, 1, 192).reshape(1, 8, 8, 3), (len(labels), 8, 8, 3))
  given = SYSTEM.given(variables, batch(labels))
  return SYSTEM.output(variables, x, jnp.full(len(labels), 3), given)


def test_every_label_is_told_apart_and_an_unsaid_one_adds_nothing(variables):
  every = jnp.array([[c, s] for c in (-1, 0, 1, 2) for s in (-1, 0, 1)], jnp.int32)
  found = np.asarray(outputs(variables, every)).reshape(len(every), -1)
  apart = np.abs(found[:, None] - found[None]).max(-1)
  assert apart[~np.eye(len(every), dtype=bool)].min() > 1e-3
  table = variables["params"]["denoiser"]["label"]["embedding"]
  assert table.shape == (5, 32)
  bare = jax.tree.map(lambda x: x, variables)
  bare["params"]["denoiser"]["label"] = {"embedding": jnp.zeros_like(table)}
  unsaid = jnp.full((12, 2), -1, jnp.int32)
  np.testing.assert_array_equal(outputs(bare, every), outputs(variables, unsaid))


def test_labels_are_dropped_together_as_often_as_asked():
  system = dataclasses.replace(SYSTEM, label_drop=0.25)
  many = batch(jnp.tile(LABELS, (1000, 1)))
  told = system.reading({}, many, jax.random.key(3))[0].extra["label"]
  gone = np.asarray(told == -1)
  assert (gone[:, 0] == gone[:, 1]).all()
  assert abs(gone[:, 0].mean() - 0.25) < 0.03
  whole = system.reading({}, many, None)[0].extra["label"]
  # The second attribute's rows stand behind the first's.
  np.testing.assert_array_equal(whole[:3], LABELS + np.array([0, 3]))
  assert (np.asarray(SYSTEM.reading({}, many, jax.random.key(3))[0].extra["label"]) >= 0).all()


def test_only_dropped_labels_give_something_to_lead_away_from():
  assert SYSTEM.condition({}, batch()).null is None
  null = dataclasses.replace(SYSTEM, label_drop=0.1).condition({}, batch()).null
  assert (np.asarray(null.extra["label"]) == -1).all()


def test_a_guide_must_read_the_same_labels():
  guide = NoisyClassifier(
    TEXT, resolution=8, classes=CLASSES, schedule="cosine", steps=10, channels=8, multipliers=(1,),
    blocks=1, attention_levels=(0,), head_channels=8, groups=4,
  )  # fmt: skip
  assert dataclasses.replace(SYSTEM, components={GUIDE: guide}).labels == CLASSES
  with pytest.raises(UserError, match="reads the labels colour .3., shape .2., and this model"):
    dataclasses.replace(SYSTEM, classes=(("class", 5),), components={GUIDE: guide})
  # One that is told nothing is asked what the guide reads.
  assert dataclasses.replace(SYSTEM, classes=(), components={GUIDE: guide}).labels == CLASSES


@pytest.mark.parametrize("fields, message", [
  ({"label_drop": 1.5}, "model.label_drop=1.5 is no probability"),
  ({"label_drop": 0.1, "classes": ()}, "model.classes names none"),
  ({"classes": (("class", 0),)}, "'class' has 0 values"),
])  # fmt: skip
def test_options_that_make_no_model_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(SYSTEM, **fields)


# Of guided-diffusion's own code with 1,000 classes, or none.
PUBLISHED = {
  "imagenet64": ((("class", 1000),), 295_904_454),
  "imagenet128": ((("class", 1000),), 421_529_606),
  "imagenet256": ((("class", 1000),), 553_838_086),
  "lsun": ((), 552_814_086),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_configs_are_the_published_networks(size):
  classes, expected = PUBLISHED[size]
  config = config_files.load_config(f"{ROOT / 'configs/adm.py'}:size={size}")
  config.model.classes = classes
  system = assembly.build_system(config)
  given = batch_spec.abstract_batch(system, 1)
  variables = jax.eval_shape(lambda batch: system.init(jax.random.key(0), batch), given)
  assert sum(x.size for x in jax.tree.leaves(variables["params"])) == expected
