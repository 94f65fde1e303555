import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.systems.capabilities import Evaluated, Sampler, make_options
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.diffusion.ddpm import DDPM
from t2i_jax.systems.diffusion.sampling import Options
from t2i_jax.systems.randomness import fold_name, picture_keys
from t2i_jax.text.tokenizer import null_text

TEXT = TextConditioner(length=4, vocab_size=16, width=8, layers=1, heads=2, drop=0.2)
SYSTEM = DDPM(
  TEXT, resolution=8, schedule="cosine", steps=50, prediction="v", weighting="v", channels=8,
  multipliers=(1,), blocks=1, attention_levels=(), head_channels=8, groups=4, patch=2,
)  # fmt: skip
KEY = jax.random.key(0)
BLACK, WHITE = (jnp.array([1, word, 2, 0], jnp.int32) for word in (5, 6))


def make_batch(rows, seed=0):
  """White pictures called white, and black ones called black."""
  white = np.random.default_rng(seed).integers(0, 2, rows).astype(bool)
  ids = jnp.where(white[:, None], WHITE, BLACK)
  image = np.tile(np.uint8(white * 255)[:, None, None, None], (1, 8, 8, 3))
  return {"image": jnp.asarray(image), "text": {"text_encoder": {"ids": ids, "mask": ids != 0}}}


def other_captions(batch):
  text = batch["text"]["text_encoder"]
  ids = jnp.where(text["ids"] == 5, 6, jnp.where(text["ids"] == 6, 5, text["ids"]))
  return {**batch, "text": {"text_encoder": {**text, "ids": ids}}}


def drawn(scale_of, seed=1):
  """Variables of the system, each array normal with the deviation that its path has."""
  shapes = jax.eval_shape(SYSTEM.init, jax.random.key(0), make_batch(2), {})
  random = np.random.default_rng(seed)

  def draw(path, leaf):
    mean = 1.0 if path[-1].key == "scale" else 0.0
    scale = scale_of("/".join(p.key for p in path), leaf)
    return jnp.asarray(mean + scale * random.normal(size=leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def fresh():
  """Variables like those of `init`, which takes longer to compile: the output is zero."""

  def scale(path, leaf):
    if path.endswith("bias") or "denoiser/conv_out" in path or path.endswith("scale"):
      return 0.0
    return np.prod(leaf.shape[:-1]) ** -0.5

  return drawn(scale)


@pytest.fixture(scope="module")
def moved():
  """Variables in general position: nothing is still at its initial zero."""
  return drawn(lambda path, leaf: 0.3)


@pytest.fixture(scope="module")
def trained(fresh):
  """A little training, enough for the text to matter."""
  player, optimizer = SYSTEM.players[0], optax.adam(3e-3)

  @jax.jit
  def step(i, carry):
    params, state = carry
    rng = jax.random.fold_in(KEY, i)
    batch = make_batch(16)
    gradients, _ = player.gradients({"params": params}, batch, rng, i)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  params = fresh["params"]
  carry = params, optimizer.init(params)
  for i in range(150):
    carry = step(jnp.int32(i), carry)
  return {"params": carry[0]}


LOSS = jax.jit(lambda variables, batch, rng: SYSTEM.loss(variables, batch, rng, 0)[0])
EVALUATION = jax.jit(SYSTEM.evaluation_loss)
CONDITION = jax.jit(SYSTEM.condition)
TRACES = []


@jax.jit
def draw(variables, conditioning, keys, options):
  TRACES.append(options)
  return SYSTEM.sample(variables, conditioning, keys, options)


def test_groups_and_capabilities(fresh):
  assert set(fresh["params"]) == {"text_encoder", "denoiser"}
  (player,) = SYSTEM.players
  assert set(player.trains) == set(SYSTEM.ema_groups) == set(fresh["params"])
  assert SYSTEM.frozen_groups == ()
  assert isinstance(SYSTEM, Sampler) and isinstance(SYSTEM, Evaluated)
  assert set(SYSTEM.batch_spec()) == {
    "image", "text/text_encoder/ids", "text/text_encoder/mask"
  }


def test_loss_at_init_is_the_expected_one(fresh):
  # The network predicts zero; on black and white pictures every target has a mean square of 1,
  # and where it is the noise, x_0 is off by sigma / alpha.
  batch = make_batch(64)
  systems = {
    (prediction, weighting): dataclasses.replace(
      SYSTEM, prediction=prediction, weighting=weighting, schedule="linear"
    )
    for prediction, weighting in [
      ("epsilon", "epsilon"), ("x0", "x0"), ("v", "v"), ("epsilon", "x0")
    ]
  }  # fmt: skip
  losses = jax.jit(lambda: {k: s.loss(fresh, batch, KEY, 0)[0] for k, s in systems.items()})()
  assert all(x.dtype == jnp.float32 and x.shape == () for x in losses.values())
  error = losses.pop(("epsilon", "x0"))
  np.testing.assert_allclose(list(losses.values()), 1.0, atol=0.03)
  system = systems["epsilon", "x0"]
  t = system.process.time(system.times(fold_name(KEY, "time"), 64))
  ratio = jnp.mean((system.process.sigma(t) / system.process.alpha(t)) ** 2)
  assert error == pytest.approx(float(ratio), rel=0.1)


def test_a_shift_trains_noisier_times(fresh):
  # Of pictures predicted as zero noise, the error of x_0 is the noise-to-signal ratio.
  system = dataclasses.replace(SYSTEM, prediction="epsilon", weighting="x0", schedule="linear")
  shift = dataclasses.replace(system, time_shift=4.0)
  mean = jax.jit(lambda: [s.loss(fresh, make_batch(64), KEY, 0)[0] for s in (system, shift)])()
  assert mean[1] > 1.5 * mean[0]


def test_evaluation_is_by_example_and_without_dropout(moved):
  batch = make_batch(8)
  losses = EVALUATION(moved, batch, KEY)["loss"]
  assert losses.shape == (8,) and losses.dtype == jnp.float32
  changed = {**batch, "image": batch["image"].at[3].set(99)}
  same = np.isclose(EVALUATION(moved, changed, KEY)["loss"], losses, rtol=1e-5)
  assert list(np.flatnonzero(~same)) == [3]
  # Every row's caption is seen, for none is dropped.
  swapped = EVALUATION(moved, other_captions(batch), KEY)["loss"]
  assert np.all(np.abs(swapped / losses - 1) > 1e-5)


def test_training_measures_the_same_error_of_captions_that_it_may_drop(moved):
  batch, rows = make_batch(8), (8, 1)
  null = {name: jnp.tile(value, rows) for name, value in null_text(4).items()}
  always = dataclasses.replace(SYSTEM, text=dataclasses.replace(TEXT, drop=1.0))
  dropped = jax.jit(lambda: always.loss(moved, batch, KEY, 0)[0])()
  expected = EVALUATION(moved, {**batch, "text": {"text_encoder": null}}, KEY)["loss"].mean()
  np.testing.assert_allclose(dropped, expected, rtol=1e-5)
  sometimes, never = LOSS(moved, batch, KEY), EVALUATION(moved, batch, KEY)["loss"].mean()
  assert abs(sometimes / dropped - 1) > 1e-5 and abs(sometimes / never - 1) > 1e-5


def test_every_step_has_its_own_times_and_noise(moved):
  batch = make_batch(8)
  assert LOSS(moved, batch, KEY) == LOSS(moved, batch, KEY)
  assert LOSS(moved, batch, KEY) != LOSS(moved, batch, jax.random.fold_in(KEY, 1))


def test_bfloat16_measures_nearly_the_same_in_float32(moved):
  text = dataclasses.replace(TEXT, dtype=jnp.bfloat16)
  halves = dataclasses.replace(SYSTEM, text=text, dtype=jnp.bfloat16)
  batch = make_batch(8)
  losses = jax.jit(halves.evaluation_loss)(moved, batch, KEY)["loss"]
  assert losses.dtype == jnp.float32
  np.testing.assert_allclose(losses, EVALUATION(moved, batch, KEY)["loss"], rtol=0.03)


def test_a_picture_is_its_keys_alone(moved):
  # Alone on one device, or among others on eight.
  batch, options = make_batch(8), Options(steps=2)
  keys = picture_keys(7, jnp.arange(8))
  mesh = Mesh(np.array(jax.devices()), ("data",))
  rows, whole = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("data", None))
  placed = jax.device_put((CONDITION(moved, batch), keys), rows)
  with jax.set_mesh(mesh):
    together = draw(jax.device_put(moved, whole), *placed, options)
  few = jax.tree.map(lambda x: x[3:5], batch)
  alone = draw(moved, CONDITION(moved, few), keys[3:5], options)
  assert together.shape == (8, 8, 8, 3) and together.dtype == jnp.float32
  np.testing.assert_allclose(alone, np.asarray(together)[3:5], atol=1e-4)
  assert np.abs(alone[0] - alone[1]).max() > 0.1


def test_guidance_is_traced_and_what_shapes_the_program_is_not(moved):
  given = moved, CONDITION(moved, make_batch(2)), picture_keys(0, jnp.arange(2))
  draw(*given, Options(steps=2))
  TRACES.clear()
  pictures = [draw(*given, Options(steps=2, guidance=scale)) for scale in (0.0, 1.0, 7.5)]
  assert not TRACES
  assert all(np.abs(a - pictures[0]).max() > 1e-4 for a in pictures[1:])
  for changes in ({"solver": "ddpm"}, {"eta": 0.5}, {"clip": False}, {"steps": 1}):
    TRACES.clear()
    draw.trace(*given, Options(**{"steps": 2, **changes}))
    assert len(TRACES) == 1, changes


def test_scale_one_is_the_captions_and_zero_is_nobodys(moved):
  batch, keys = make_batch(2), picture_keys(0, jnp.arange(2))
  right, wrong = (CONDITION(moved, b) for b in (batch, other_captions(batch)))
  run = lambda given, scale: draw(moved, given, keys, Options(steps=2, guidance=scale))  # noqa: E731
  without_null = right.replace(null=jax.tree.map(jnp.zeros_like, right.null))
  np.testing.assert_allclose(run(right, 1.0), run(without_null, 1.0), atol=1e-5)
  np.testing.assert_allclose(run(right, 0.0), run(wrong, 0.0), atol=1e-5)
  assert np.abs(run(right, 1.0) - run(wrong, 1.0)).max() > 1e-3


def test_training_makes_pictures_obey_their_text(trained):
  ids = jnp.stack([BLACK, WHITE])
  conditioning = CONDITION(trained, {"text": {"text_encoder": {"ids": ids, "mask": ids != 0}}})
  # Of one key: only the text tells them apart.
  pictures = draw(trained, conditioning, picture_keys(1, jnp.zeros(2, int)), Options(steps=2))
  assert np.abs(pictures).max() <= 1.0
  assert pictures[0].mean() < -0.5 and pictures[1].mean() > 0.5


def test_a_frozen_text_encoder_travels_in_the_export():
  system = dataclasses.replace(SYSTEM, text=TextConditioner("component", components={}))
  assert system.frozen_groups == ("text_encoder",)
  assert system.ema_groups == system.players[0].trains == ("denoiser",)


def test_a_draft_is_trained_by_its_own_error_and_read_by_the_denoiser():
  system, batch = dataclasses.replace(SYSTEM, draft=2), make_batch(8)
  shapes = jax.eval_shape(system.init, KEY, batch)
  assert set(shapes["params"]) == {"text_encoder", "draft", "denoiser"}
  assert set(system.players[0].trains) == set(system.ema_groups) == set(shapes["params"])
  random = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: jnp.asarray(0.3 * random.normal(size=x.shape), x.dtype), shapes
  )
  gradient, aux = jax.jit(system.players[0].gradients)(variables, batch, KEY, jnp.int32(0))
  loss, draft = aux.metrics["loss"], aux.metrics["draft"]
  # `loss` is the denoiser's alone, to be compared with a run that has no draft.
  total, _ = jax.jit(system.loss)(variables, batch, KEY, jnp.int32(0))
  np.testing.assert_allclose(total, loss + draft, rtol=1e-5)
  assert draft > 0 and np.any(gradient["draft"]["picture"]["kernel"])

  evaluate = jax.jit(system.evaluation_loss)
  before = evaluate(variables, batch, KEY)["loss"]
  changed = jax.tree.map(jnp.zeros_like, variables["params"]["draft"])
  after = evaluate(trees.with_params(variables, {"draft": changed}), batch, KEY)["loss"]
  assert np.all(np.abs(after / before - 1) > 1e-6)
  given = jax.jit(system.condition)(variables, batch)
  assert given.extra["layout"].shape[:3] == given.null.extra["layout"].shape[:3] == (8, 2, 2)
  # The empty caption has a draft too, the same for all; others have their own.
  layout, null, ids = given.extra["layout"], given.null.extra["layout"], batch["text"]
  ids = ids["text_encoder"]["ids"]
  other = next(i for i in range(1, 8) if (ids[i] != ids[0]).any())
  np.testing.assert_array_equal(null[0], null[other])
  assert np.abs(layout[0] - layout[other]).max() > 1e-3 < np.abs(layout[0] - null[0]).max()
  keys = picture_keys(0, jnp.arange(8))
  drawn = jax.eval_shape(system.sample, variables, given, keys, Options(steps=1))
  assert drawn.shape == (8, 8, 8, 3)


@pytest.mark.parametrize(
  "values, message",
  [
    ({"draft": 3}, "model.draft=3 does not divide 4"),
    ({"draft": -2}, "model.draft=-2"),
    ({"schedule": "cosin"}, "did you mean 'cosine'"),
    ({"prediction": "eps"}, "unknown diffusion prediction"),
    ({"weighting": "snr"}, "unknown diffusion weighting"),
    ({"density": "even"}, "unknown timestep density"),
    ({"time_shift": 0.0}, "model.time_shift=0.0 is not positive"),
    ({"dropout": 1.0}, "model.dropout=1.0 is out of range"),
    ({"resolution": 9}, "does not divide by 2"),
    ({"groups": 3}, "model.groups=3 does not divide"),
    ({"attention_levels": (1,)}, "names level 1"),
    ({"channels": 24, "head_channels": 16}, "24 channels of level 0 attend"),
    ({"channels": 6, "groups": 2}, "by 4"),
  ],
)
def test_what_makes_no_system_is_one_line(values, message):
  with pytest.raises(UserError, match=message) as caught:
    dataclasses.replace(SYSTEM, **values)
  assert "\n" not in str(caught.value)


def test_the_bound_of_the_weighting_reaches_the_loss():
  narrow, wide = (
    dataclasses.replace(SYSTEM, weighting="min_snr", weighting_bound=bound) for bound in (2.0, 9.0)
  )
  snr = jnp.asarray([1.0, 5.0, 100.0])
  np.testing.assert_allclose(narrow.weight(snr), [1, 2, 2])
  np.testing.assert_allclose(wide.weight(snr), [1, 5, 9])


def test_options_that_a_solver_does_not_read_are_checked_too(moved):
  given = moved, CONDITION(moved, make_batch(2)), picture_keys(0, jnp.arange(2))
  with pytest.raises(UserError, match="ancestral variance 'larg'"):
    SYSTEM.sample(*given, Options(steps=1, solver="ddim", variance="larg"))
  for value in (1e39, float("nan"), float("-inf")):
    with pytest.raises(UserError, match="no number that a device can hold"):
      make_options(SYSTEM, {"guidance": value})


def test_sigma_data_and_density_spread_reach_the_mathematics():
  wide, plain = (
    dataclasses.replace(
      SYSTEM, prediction="edm", sigma_data=0.3, density="logit_normal", density_spread=spread
    )
    for spread in (2.0, 1.0)
  )
  assert wide.parameterization.sigma_data == 0.3
  logits = [jax.scipy.special.logit(one.times(KEY, 8)) for one in (wide, plain)]
  np.testing.assert_allclose(logits[0], 2 * logits[1], rtol=1e-3)
