import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from runs import ROOT

from t2i_jax import assembly, batch_spec, config_files
from t2i_jax.errors import UserError
from t2i_jax.training import optimizers

BASE = {
  "name": "adamw", "learning_rate": 0.1, "b1": 0.9, "b2": 0.999, "eps": 1e-8,
  "weight_decay": 0.0, "clip_norm": 0.0, "schedule": "constant", "warmup": 0,
  "final_fraction": 0.0, "multipliers": (),
}


def section(**changes):
  return {**BASE, **changes}


@pytest.mark.parametrize("name, expected", [
  # By updates done: the first, mid warm-up, its last, half way, the end, after the end.
  ("constant", {0: 0.1, 4: 0.5, 9: 1.0, 60: 1.0, 110: 1.0, 200: 1.0}),
  ("linear", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.6, 110: 0.2, 200: 0.2}),
  ("cosine", {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.6, 110: 0.2, 200: 0.2,
              35: 0.2 + 0.8 * (0.5 + math.sqrt(0.125))}),
  ("inverse_sqrt", {0: 0.1, 4: 0.5, 9: 1.0, 39: 0.5, 89: 1 / 3, 249: 0.2, 10_000: 0.2}),
])
def test_schedule_at_its_key_steps(name, expected):
  schedule = optimizers.make_schedule(
    section(schedule=name, learning_rate=2.0, warmup=10, final_fraction=0.2), 110)
  for count, fraction in expected.items():
    np.testing.assert_allclose(schedule(count), 2.0 * fraction, rtol=1e-5, err_msg=str(count))


def test_schedule_without_warmup_starts_at_the_full_rate():
  for name in ("constant", "cosine", "linear", "inverse_sqrt"):
    schedule = optimizers.make_schedule(section(schedule=name), 100)
    np.testing.assert_allclose(schedule(0), 0.1, rtol=1e-6)
  np.testing.assert_allclose(schedule(99), 0.01, rtol=1e-5)


def regression():
  """Least squares of a two-layer linear network, with an embedding, a norm's scale and biases."""
  keys = jax.random.split(jax.random.key(0), 6)
  x, target = jax.random.normal(keys[0], (64, 8)), jax.random.normal(keys[1], (8, 8))
  ids = jnp.arange(64) % 4
  params = {
    "net": {
      "hidden": {"kernel": jax.random.normal(keys[2], (8, 8)) / 3, "bias": jnp.zeros(8)},
      "norm": {"scale": jnp.ones(8)},
      "final_layer": {"kernel": jax.random.normal(keys[3], (8, 8)) / 3},
      "tokens": {"embedding": jax.random.normal(keys[4], (4, 8)) / 3},
      "conv": {"kernel": jax.random.normal(keys[5], (1, 1, 8, 8)) / 3},
    }
  }

  def loss(params):
    net = params["net"]
    h = (x + net["tokens"]["embedding"][ids]) @ net["hidden"]["kernel"] + net["hidden"]["bias"]
    h = (h * net["norm"]["scale"]) @ net["conv"]["kernel"][0, 0]
    return jnp.mean((h @ net["final_layer"]["kernel"] - x @ target) ** 2)

  return params, loss


@pytest.mark.parametrize("name, rate", [
  ("adamw", 0.02), ("adam", 0.02), ("adafactor", 0.05), ("lion", 0.01), ("muon", 0.02),
  ("sgd", 0.01),
])
def test_every_optimizer_reduces_a_least_squares_loss(name, rate):
  params, loss = regression()
  options = section(name=name, learning_rate=rate, clip_norm=1.0, schedule="cosine", warmup=5)
  optimizer = optimizers.make_optimizer(options, 200, jax.eval_shape(lambda: params))
  state = optimizer.init(params)

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  before = loss(params)
  for _ in range(200):
    params, state = step(params, state)
  assert loss(params) < 0.1 * before
  for leaf in jax.tree.leaves((params, state)):
    assert leaf.dtype in (jnp.float32, jnp.int32)


def update_of(options, params, gradients):
  optimizer = optimizers.make_optimizer(options, 100, params)
  updates, _ = jax.jit(optimizer.update)(gradients, optimizer.init(params), params)
  return updates


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "muon", "sgd"])
def test_weight_decay_is_decoupled_and_masked(name):
  params = {
    "dense": {"kernel": jnp.full((4, 4), 2.0), "bias": jnp.full(4, 2.0)},
    "norm": {"scale": jnp.full(4, 2.0)},
    "layers": {"bias": jnp.full((3, 4), 2.0)},  # of layers stacked for a scan
    "tokens": {"embedding": jnp.full((5, 4), 2.0)},
  }
  zero = jax.tree.map(jnp.zeros_like, params)
  updates = update_of(section(name=name, weight_decay=0.5), params, zero)
  np.testing.assert_allclose(updates["dense"]["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
  np.testing.assert_allclose(updates["tokens"]["embedding"], -0.1 * 0.5 * 2.0, rtol=1e-6)
  for kept in (updates["dense"]["bias"], updates["norm"]["scale"], updates["layers"]["bias"]):
    np.testing.assert_array_equal(kept, 0.0)


def test_muon_moves_hidden_matrices_along_orthogonal_directions_and_the_rest_as_adam():
  params, loss = regression()
  gradients = jax.grad(loss)(params)
  muon = update_of(section(name="muon"), params, gradients)["net"]
  adam = update_of(section(name="adam"), params, gradients)["net"]
  for name, leaf in (("final_layer", "kernel"), ("tokens", "embedding"), ("hidden", "bias"),
                     ("norm", "scale")):
    np.testing.assert_allclose(muon[name][leaf], adam[name][leaf], rtol=1e-5)
  direction = muon["hidden"]["kernel"] / (-0.1 * 0.2 * math.sqrt(8))
  values = np.linalg.svd(direction, compute_uv=False)
  assert values.min() > 0.4 and values.max() < 1.4  # five Newton-Schulz steps are that exact


def test_muon_takes_a_convolution_as_one_matrix_from_all_its_inputs():
  gradient = jax.random.normal(jax.random.key(0), (3, 3, 4, 8))
  update = lambda g: update_of(  # noqa: E731
    section(name="muon"), {"net": {"kernel": jnp.zeros_like(g)}}, {"net": {"kernel": g}}
  )["net"]["kernel"]
  np.testing.assert_allclose(
    update(gradient).reshape(36, 8), update(gradient.reshape(36, 8)), rtol=1e-5, atol=1e-7
  )


@pytest.mark.parametrize("shape", [(6, 8), (3, 3, 4, 8)])
def test_muon_takes_scanned_blocks_one_by_one(shape):
  def update(grads):
    return update_of(section(name="muon"), {"net": jax.tree.map(jnp.zeros_like, grads)},
                     {"net": grads})["net"]

  each = [jax.random.normal(jax.random.key(i), shape) * 10.0**i for i in range(3)]
  one_by_one = update({f"out_blocks_{i}": {"mlp": {"kernel": x}} for i, x in enumerate(each)})
  stacked = update({"out_blocks": {"mlp": {"kernel": jnp.stack(each)}}})
  for i in range(3):
    np.testing.assert_allclose(
      stacked["out_blocks"]["mlp"]["kernel"][i], one_by_one[f"out_blocks_{i}"]["mlp"]["kernel"],
      rtol=1e-4, atol=1e-6,
    )


@pytest.mark.parametrize("name", ["dit", "u_vit", "sd3"])
def test_the_blocks_that_networks_scan_over_are_known(name):
  of = f"{ROOT}/configs/{name}.py:size=tiny,encoder=transformer,dataset=scenes"
  system = assembly.build_system(config_files.load_config(of, {"model.scan": "True"}))
  shapes = jax.eval_shape(
    lambda batch: system.init(jax.random.key(0), batch), batch_spec.abstract_batch(system, 2)
  )["params"]["denoiser"]
  deep = [path for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
          if leaf.ndim == 3 and "kernel" in path[-1].key]
  assert len(deep) >= 5
  stacked = np.zeros((2, 2, 2))
  assert all(optimizers._is_stacked(path, stacked) for path in deep), deep


def test_muon_moves_a_1d_convolution_as_adam():
  params = {"net": {"conv": {"kernel": jnp.ones((3, 4, 8))}}}
  gradients = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)
  muon, adam = (update_of(section(name=name), params, gradients) for name in ("muon", "adam"))
  np.testing.assert_allclose(muon["net"]["conv"]["kernel"], adam["net"]["conv"]["kernel"],
                             rtol=1e-5)


def test_clipping_is_by_the_global_norm():
  params = {"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}
  gradients = jax.tree.map(lambda p: jnp.full_like(p, 100.0), params)
  options = section(name="sgd", b1=0.0, learning_rate=1.0, clip_norm=0.5)
  updates = update_of(options, params, gradients)
  np.testing.assert_allclose(optax.tree.norm(updates), 0.5, rtol=1e-5)
  small = jax.tree.map(lambda g: g * 1e-4, gradients)
  np.testing.assert_allclose(update_of(options, params, small)["a"], -0.01, rtol=1e-5)


def test_multipliers_take_the_first_match():
  params = {"text": {"w": jnp.zeros(2)}, "image": {"w": jnp.zeros(2), "b": jnp.zeros(2)}}
  gradients = jax.tree.map(jnp.ones_like, params)
  options = section(name="sgd", b1=0.0, multipliers=(("^text/", 0.0), ("b$", 2.0), ("image", 0.5)))
  updates = update_of(options, params, gradients)
  np.testing.assert_allclose(updates["text"]["w"], 0.0)
  np.testing.assert_allclose(updates["image"]["b"], -0.2, rtol=1e-6)
  np.testing.assert_allclose(updates["image"]["w"], -0.05, rtol=1e-6)


@pytest.mark.parametrize("changes, message", [
  ({"name": "adamww"}, "unknown optimizer.name 'adamww'; did you mean 'adamw'"),
  ({"schedule": "cosin"}, "unknown optimizer.schedule 'cosin'; did you mean 'cosine'"),
  ({"learning_rate": -1.0}, "optimizer.learning_rate=-1.0 is out of range"),
  ({"b2": 1.5}, "optimizer.b2=1.5 is out of range"),
  ({"name": "adam", "weight_decay": 0.1}, "use adamw"),
  ({"multipliers": (("(", 1.0),)}, "is not a regular expression"),
])
def test_what_a_user_gets_wrong(changes, message):
  with pytest.raises(UserError, match=message):
    optimizers.make_optimizer(section(**changes), 100, {"w": jnp.zeros(2)})
