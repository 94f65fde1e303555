"""The step, on systems of a few numbers whose every update can be done by hand."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from t2i_jax.errors import UserError
from t2i_jax.systems import base
from t2i_jax.systems.base import Aux, Player
from t2i_jax.systems.trees import NO_VARIABLES
from t2i_jax.training import state as states
from t2i_jax.training.compiled import CompiledStep
from t2i_jax.training.step import StepOptions, check_accumulation, check_division, make_step

RATE = 0.1


@dataclasses.dataclass(frozen=True, eq=False)
class Fake(base.System):
  """Players and first variables as a test gives them."""

  play: tuple[Player, ...]
  variables: dict
  averaged: tuple[str, ...] = ()
  joint: Callable | None = None

  @property
  def players(self):
    return self.play

  @property
  def ema_groups(self):
    return self.averaged

  @property
  def simultaneous(self):
    return self.joint is not None

  def init(self, rng, batch, frozen=NO_VARIABLES):
    return self.made

  @property
  def made(self):
    return jax.tree.map(jnp.asarray, self.variables)

  def batch_spec(self):
    return {}

  def joint_losses(self, variables, batch, rng, step):
    return self.joint(variables, batch, rng, step)


def prepared(system, optimizer=None, **options):
  """The system's compiled step and first state."""
  optimizers = {p.name: optimizer or optax.sgd(RATE) for p in system.players}
  options = StepOptions(**{"ema_decay": 0.0, **options})
  state = states.create(system, optimizers, system.made, {}, options.ema_decay > 0)
  return jax.jit(make_step(system, optimizers, options)), state


def params(**groups):
  return {"params": {name: {"w": np.float32(value)} for name, value in groups.items()}}


def of(variables, *names):
  return [variables["params"][name]["w"] for name in names]


def rows(*values):
  return {"x": np.asarray(values, np.float32)}


def test_each_player_sees_what_those_before_it_left():
  def first(variables, batch, rng, step):
    a, b = of(variables, "a", "b")
    return a * b, Aux({}, {"seen": {"a": {"b": b}}})

  def second(variables, batch, rng, step):
    a, b = of(variables, "a", "b")
    return a * b + variables["seen"]["a"]["b"] * b, Aux()

  system = Fake((Player("one", ("a",), first), Player("two", ("b",), second)),
                params(a=2, b=3) | {"seen": {"a": {"b": np.float32(0)}}})
  step, state = prepared(system)
  state, metrics = step(state, rows(0))
  a = 2 - RATE * 3  # one moves first, b still being 3
  b = 3 - RATE * (a + 3)  # two sees the new a, and the collection that one has left
  np.testing.assert_allclose(of(state.variables(), "a", "b"), [a, b], rtol=1e-6)
  assert metrics["two/loss"] == pytest.approx(a * 3 + 3 * 3)
  assert state.step == 1 and metrics["finite"]


def linear(name, **kwargs):
  """A player whose every update takes RATE from its group."""
  return Player(name, (name,), lambda v, batch, rng, step: (of(v, name)[0], Aux()), **kwargs)


@pytest.mark.parametrize("shares", [False, True], ids=["in a branch", "sharing a forward pass"])
def test_start_every_and_repeats(shares):
  system = Fake(
    (linear("a", start=2, every=3, shares_forward=shares), linear("b", repeats=2),
     linear("c", start=1, shares_forward=shares)), params(a=0, b=0, c=0)
  )  # fmt: skip
  step, state = prepared(system, optax.sgd(lambda count: RATE * (count + 1)))
  moved = []
  for _ in range(7):
    state, metrics = step(state, rows(1, 2, 3, 4))
    moved.append([bool(np.isfinite(metrics[f"{name}/loss"])) for name in "abc"])
    assert metrics["finite"]  # a player that rests raises no alarm
  assert [m[0] for m in moved] == [False, False, True, False, False, True, False]
  assert all(m[1] for m in moved)
  assert [m[2] for m in moved] == [False] + 6 * [True]
  updates = {"a": 2, "b": 14, "c": 6}
  assert {k: int(v) for k, v in state.updates.items()} == updates
  for name, n in updates.items():  # the schedule counted the updates, not the steps
    np.testing.assert_allclose(of(state.variables(), name)[0], -RATE * n * (n + 1) / 2, rtol=1e-5)


def test_each_repeat_takes_its_own_equal_slice():
  def loss(variables, batch, rng, step):
    return jnp.sum(batch["x"]) * of(variables, "a")[0], Aux({"sum": jnp.sum(batch["x"])})

  system = Fake((Player("a", ("a",), loss, repeats=3),), params(a=0))
  step, state = prepared(system)
  state, metrics = step(state, rows(1, 2, 4, 8, 16, 32))
  assert of(state.variables(), "a")[0] == pytest.approx(-RATE * 63)
  assert metrics["a/sum"] == pytest.approx(63 / 3)
  with pytest.raises(UserError, match="5 does not divide into 3 parts for the a's repeats"):
    step(state, rows(1, 2, 3, 4, 5))


def regression(**kwargs):
  """A mean over examples: nothing couples them."""

  def loss(variables, batch, rng, step):
    prediction = batch["x"] @ variables["params"]["net"]["w"]
    error = jnp.mean((prediction - batch["y"]) ** 2)
    return error, Aux({"error": error})

  random = np.random.default_rng(0)
  batch = {"x": random.normal(size=(12, 3)).astype(np.float32),
           "y": random.normal(size=12).astype(np.float32)}
  weights = {"params": {"net": {"w": random.normal(size=3).astype(np.float32)}}}
  return Fake((Player("net", ("net",), loss, **kwargs),), weights), batch


@pytest.mark.parametrize("repeats", [1, 2])
def test_accumulation_equals_the_full_batch(repeats):
  system, batch = regression(repeats=repeats)
  results = []
  for accumulate in (1, 3):
    step, state = prepared(system, optax.adam(RATE), accumulate=accumulate)
    for _ in range(2):
      state, metrics = step(state, batch)
    results.append((state.params, metrics))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *results)


def test_accumulation_threads_collections_and_keys_through_the_microbatches():
  def loss(variables, batch, rng, step):
    seen = variables["stats"]["a"]["seen"] * 10 + batch["x"][0]
    draw = jax.random.uniform(rng)
    return of(variables, "a")[0] * seen, Aux({"draw": draw}, {"stats": {"a": {"seen": seen}}})

  system = Fake((Player("a", ("a",), loss),),
                params(a=0) | {"stats": {"a": {"seen": np.float32(0)}}})
  step, state = prepared(system, accumulate=3, seed=7)
  state, metrics = step(state, rows(1, 2, 3))
  assert state.collections["stats"]["a"]["seen"] == 123
  assert of(state.variables(), "a")[0] == pytest.approx(-RATE * (1 + 12 + 123) / 3)
  key = jax.random.fold_in(jax.random.key(7), 0)
  draws = [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(3)]
  assert metrics["a/draw"] == pytest.approx(np.mean(draws))


def test_coupled_examples_warn_or_refuse_accumulation():
  for couples, accumulate in (("no", 4), ("approximate", 1), ("exact", 1)):
    system, _ = regression(couples_examples=couples)
    assert check_accumulation(system, accumulate) == []
  system, _ = regression(couples_examples="approximate")
  (warning,) = check_accumulation(system, 4)
  assert "train.accumulate=4: the net's loss mixes examples" in warning
  system, _ = regression(couples_examples="exact")
  with pytest.raises(UserError, match="set train.accumulate=1"):
    prepared(system, accumulate=4)


def test_a_player_may_bring_its_own_gradients():
  def gradients(variables, batch, rng, step):
    return {"a": {"w": jnp.mean(batch["x"])}}, Aux({"loss": jnp.float32(0), "own": jnp.float32(1)})

  def loss(variables, batch, rng, step):
    raise AssertionError("custom gradients take the place of the loss's")

  system = Fake((Player("a", ("a",), loss, custom_gradients=gradients),), params(a=1))
  for accumulate in (1, 2):
    step, state = prepared(system, accumulate=accumulate)
    state, metrics = step(state, rows(1, 5))
    assert of(state.variables(), "a")[0] == pytest.approx(1 - RATE * 3)
    assert metrics["a/own"] == 1 and metrics["a/gradient_norm"] == pytest.approx(3)


def joint_losses(variables, batch, rng, step):
  a, b = of(variables, "a", "b")
  shared = jnp.sin(a * b)
  collections = {"stats": {"a": {"n": variables["stats"]["a"]["n"] + shared}}}
  return {"one": shared + a**2, "two": -2 * shared + b**2}, Aux({"shared": shared}, collections)


def joint_system(**kwargs):
  unused = lambda variables, batch, rng, step: (jnp.float32(0), Aux())  # noqa: E731
  return Fake((Player("one", ("a",), unused, **kwargs), Player("two", ("b",), unused)),
              params(a=0.5, b=0.7) | {"stats": {"a": {"n": np.float32(0)}}},
              joint=joint_losses)


def test_simultaneous_play_equals_the_gradients_by_hand():
  step, state = prepared(joint_system())
  state, metrics = step(state, rows(0))
  a, b = 0.5, 0.7
  expected = [a - RATE * (b * np.cos(a * b) + 2 * a), b - RATE * (-2 * a * np.cos(a * b) + 2 * b)]
  np.testing.assert_allclose(of(state.variables(), "a", "b"), expected, rtol=1e-6)
  assert metrics["one/loss"] == pytest.approx(np.sin(a * b) + a**2)
  assert metrics["shared"] == pytest.approx(np.sin(a * b)) and metrics["finite"]
  assert state.collections["stats"]["a"]["n"] == pytest.approx(np.sin(a * b))
  assert {k: int(v) for k, v in state.updates.items()} == {"one": 1, "two": 1}


@pytest.mark.parametrize("kwargs, accumulate", [({"every": 2}, 1), ({"repeats": 2}, 1), ({}, 2)])
def test_simultaneous_play_refuses_what_it_cannot_do(kwargs, accumulate):
  step, state = prepared(joint_system(**kwargs), accumulate=accumulate)
  with pytest.raises(UserError, match="set train.accumulate=1, or play=alternating"):
    step(state, rows(0, 0))


def test_ema_with_warm_up_covers_the_averaged_groups_and_waits_for_its_player():
  system = Fake((linear("a"), linear("b", every=2)), params(a=1, b=1), averaged=("a", "b"))
  step, state = prepared(system, ema_decay=0.15)
  assert step(state, rows(0))[0].ema["b"]["w"] != 1
  expected, count = {"a": 1.0, "b": 1.0}, {"a": 0, "b": 0}
  for i in range(3):
    state, _ = step(state, rows(0))
    for name in ("a", "b") if i % 2 == 0 else ("a",):
      decay = min((1 + count[name]) / (10 + count[name]), 0.15)  # 0.1, then 0.15
      count[name] += 1
      new = 1 - RATE * count[name]
      expected[name] = decay * expected[name] + (1 - decay) * new
    for name in ("a", "b"):
      np.testing.assert_allclose(state.ema[name]["w"], expected[name], rtol=1e-6)
  assert state.variables(ema=True)["params"]["a"]["w"] == state.ema["a"]["w"]
  flat = prepared(system, ema_decay=0.5, ema_warmup=False)
  np.testing.assert_allclose(flat[0](flat[1], rows(0))[0].ema["a"]["w"], 1 - RATE / 2, rtol=1e-6)


def test_no_average_where_the_decay_is_zero():
  _, state = prepared(Fake((linear("a"),), params(a=1), averaged=("a",)))
  assert state.ema == {}
  assert state.variables(ema=True)["params"]["a"]["w"] == 1


def poisoned(where):
  """A player whose loss, gradient or collection is not finite when the batch says so."""

  def loss(variables, batch, rng, step):
    (a,) = of(variables, "a")
    flag = batch["x"][0]
    bad = jnp.where(flag > 0, jnp.nan, 0.0)
    # The root's value is finite, its slope is not.
    value = {"loss": a + bad, "gradient": a + jnp.sqrt(1 - flag + 0 * a)}.get(where, a)
    stats = {"n": bad if where == "collection" else jnp.float32(0), "count": jnp.int32(0)}
    return value, Aux({}, {"stats": {"a": stats}})

  stats = {"a": {"n": np.float32(0), "count": np.int32(0)}}
  return Fake((linear("b"), Player("a", ("a",), loss)), params(a=1, b=1) | {"stats": stats})


@pytest.mark.parametrize("where", ["loss", "gradient", "collection"])
def test_the_finite_flag_sees_losses_gradients_and_collections(where):
  step, state = prepared(poisoned(where))
  state, metrics = step(state, rows(0))
  assert metrics["finite"] and metrics["a/finite"] and metrics["b/finite"]
  state, metrics = step(state, rows(1))
  assert not metrics["finite"] and not metrics["a/finite"] and metrics["b/finite"]


def test_the_finite_flag_of_simultaneous_play_sees_collections():
  def losses(variables, batch, rng, step):
    losses, aux = joint_losses(variables, batch, rng, step)
    aux.collections["stats"]["a"]["n"] += jnp.where(batch["x"][0] > 0, jnp.inf, 0.0)
    return losses, aux

  step, state = prepared(dataclasses.replace(joint_system(), joint=losses))
  assert step(state, rows(0))[1]["finite"]
  metrics = step(state, rows(1))[1]
  assert not metrics["finite"] and not metrics["collections/finite"]


def test_all_players_of_a_step_draw_alike_and_no_two_steps_do():
  def loss(name):
    def draw(variables, batch, rng, step):
      return of(variables, name)[0], Aux({"draw": jax.random.uniform(rng)})
    return draw

  system = Fake(tuple(Player(name, (name,), loss(name)) for name in "abc"), params(a=0, b=0, c=0))
  step, state = prepared(system, seed=3)
  draws = []
  for i in range(3):
    state, metrics = step(state, rows(0))
    assert metrics["a/draw"] == metrics["b/draw"] == metrics["c/draw"]
    expected = jax.random.uniform(jax.random.fold_in(jax.random.key(3), i))
    assert metrics["a/draw"] == expected  # a function of the seed and the step alone
    draws.append(float(expected))
  assert len(set(draws)) == 3


def test_one_compilation_in_a_run_and_one_more_for_another_shape():
  system, batch = regression(every=2)
  optimizers = {"net": optax.adam(RATE)}
  state = states.create(system, optimizers, system.made, {}, True)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  placed = jax.tree.map(lambda _: one, state)
  step = CompiledStep(make_step(system, optimizers, StepOptions()), placed)
  state = jax.device_put(state, placed)
  for _ in range(4):
    before = state
    state, _ = step(state, jax.device_put(batch, one))
    assert before.params["net"]["w"].is_deleted()  # the state was donated
  assert step.compilations == 1
  state, _ = step(state, jax.device_put({k: v[:6] for k, v in batch.items()}, one))
  state, _ = step(state, jax.device_put(batch, one))
  assert step.compilations == 2


def test_groups_must_belong_to_one_player_each():
  with pytest.raises(UserError, match="the players train"):
    prepared(Fake((linear("a"),), params(a=0, b=0)))
  with pytest.raises(UserError, match="the players train"):
    prepared(Fake((linear("a"), dataclasses.replace(linear("a"), name="again")), params(a=0)))
  system = Fake((linear("a"),), params(a=0))
  with pytest.raises(UserError, match="both trained and frozen"):
    states.create(system, {"a": optax.sgd(1.0)}, system.made, params(a=1), False)


def test_frozen_groups_are_seen_and_left_alone():
  def loss(variables, batch, rng, step):
    a, b = of(variables, "a", "b")
    return a * b, Aux()

  system = Fake((Player("a", ("a",), loss),), params(a=2))
  optimizers = {"a": optax.sgd(RATE)}
  state = states.create(system, optimizers, system.made, params(b=3), False)
  state, _ = jax.jit(make_step(system, optimizers, StepOptions(ema_decay=0.0)))(state, rows(0))
  assert of(state.variables(), "a", "b") == [pytest.approx(2 - RATE * 3), 3]
  assert set(state.params) == {"a"} and set(state.optimizer) == {"a"}


def test_a_batch_must_divide_into_repeats_and_microbatches():
  system = Fake((linear("a"), linear("b", repeats=3)), params(a=0, b=0))
  check_division(system, 12, 2)
  with pytest.raises(UserError, match="train.batch_size=9 does not divide into train.accumulate=2 "
                                      "microbatches; use a multiple of 2"):
    check_division(system, 9, 2)
  with pytest.raises(UserError, match="microbatches in each of the b's 3 updates; use a multiple "
                                      "of 6"):
    check_division(system, 8, 2)


def test_a_microbatch_is_as_large_as_the_devices_and_the_loss_ask():
  system = Fake((linear("a", couples_examples="approximate"),), params(a=0))
  check_division(system, 16, 2, shards=8)
  with pytest.raises(UserError, match="each over 8 devices; use a multiple of 32"):
    check_division(system, 16, 4, shards=8)
  with pytest.raises(UserError, match="compares the examples of a batch, and there is one"):
    check_division(system, 4, 4)
  check_division(Fake((linear("a"),), params(a=0)), 4, 4)


@pytest.mark.parametrize("together", [False, True], ids=["alternating", "simultaneous"])
def test_the_average_has_collections_of_its_own(together):
  """Every fourth step, of what the averaged parameters compute, from their own last value."""

  def loss(variables, batch, rng, step):
    (a,) = of(variables, "a")
    seen = {g: {"mean": 0.5 * (variables["seen"][g]["mean"] + a + batch["x"][0])} for g in "ab"}
    return a + of(variables, "b")[0], Aux({}, {"seen": seen})

  def joint(variables, batch, rng, step):
    value, aux = loss(variables, batch, rng, step)
    return {"both": value}, aux

  start = params(a=1, b=1) | {"seen": {g: {"mean": np.float32(0)} for g in "ab"}}
  system = Fake((Player("both", ("a", "b"), loss),), start, averaged=("a",),
                joint=joint if together else None)
  step, state = prepared(system, ema_decay=0.9, ema_warmup=False)
  # No copy of what is not averaged.
  assert set(state.ema_collections["seen"]) == {"a"}
  expected = 0.0
  for i in range(6):
    state, _ = step(state, rows(i, 7))
    if i % 4 == 0:
      expected = 0.5 * (expected + state.ema["a"]["w"] + i)
    seen = state.variables(ema=True)["seen"]
    assert seen["a"]["mean"] == pytest.approx(float(expected))
    assert seen["b"]["mean"] == state.collections["seen"]["b"]["mean"]
    assert abs(state.variables()["seen"]["a"]["mean"] - expected) > 1e-3 or i == 0


def test_collections_of_the_average_come_from_one_microbatch():
  def loss(variables, batch, rng, step):
    (a,) = of(variables, "a")
    return a, Aux({}, {"seen": {"a": {"rows": jnp.float32(len(batch["x"]))}}})

  start = params(a=1) | {"seen": {"a": {"rows": np.float32(0)}}}
  system = Fake((Player("a", ("a",), loss),), start, averaged=("a",))
  step, state = prepared(system, ema_decay=0.9, accumulate=2)
  state, _ = step(state, rows(1, 2, 3, 4, 5, 6))
  assert state.ema_collections["seen"]["a"]["rows"] == 3
  step, state = prepared(system, ema_decay=0.0)
  assert not state.ema_collections and step(state, rows(1))[0].ema_collections == {}
