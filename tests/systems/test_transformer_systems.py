"""Diffusion systems whose networks are transformers: DiT, U-ViT, Stable Diffusion 3."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from two_stage import Shrinker

from t2i_jax import recipe
from t2i_jax.errors import UserError
from t2i_jax.parallel import mesh as mesh_lib
from t2i_jax.parallel import sharding
from t2i_jax.systems.base import Conditioning, Field
from t2i_jax.systems.capabilities import make_options
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.diffusion.dit import DiT
from t2i_jax.systems.diffusion.sd3 import SD3
from t2i_jax.systems.diffusion.u_vit import UViT
from t2i_jax.systems.randomness import picture_keys

TEXT = TextConditioner(length=4, vocab_size=16, width=8, layers=1, heads=2)
STAGE = Shrinker(TEXT, resolution=16)
TINY = dict(resolution=8, width=8, depth=2, heads=2)
SYSTEMS = {
  "dit": DiT(TEXT, **TINY, cross_attention=True, steps=50),
  "labels": DiT(TextConditioner(encoder="none"), **TINY, steps=50, label_drop=0.3,
                classes=(("shape", 3), ("colour", 2))),
  "u_vit": UViT(TEXT, **TINY, steps=50),
  "sd3": SD3(TEXT, **TINY, norm=True, dual=1, grid=4, largest=4, shift=3.0),
}  # fmt: skip


def a_batch(side=8):
  random = np.random.default_rng(0)
  image = jnp.asarray(random.integers(0, 256, (4, side, side, 3), np.uint8))
  ids = jnp.asarray(random.integers(1, 16, (4, 4)), jnp.int32)
  text = {"text_encoder": {"ids": ids, "mask": ids > 2}}
  return {"image": image, "text": text, "label": jnp.array([[0, 1], [2, 0], [1, 1], [0, 0]])}


def filled(tree, seed=1):
  """Parameters in general position, none at its initial zero."""
  random = np.random.default_rng(seed)
  draw = lambda leaf: jnp.asarray(0.3 * random.normal(size=leaf.shape), leaf.dtype)  # noqa: E731
  return jax.tree.map(draw, tree)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_trains_and_draws(name):
  """By tracing alone: what a program of each would be."""
  system, batch, keys = SYSTEMS[name], a_batch(), picture_keys(0, jnp.arange(4))
  variables = jax.eval_shape(system.init, jax.random.key(0), batch)
  (player,) = system.players
  assert set(player.trains) == set(variables["params"])
  gradients, aux = jax.eval_shape(
    lambda variables: player.gradients(variables, batch, jax.random.key(1), 0), variables
  )
  assert jax.tree.structure(gradients) == jax.tree.structure(variables["params"])
  assert aux.metrics["loss"].shape == ()
  options = make_options(system, {"solver": "ddim", "steps": 2})

  def draw(variables):
    given = system.condition(variables, batch)
    return system.finish(variables, system.sample(variables, given, keys, options))

  assert jax.eval_shape(draw, variables).shape == (4, 8, 8, 3)
  assert jax.eval_shape(
    lambda v: system.evaluation_loss(v, batch, jax.random.key(1)), variables
  )["loss"].shape == (4,)


def test_a_drawing_is_of_its_own_text():
  system, batch = SYSTEMS["dit"], a_batch()
  variables = filled(jax.eval_shape(system.init, jax.random.key(0), batch))
  options = make_options(system, {"solver": "ddim", "steps": 2, "guidance": 1.5, "clip": True})
  keys = picture_keys(0, jnp.arange(4))

  @jax.jit
  def draw(batch):
    given = system.condition(variables, batch)
    return system.finish(variables, system.sample(variables, given, keys, options))

  drawn = draw(batch)
  text = batch["text"]["text_encoder"]
  other = {**batch, "text": {"text_encoder": {**text, "ids": text["ids"].at[0].set(7)}}}
  again = draw(other)
  assert np.abs(drawn).max() <= 1.0
  assert np.abs(again[0] - drawn[0]).max() > 1e-4
  np.testing.assert_allclose(again[1:], drawn[1:], atol=1e-5)


def test_u_vit_counts_times_from_one(monkeypatch):
  class Network:
    def apply(self, own, x, t, **given):
      return t

  for system, expected in (
    (SYSTEMS["u_vit"], [1, 2, 3, 4]),
    # Of a continuous process it gets what that process has for networks.
    (dataclasses.replace(SYSTEMS["u_vit"], schedule="vp"), [0, 1, 2, 3]),
  ):
    monkeypatch.setitem(system.__dict__, "network", Network())
    seen = system.output({}, None, jnp.arange(4), Conditioning())
    np.testing.assert_array_equal(seen, expected)


def test_systems_model_latents_where_there_is_a_first_stage():
  for system in (SYSTEMS["dit"], SYSTEMS["u_vit"]):
    latent = dataclasses.replace(
      system, resolution=16, components={"first_stage": STAGE}, latent_scale=0.5
    )
    assert latent.shape == (4, 4, 3) and latent.frozen_groups == ("first_stage",)
    frozen = {"params": {"first_stage": jax.eval_shape(lambda: STAGE.init(None, {}))["params"]}}
    shapes = jax.eval_shape(latent.init, jax.random.key(0), a_batch(16), frozen)
    assert set(shapes["latents"]["denoiser"]) == {"scale", "shift"}
  drawn = jnp.full((1, 8, 8, 3), 2.0)
  np.testing.assert_array_equal(SYSTEMS["dit"].finish({}, drawn), jnp.ones_like(drawn))
  np.testing.assert_array_equal(SYSTEMS["dit"].encoded({}, drawn), drawn)


def test_labels_take_the_text_s_place():
  system = SYSTEMS["labels"]
  assert system.batch_spec()["label"] == Field((2,), "int32") and "text" not in system.batch_spec()
  given = system.condition({}, a_batch())
  # In one table, one attribute's values behind the other's; the last row is of none.
  np.testing.assert_array_equal(given.extra["label"], [[0, 4], [2, 3], [1, 4], [0, 3]])
  np.testing.assert_array_equal(given.null.extra["label"], -np.ones((4, 2)))
  shapes = jax.eval_shape(system.init, jax.random.key(0), a_batch())
  assert shapes["params"]["denoiser"]["label"]["embedding"].shape == (3 + 2 + 1, 8)


@pytest.mark.parametrize(
  "name, changes, message",
  [
    ("dit", {"latent_scale": 0.2}, "0 with no first stage models pixels"),
    ("dit", {"patch": 3}, "does not divide by 3 .model.patch"),
    ("dit", {"heads": 3}, "does not divide by model.heads=3"),
    ("dit", {"depth": 0}, "model.depth=0"),
    ("dit", {"remat": "all"}, "model.remat"),
    ("dit", {"modulation": "one"}, "model.modulation"),
    ("dit", {"pooled": False, "cross_attention": False}, "no caption is read"),
    ("dit", {"position_scale": 0.0}, "not positive"),
    ("dit", {"mlp_ratio": -1.0}, "not positive"),
    ("dit", {"schedule": "flow", "prediction": "flow"}, "learned_variance"),
    ("dit", {"label_drop": 0.1}, "names none"),
    ("u_vit", {"depth": 3}, "is odd"),
    ("sd3", {"dual": 2}, "last block"),
    ("sd3", {"largest": 3}, "4 tokens a side"),
    ("sd3", {"blank": -1}, "model.blank=-1"),
    ("sd3", {"text": TextConditioner(encoder="none")}, "text.encoder=none"),
  ],
)
def test_what_makes_no_system_is_refused(name, changes, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(SYSTEMS[name], **changes)


def test_a_text_without_a_vector_modulates_nothing():
  system = dataclasses.replace(SYSTEMS["dit"], cross_attention=False)
  with pytest.raises(UserError, match="no vector for the whole caption"):
    system.init_denoiser(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), Conditioning())


def test_zeros_take_the_place_of_an_encoder_that_is_left_out():
  system = dataclasses.replace(SYSTEMS["sd3"], blank=2, context_width=9)
  mask = jnp.array([[True, True, False]])
  read = system.arguments(Conditioning(jnp.ones((1, 3, 8)), mask, jnp.ones((1, 8))))
  assert read["context"].shape == (1, 5, 9) and float(read["context"].sum()) == 3 * 8
  assert read["mask"].tolist() == [[True, True, False, True, True]]
  with pytest.raises(UserError, match="context_width=5 is less than the text's 8"):
    dataclasses.replace(system, context_width=5).arguments(Conditioning(jnp.ones((1, 3, 8))))


def test_pictures_of_another_size():
  assert SYSTEMS["dit"].shape_of(6, 10) == (6, 10, 3)
  assert SYSTEMS["sd3"].shape_of(4, 6) == (4, 6, 3)
  for name, size, message in (
    ("dit", (7, 8), "multiples of 2"), ("sd3", (8, 10), "places for model.largest=4"),
    ("u_vit", (6, 8), "learned the place"),
  ):
    with pytest.raises(UserError, match=message):
      SYSTEMS[name].shape_of(*size)


def spec(rules, path, shape, mesh):
  tree = {"denoiser": jax.ShapeDtypeStruct(shape, jnp.float32)}
  for key in reversed(path.split("/")):
    tree = {key: tree} if "denoiser" not in tree else {key: tree["denoiser"]}
  (found,) = jax.tree.leaves(sharding.shardings(tree, rules, mesh))
  return tuple(found.spec)


def test_transformers_lie_over_the_mesh():
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  rules = sharding.parse_rules(recipe.TRANSFORMER_RULES)
  for path, expected in {
    "blocks/attention/query/kernel": (None, "fsdp", "tensor"),
    "dual_blocks/second/value/kernel": (None, "fsdp", "tensor"),
    "blocks_3/image_mlp/in/kernel": (None, "fsdp", "tensor"),
    "in_blocks/attention/out/kernel": (None, "tensor", "fsdp"),
    "blocks/text_out/kernel": (None, "tensor", "fsdp"),
    "last_block/image_mlp/out/kernel": (None, "tensor", "fsdp"),
    "blocks/modulation/dense/kernel": (None, None, "fsdp"),
    "patches/kernel": (None, None, "fsdp"),
  }.items():
    # The first axis is the block.
    assert spec(rules, path, (28, 256, 256), mesh) == expected, path
  assert spec(rules, "blocks/attention/query/bias", (28, 256), mesh) == (None, "tensor")
