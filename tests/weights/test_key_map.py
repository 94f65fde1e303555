"""Key maps: one set of rules, both directions, and errors that list what is wrong."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.errors import UserError
from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.rules import Rule, conv, dense, linear, norm
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import Stored, open_weights

MAP = KeyMap(
  [
    Rule("embed", "tok.weight"),
    *[Rule(f"layers_{{i}}/{ours}/kernel", "blocks.{i}.qkv.weight", linear, (at, 3))
      for at, ours in enumerate(("query", "key", "value"))],
    *dense("layers_{i}/out", "blocks.{i}.proj"),
    *norm("layers_{i}/norm", "blocks.{i}.ln"),
    Rule("conv/kernel", "conv.weight", conv),
    Rule("scale", "scale"),
  ],
  [r"position_ids$"],
  [("", "model.")],
)  # fmt: skip


def tree(layers=2):
  random = np.random.default_rng(0)
  array = lambda *shape: random.normal(size=shape).astype(np.float32)  # noqa: E731
  layer = lambda: {  # noqa: E731
    "query": {"kernel": array(4, 6)}, "key": {"kernel": array(4, 6)},
    "value": {"kernel": array(4, 6)}, "out": {"kernel": array(6, 4), "bias": array(4)},
    "norm": {"scale": array(4), "bias": array(4)},
  }  # fmt: skip
  return {
    "embed": array(9, 4), "conv": {"kernel": array(3, 2, 4, 5)}, "scale": array(),
    **{f"layers_{i}": layer() for i in range(layers)},
  }  # fmt: skip


def saved(**changed):
  """`Stored`s of the tree on the other side, some in place of others or gone (None)."""
  tensors = {name: Stored(*parts) for name, parts in MAP.save(tree()).items()}
  for name, value in changed.items():
    if value is None:
      del tensors[name]
    else:
      tensors[name] = Stored(value.shape, value.dtype, lambda value=value: value)
  return tensors


def abstract():
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree())


def test_the_other_side_has_its_own_layouts():
  tensors, ours = saved(), tree()
  qkv = tensors["blocks.1.qkv.weight"]
  assert qkv.shape == (18, 4)
  np.testing.assert_array_equal(qkv.read()[6:12], ours["layers_1"]["key"]["kernel"].T)
  np.testing.assert_array_equal(
    tensors["conv.weight"].read()[2, 1], ours["conv"]["kernel"][:, :, 1, 2]
  )
  assert tensors["scale"].shape == ()


def test_there_and_back_again_byte_for_byte(tmp_path):
  write_safetensors(tmp_path / "a.safetensors", saved())
  loaded = MAP.load(open_weights(tmp_path / "a.safetensors"), abstract(), source="a")
  assert jax.tree.all(jax.tree.map(lambda x, y: x.tobytes() == y.tobytes(), loaded, tree()))
  write_safetensors(tmp_path / "b.safetensors", MAP.save(loaded))
  bytes_of = lambda name: (tmp_path / name).read_bytes()  # noqa: E731
  assert bytes_of("a.safetensors") == bytes_of("b.safetensors")


def test_names_that_begin_otherwise_and_buffers():
  tensors = {f"model.{name}": value for name, value in saved().items()}
  tensors["model.position_ids"] = Stored((1, 77), np.dtype("i8"), lambda: np.zeros((1, 77)))
  loaded = MAP.load(tensors, abstract(), source="a")
  np.testing.assert_array_equal(loaded["embed"], tree()["embed"])


def test_types_and_places():
  devices = []

  def put(path, array):
    devices.append(path)
    return jax.device_put(array, jax.devices()[1])

  loaded = MAP.load(saved(), abstract(), source="a", dtype=jnp.bfloat16, put=put)
  leaves = jax.tree.leaves(loaded)
  assert all(x.dtype == jnp.bfloat16 and x.devices() == {jax.devices()[1]} for x in leaves)
  assert devices[0] == "conv/kernel" and len(devices) == len(leaves)


def fails(tensors, *words):
  with pytest.raises(UserError) as error:
    MAP.load(tensors, abstract(), source="FILE")
  for word in ("FILE", *words):
    assert word in str(error.value), error.value


def test_every_difference_is_listed_at_once():
  fails(
    saved(**{"scale": None, "tok.weight": np.zeros((9, 5)), "head.weight": np.zeros(1)}),
    "missing (1) scale;", "(1) tok.weight is [9, 5], not [9, 4]", "unexpected (1) head.weight",
  )
  fails(saved(**{"blocks.0.qkv.weight": np.zeros((17, 4))}), "is [17, 4], not [18, 4]")


def test_another_architecture():
  fails({f"other.{i}": Stored((1,), np.dtype("f4"), None) for i in range(20)},
        "missing (13) blocks.0.ln.bias,", "and 5 more", "unexpected (20)", "and 12 more")


def test_numbers_that_are_none():
  broken = np.zeros((9, 4), np.float32)
  broken[3, 1] = np.nan
  fails(saved(**{"tok.weight": broken}), "NaN or infinity in (1) tok.weight")


def test_a_path_without_a_rule_is_ours_to_mend():
  with pytest.raises(LookupError, match="no rule for 'other/kernel'"):
    MAP.save({"other": {"kernel": np.zeros(2)}})


def test_no_more_than_one_tensor_beside_the_model(tmp_path):
  """Loading lets go of each tensor; writing holds one."""
  size, number = 1 << 20, 16
  ours = {f"layers_{i}": {"out": {"kernel": np.zeros((size // 256, 64), np.float32)}}
          for i in range(number)}  # fmt: skip
  key_map = KeyMap(dense("layers_{i}/out", "{i}", bias=False))
  path = tmp_path / "a.safetensors"
  tracemalloc.start()
  write_safetensors(path, key_map.save(ours))
  assert tracemalloc.get_traced_memory()[1] < 3.5 * size
  kept = []
  tracemalloc.reset_peak()
  key_map.load(open_weights(path), ours, source="a", put=lambda path, array: kept.append(None))
  assert tracemalloc.get_traced_memory()[1] < 3.5 * size
  tracemalloc.stop()


def test_tensors_are_read_when_they_are_asked_for():
  """A tree of what is in the file, each array read by itself, again at each time."""
  file, asked = saved(), []
  watched = {
    name: Stored(t.shape, t.dtype, lambda name=name, t=t: asked.append(name) or t.read())
    for name, t in file.items()
  }
  found = MAP.stored(watched, abstract(), source="it", dtype=np.float16)
  assert asked == []
  ours = tree()
  assert jax.tree.all(jax.tree.map(lambda x, y: x.shape == y.shape, found, ours))
  read = jax.tree.map(lambda x: x.read(), found)
  assert set(asked) == set(file)
  assert jax.tree.all(jax.tree.map(
    lambda x, y: x.dtype == np.float16 and np.array_equal(x, y.astype(np.float16)), read, ours
  ))
  broken = MAP.stored(saved(**{"scale": np.float32([np.nan])[0]}), abstract(), source="it")
  with pytest.raises(UserError, match=r"it holds NaN or infinity in \(1\) scale"):
    broken["scale"].read()
  with pytest.raises(UserError, match="missing .* tok.weight"):
    MAP.stored(saved(**{"tok.weight": None}), abstract(), source="it")


def test_the_parts_of_each_head_lie_together():
  """Three heads of two channels: queries, keys and values of the first, of the second..."""
  rules = [Rule(name, "qkv", part=(i, 3), runs=3) for i, name in enumerate(("q", "k", "v"))]
  names = KeyMap(rules)
  fused = np.arange(18)
  file = {"qkv": Stored((18,), fused.dtype, lambda: fused)}
  shapes = {name: jax.ShapeDtypeStruct((6,), fused.dtype) for name in ("q", "k", "v")}
  found = names.load(file, shapes, source="it")
  assert found["q"].tolist() == [0, 1, 6, 7, 12, 13]
  assert found["k"].tolist() == [2, 3, 8, 9, 14, 15]
  assert found["v"].tolist() == [4, 5, 10, 11, 16, 17]
  shape, _, read = names.save(found)["qkv"]
  assert shape == (18,) and read().tolist() == fused.tolist()
