import os
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import struct
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from t2i_jax.errors import UserError
from t2i_jax.training.checkpoint import Checkpoints


@struct.dataclass
class State:
  step: jax.Array
  params: dict
  ema: dict
  optimizer: dict
  collections: dict


def make_state(rows=16, step=3):
  params = {
    "net": {"w": jax.random.normal(jax.random.key(0), (rows, 8)), "b": jnp.zeros(8)},
    "empty": {},
  }
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.masked(optax.adamw(optax.constant_schedule(1e-3)), {"net": True, "empty": True}),
  )
  _, opt_state = optimizer.update(params, optimizer.init(params), params)
  return State(
    jnp.int32(step), params, {"net": params["net"]}, {"main": opt_state, "other": opt_state},
    {"batch_stats": {"net": {"mean": jnp.full(8, jnp.pi)}}},
  )


def sharded(tree, *shape):
  """`tree` on the first devices as a mesh of `shape`, split over as many axes as it has."""
  names = ("a", "b")[:len(shape)]
  devices = jax.devices()[:int(np.prod(shape))]
  mesh = jax.make_mesh(shape, names, devices=devices, axis_types=(AxisType.Auto,) * len(shape))
  return jax.tree.map(
    lambda x: jax.device_put(x, NamedSharding(mesh, P(*names[:x.ndim]))), tree)


def abstract(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def assert_same(restored, saved, placed):
  assert jax.tree.structure(restored) == jax.tree.structure(saved)
  for a, b, c in zip(*map(jax.tree.leaves, (restored, saved, placed)), strict=True):
    assert a.dtype == b.dtype and a.sharding == c.sharding
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def directory(tmp_path):
  return tmp_path / "checkpoints"


@pytest.fixture
def saved(directory):
  """Steps 1 and 2 of a small state."""
  checkpoints = Checkpoints(directory)
  for step in (1, 2):
    checkpoints.save(step, make_state(step=step), {"position": step})
  checkpoints.close()
  return directory


def test_round_trip_is_bit_exact_and_reshards(directory):
  state = sharded(make_state(), 8)
  meta = {"position": 128, "config": "abc", "nested": {"rate": 0.1, "list": [1, None]}}
  checkpoints = Checkpoints(directory)
  assert checkpoints.latest_step() is None
  checkpoints.save(3, state, meta)
  assert checkpoints.latest_step() == 3
  assert checkpoints.meta(3) == meta
  for shape in ((8,), (1,), (2, 4)):
    placed = sharded(state, *shape)
    assert_same(checkpoints.restore(3, abstract(placed)), state, placed)
  checkpoints.close()


def test_buffers_may_be_donated_at_once(directory):
  @jax.jit
  def make():
    return {"w": jnp.arange(400_000.0)}

  overwrite = jax.jit(lambda state: {"w": state["w"] * 0 - 1}, donate_argnums=0)
  state = make()
  target = abstract(state)
  checkpoints = Checkpoints(directory)
  checkpoints.save(1, state, {})
  state = overwrite(state)
  jax.block_until_ready(state)
  restored = checkpoints.restore(1, target)
  np.testing.assert_array_equal(restored["w"], np.arange(400_000.0))
  checkpoints.close()


def test_keeps_the_last_and_every_nth(directory):
  checkpoints = Checkpoints(directory, keep_last=2, keep_every=10)
  for step in range(8, 15):
    checkpoints.save(step, {"w": jnp.full(3, step)}, {})
  assert checkpoints.steps() == [10, 13, 14]
  checkpoints.save(14, {"w": jnp.zeros(3)}, {})  # already stored: left as it is
  checkpoints.close()
  assert sorted(os.listdir(directory / "state")) == ["10", "13", "14"]
  reopened = Checkpoints(directory, read_only=True)
  assert reopened.steps() == [10, 13, 14]
  restored = reopened.restore(14, abstract({"w": jnp.zeros(3, jnp.int32)}))
  np.testing.assert_array_equal(restored["w"], [14, 14, 14])


def test_frozen_groups_are_stored_once(directory):
  frozen = {"text_encoder": {"w": jnp.ones((4, 4), jnp.bfloat16)}}
  checkpoints = Checkpoints(directory)
  assert not checkpoints.has_frozen()
  with pytest.raises(UserError, match="no frozen groups"):
    checkpoints.restore_frozen(abstract(frozen))
  checkpoints.save_frozen(frozen, {"of": "this"})
  checkpoints.save_frozen(jax.tree.map(jnp.zeros_like, frozen), {})
  assert checkpoints.has_frozen()
  placed = sharded(frozen, 2)
  assert_same(checkpoints.restore_frozen(abstract(placed)), frozen, placed)
  assert checkpoints.restore_frozen({}) == {}
  checkpoints.close()


@pytest.mark.parametrize("change, message", [
  (lambda s: s.replace(params={"other": s.params["net"]}),
   "it lacks params/other/b, params/other/w; it has besides params/net/b, params/net/w"),
  (lambda s: make_state(rows=24),
   r"params/net/w is float32\[16,8\] there and float32\[24,8\] here"),
  (lambda s: s.replace(step=jnp.float32(0)), r"step is int32\[\] there and float32\[\] here"),
  (lambda s: s.replace(optimizer={"main": s.optimizer["main"]}),
   "it has besides optimizer/other/.* and 3 more"),
])
def test_another_tree_is_named_before_anything_is_read(saved, change, message):
  checkpoints = Checkpoints(saved, read_only=True)
  for path in (saved / "state" / "2" / "tree").rglob("*"):
    if path.is_file():
      path.write_bytes(b"")  # would fail if it were read
  with pytest.raises(UserError, match=message) as error:
    checkpoints.restore(2, abstract(change(make_state())))
  assert f"{saved}/state/2" in str(error.value) and "\n" not in str(error.value)


def test_absent_step_and_absent_directory(saved, tmp_path):
  with pytest.raises(UserError, match="no checkpoint of step 7 .* stored: 1, 2"):
    Checkpoints(saved, read_only=True).restore(7, abstract(make_state()))
  with pytest.raises(UserError, match="no checkpoints in"):
    Checkpoints(tmp_path / "nowhere", read_only=True)
  assert not (tmp_path / "nowhere").exists()
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot open the checkpoint directory"):
    Checkpoints(tmp_path / "file")


@pytest.mark.parametrize("damage", ["remove", "truncate"])
@pytest.mark.parametrize("file", ["tree/manifest.ocdbt", "tree/_METADATA", "tree/d/*",
                                  "about/data.json"])
def test_damaged_newest_is_reported_and_not_replaced(saved, file, damage, capfd):
  (path,) = (saved / "state" / "2").glob(file)
  if damage == "remove":
    path.unlink()
  else:
    os.truncate(path, path.stat().st_size // 2)
  checkpoints = Checkpoints(saved)
  assert checkpoints.latest_step() == 2
  target = abstract(make_state())
  capfd.readouterr()
  with pytest.raises(UserError, match="delete it to go on from step 1") as error:
    checkpoints.restore(2, target)
  assert f"{saved}/state/2 cannot be read" in str(error.value) and "\n" not in str(error.value)
  assert "Traceback" not in capfd.readouterr().err
  assert checkpoints.restore(1, target).step == 1
  checkpoints.close()


def test_failed_background_save_is_raised_by_the_next_call(directory, capfd):
  small = {"w": jnp.arange(10.0)}
  big = {"w": jax.random.normal(jax.random.key(0), (500_000,))}
  checkpoints = Checkpoints(directory, keep_last=1)
  checkpoints.save(1, small, {})
  checkpoints.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a full disk
  try:
    checkpoints.save(2, big, {})
    with pytest.raises(UserError, match="saving step 2 .* checkpoint of step 1 is intact") as error:
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert "\n" not in str(error.value)
  assert "Traceback" not in capfd.readouterr().err
  with pytest.raises(UserError, match="saving step 2"):
    checkpoints.save(3, small, {})
  assert checkpoints.latest_step() == 1
  assert_same(checkpoints.restore(1, abstract(small)), small, small)
  checkpoints.close()


def test_what_a_kill_left_behind_is_ignored_and_cleaned(saved):
  half = saved / "state" / "3.orbax-checkpoint-tmp"
  half.mkdir()
  (half / "data").write_text("x")
  reader = Checkpoints(saved, read_only=True)
  assert reader.steps() == [1, 2] and half.exists()
  writer = Checkpoints(saved)
  assert writer.latest_step() == 2
  writer.save(3, make_state(step=3), {})
  writer.close()
  assert sorted(os.listdir(saved / "state")) == ["2", "3"]


def test_kill_during_a_deletion_leaves_nothing_that_looks_whole(saved, monkeypatch):
  def killed(path):
    (path / "about" / "data.json").unlink()
    raise KeyboardInterrupt

  monkeypatch.setattr(type(epath.Path(saved)), "rmtree", killed)
  checkpoints = Checkpoints(saved)
  checkpoints.save(3, make_state(step=3), {"position": 3})
  with pytest.raises(KeyboardInterrupt):
    checkpoints.wait()
  monkeypatch.undo()
  reopened = Checkpoints(saved, read_only=True)
  assert reopened.steps() == [2, 3]
  assert [reopened.meta(step) for step in (2, 3)] == [{"position": 2}, {"position": 3}]


_KILLED = """
import sys, jax, jax.numpy as jnp
from t2i_jax.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1], keep_last=1)
for step in range(int(sys.argv[2]), 1000):
  checkpoints.save(step, {"w": jnp.arange(3_000_000) * 7919 * step}, {"position": step})
  print(step, flush=True)
"""


def test_kill_during_a_save_leaves_a_whole_checkpoint(directory):
  placed = SingleDeviceSharding(jax.devices()[0])
  target = {"w": jax.ShapeDtypeStruct((3_000_000,), jnp.int32, sharding=placed)}
  first = 1
  for delay in (0.0, 0.02, 0.05, 0.1):
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(directory), str(first)],
                               stdout=subprocess.PIPE, text=True)
    started = [int(process.stdout.readline()) for _ in range(2)]
    time.sleep(delay)
    process.kill()
    process.wait()
    checkpoints = Checkpoints(directory, read_only=True)
    # A save starts only when the one before it is whole.
    assert checkpoints.latest_step() >= started[0]
    for step in checkpoints.steps():
      restored = checkpoints.restore(step, target)
      expected = np.arange(3_000_000, dtype=np.int32) * np.int32(7919) * np.int32(step)
      np.testing.assert_array_equal(restored["w"], expected)
      assert checkpoints.meta(step) == {"position": step}
    first = checkpoints.latest_step() + 1
    checkpoints.close()


def test_a_relative_directory_is_read_as_it_is_written(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  state = sharded(make_state(), 1)
  checkpoints = Checkpoints("run/checkpoints")
  checkpoints.save(3, state, {})
  checkpoints.close()
  checkpoints = Checkpoints("run/checkpoints", read_only=True)
  assert checkpoints.steps() == [3]
  assert_same(checkpoints.restore(3, abstract(state)), state, state)
  checkpoints.close()
  assert (tmp_path / "run" / "checkpoints" / "state" / "3").is_dir()
