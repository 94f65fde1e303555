"""Files of public formats, whole, broken and hostile."""

import io
import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t2i_jax.errors import UserError
from t2i_jax.weights.safetensors_file import write_safetensors
from t2i_jax.weights.stored import open_weights

RANDOM = np.random.default_rng(0)
TENSORS = {
  "a.weight": RANDOM.normal(size=(3, 4)).astype(np.float32),
  "a.bias": RANDOM.normal(size=5).astype(np.float16),
  "b": RANDOM.normal(size=(2, 2, 2)).astype(ml_dtypes.bfloat16),
  "ids": np.arange(6).reshape(2, 3),
  "scale": np.array(2.5, np.float32),
  "empty": np.zeros((0, 3), np.float32),
}


def assert_same(tensors, expected=TENSORS):
  assert set(tensors) == set(expected)
  for name, value in expected.items():
    found = tensors[name]
    assert (found.shape, found.dtype) == (value.shape, value.dtype), name
    assert found.read().tobytes() == value.tobytes(), name


def fails(path, *words):
  with pytest.raises(UserError) as error:
    open_weights(path)
  message = str(error.value)
  for word in (str(path), *words):
    assert word in message, message
  return message


# Safetensors.


def test_safetensors(tmp_path):
  save_file(TENSORS, tmp_path / "a.safetensors")
  assert_same(open_weights(tmp_path / "a.safetensors"))


def test_what_is_written_is_read_by_the_library(tmp_path):
  tensors = {k: (v.shape, v.dtype, lambda v=v: v) for k, v in TENSORS.items()}
  path = tmp_path / "a.safetensors"
  write_safetensors(path, tensors)
  loaded = load_file(path)
  assert all(loaded[k].tobytes() == v.tobytes() for k, v in TENSORS.items())
  assert_same(open_weights(path))
  # And from file to file, byte for byte.
  write_safetensors(tmp_path / "b.safetensors", open_weights(path))
  assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
  path = tmp_path / "a.safetensors"
  path.write_bytes(b"old")

  def fail():
    raise OSError(28, "No space left on device")

  with pytest.raises(UserError, match="No space left"):
    write_safetensors(path, {"x": ((2,), np.dtype("f4"), fail)})
  assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"] and path.read_bytes() == b"old"


def safetensors_of(path, header, numbers=b""):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
  return path


def test_truncated_safetensors(tmp_path):
  path = tmp_path / "a.safetensors"
  save_file(TENSORS, path)
  whole = path.read_bytes()
  for length in (0, 4, 20, len(whole) // 2, len(whole) - 1):
    path.write_bytes(whole[:length])
    fails(path, "copy it again")


def test_a_header_that_claims_more_than_the_file_holds(tmp_path):
  entry = {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}
  fails(safetensors_of(tmp_path / "a.safetensors", {"x": entry}, b"\0" * 8))
  path = tmp_path / "b.safetensors"
  path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
  fails(path)
  entry = {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 4]}
  fails(safetensors_of(tmp_path / "c.safetensors", {"x": entry}, b"\0" * 4))


def test_a_name_that_comes_twice(tmp_path):
  entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
  path = tmp_path / "a.safetensors"
  fails(safetensors_of(path, f"{{{entry},{entry}}}".encode(), b"\0" * 4), "'x' twice")


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
  path = tmp_path / "a.safetensors"
  save_file(TENSORS, path)
  tensors = open_weights(path)
  path.write_bytes(path.read_bytes()[:-40])
  with pytest.raises(UserError, match="shorter"):
    [tensor.read() for tensor in tensors.values()]


# Folders and shards.


def sharded(folder):
  names = list(TENSORS)
  for i in range(2):
    save_file({k: TENSORS[k] for k in names[i::2]}, folder / f"model-{i}.safetensors")
  weights = {k: f"model-{i % 2}.safetensors" for i, k in enumerate(names)}
  (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
  return folder


def test_shards_and_folders(tmp_path):
  assert_same(open_weights(sharded(tmp_path)))
  assert_same(open_weights(tmp_path / "model.safetensors.index.json"))


def test_a_half_downloaded_set_of_shards(tmp_path):
  (sharded(tmp_path) / "model-1.safetensors").unlink()
  with pytest.raises(UserError, match=r"1 of 2 shards are missing \(model-1.safetensors\)"):
    open_weights(tmp_path)
  save_file({"other": np.zeros(1)}, tmp_path / "model-1.safetensors")
  with pytest.raises(UserError, match="lacks 'a.bias' and 2 more"):
    open_weights(tmp_path)


def test_an_index_names_nothing_outside_its_folder(tmp_path):
  index = tmp_path / "model.safetensors.index.json"
  for name in ("../secret.safetensors", "/etc/passwd", ".."):
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(UserError, match="not beside it"):
      open_weights(tmp_path)
  for text in ("[]", "{}", "{", '{"weight_map": [1]}', '{"weight_map": {"x": 1}}'):
    index.write_text(text)
    with pytest.raises(UserError, match="no index of shards"):
      open_weights(tmp_path)


def test_no_weights(tmp_path):
  fails(tmp_path, "none of model.safetensors")
  fails(tmp_path / "a.safetensors", "no weights")
  (tmp_path / "a.h5").write_bytes(b"x")
  fails(tmp_path / "a.h5", "no known format")


# PyTorch's files, built by hand: PyTorch is not needed to read them.


class Storage:
  """A reference that the pickler writes as PyTorch does."""

  def __init__(self, key, kind, numbers):
    self.key, self.kind, self.numbers = key, kind, numbers



class Pickler(pickle._Pickler):
  """Writes references to globals that need not exist, and storages as persistent ids."""

  def save(self, obj, save_persistent_id=True):
    if isinstance(obj, Global):
      self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
      return
    if isinstance(obj, Call):
      self.save(obj.function)
      self.save(obj.arguments)
      self.write(pickle.REDUCE)
      return
    if isinstance(obj, Build):
      self.save(obj.target)
      self.save(obj.state)
      self.write(pickle.BUILD)
      return
    super().save(obj, save_persistent_id)

  def persistent_id(self, obj):
    if isinstance(obj, Storage):
      return ("storage", Global("torch", obj.kind), obj.key, "cpu", len(obj.numbers))
    return None


class Global:
  def __init__(self, module, name):
    self.module, self.name = module, name


class Call:
  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments


class Build:
  """Attributes that are set on what has been made."""

  def __init__(self, target, state):
    self.target, self.state = target, state


def tensor(storage, offset, shape, strides):
  rebuild = Global("torch._utils", "_rebuild_tensor_v2")
  return Call(rebuild, storage, offset, shape, strides, False, Call(Global("collections",
                                                                           "OrderedDict")))


def pickled(tree):
  file = io.BytesIO()
  Pickler(file, 2).dump(tree)
  return file.getvalue()


def torch_zip(path, tree, storages=(), compression=zipfile.ZIP_STORED, data=None):
  with zipfile.ZipFile(path, "w", compression) as archive:
    content = pickled(tree) if data is None else data
    archive.writestr("archive/data.pkl", content, zipfile.ZIP_STORED)
    archive.writestr("archive/byteorder", "little")
    for storage in storages:
      archive.writestr(f"archive/data/{storage.key}", storage.numbers.tobytes())
  return path


NUMBERS = Storage("0", "FloatStorage", np.arange(12, dtype=np.float32))
VIEWS = {
  "whole": tensor(NUMBERS, 0, (3, 4), (4, 1)),
  "transposed": tensor(NUMBERS, 0, (4, 3), (1, 4)),
  "row": tensor(NUMBERS, 4, (4,), (1,)),
  "nested": {"list": [tensor(NUMBERS, 11, (), ())]},
}
GRID = NUMBERS.numbers.reshape(3, 4)
EXPECTED = {
  "whole": GRID, "transposed": GRID.T, "row": GRID[1], "nested.list.0": np.array(11, np.float32)
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_torch_views_of_one_storage(tmp_path, suffix):
  found = open_weights(torch_zip(tmp_path / f"a{suffix}", VIEWS, [NUMBERS]))
  assert_same(found, EXPECTED)


def test_torch_training_checkpoints_are_unwrapped(tmp_path):
  callback = Global("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
  tree = {"epoch": 3, "callbacks": {callback: {"best": 1.0}}, "state_dict": VIEWS}
  assert_same(open_weights(torch_zip(tmp_path / "a.ckpt", tree, [NUMBERS])), EXPECTED)


HOSTILE = {
  "os.system": lambda mark: Call(Global("os", "system"), f"touch {mark}"),
  "posix.system": lambda mark: Call(Global("posix", "system"), f"touch {mark}"),
  "builtins.eval": lambda mark: Call(Global("builtins", "eval"), f"open({str(mark)!r}, 'w')"),
  "__builtin__.eval": lambda mark: Call(Global("__builtin__", "eval"), f"open({str(mark)!r}, 'w')"),
  "builtins.getattr": lambda mark: Call(Global("builtins", "getattr"), VIEWS, "keys"),
  "torch.load": lambda mark: Call(Global("torch", "load"), str(mark)),
  "torch.hub.load": lambda mark: Call(Global("torch", "hub.load"), str(mark)),
  "runpy.run_path": lambda mark: Call(Global("runpy", "run_path"), str(mark)),
  "functools.partial": lambda mark: Call(Global("functools", "partial"), Global("os", "remove")),
  "numpy.load": lambda mark: Call(Global("numpy", "load"), str(mark)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_would_run_code(tmp_path, name):
  mark = tmp_path / "mark"
  tree = {"state_dict": VIEWS, "payload": HOSTILE[name](mark)}
  fails(torch_zip(tmp_path / "a.pt", tree, [NUMBERS]), f"it would call {name}")
  assert not mark.exists()


def test_tensors_that_are_not_in_the_file(tmp_path):
  path, few = tmp_path / "a.pt", Storage("0", "FloatStorage", NUMBERS.numbers[:3])
  fails(torch_zip(path, VIEWS, []), "storage 0 is missing or too small")
  fails(torch_zip(path, VIEWS, [few]), "storage 0 is missing or too small")
  for wrong in (
    tensor(NUMBERS, 9, (4,), (1,)), tensor(NUMBERS, -1, (4,), (1,)),
    tensor(NUMBERS, 0, (1 << 40,), (0,)), tensor(NUMBERS, 0, (2,), (100,)),
    tensor(NUMBERS, 0, (2,), (-1,)), tensor(NUMBERS, 0, (2,), (1, 1)), tensor(3, 0, (2,), (1,)),
  ):  # fmt: skip
    fails(torch_zip(path, {"x": wrong}, [NUMBERS]), "not read")
  fails(torch_zip(path, VIEWS, [NUMBERS], zipfile.ZIP_DEFLATED), "too small")


def test_containers_that_hold_themselves_or_multiply(tmp_path):
  path = tmp_path / "a.pt"
  loop = {"x": VIEWS["row"]}
  loop["self"] = loop
  assert set(open_weights(torch_zip(path, loop, [NUMBERS]))) == {"x"}
  laughs = [VIEWS["row"]]
  for _ in range(60):
    laughs = [laughs, laughs]
  assert len(open_weights(torch_zip(path, laughs, [NUMBERS]))) == 1


def test_nothing_is_changed_after_it_was_checked(tmp_path):
  """Strides that leave the buffer, set on a tensor that was within it; other functions."""
  rebuild = Global("torch._utils", "_rebuild_tensor_v2")
  for target, state in (
    (VIEWS["row"], {"strides": (-150, 190), "shape": (20, 16)}),
    (VIEWS["row"], (None, {"strides": (-150, 190), "shape": (20, 16)})),
    (VIEWS["row"], {"shape": (1 << 34,), "strides": (0,)}),
    (NUMBERS, {"count": 1 << 34}), (NUMBERS, (None, {"count": 1 << 34})),
    (rebuild, {"__defaults__": (1,)}), (rebuild, (None, {"__defaults__": (1,)})),
    (rebuild, (None, {"_call": 1})),
  ):
    fails(torch_zip(tmp_path / "a.pt", {"x": Build(target, state), **VIEWS}, [NUMBERS]), "not read")
  fails(torch_zip(tmp_path / "a.pt", {"x": tensor(NUMBERS, 0, (0, 1 << 62), (1, 1))}, [NUMBERS]),
        "not read")  # fmt: skip
  assert_same(open_weights(torch_zip(tmp_path / "a.pt", VIEWS, [NUMBERS])), EXPECTED)


def test_a_small_file_takes_little_memory(tmp_path):
  """A memo with room for a billion objects, a string that is longer than the file."""
  for data in (
    b"\x80\x02}r" + struct.pack("<I", 1 << 30) + b".",
    b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
  ):
    tracemalloc.start()
    fails(torch_zip(tmp_path / "a.pt", None, [NUMBERS], data=data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 22
  path = tmp_path / "b.pt"
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("archive/data.pkl", pickled({"x": "a" * (1 << 20)}))
  fails(path, "a pickle that is compressed")


def test_broken_torch_files(tmp_path):
  path = torch_zip(tmp_path / "a.pt", VIEWS, [NUMBERS])
  whole = path.read_bytes()
  for length in (0, 3, 100, len(whole) // 2, len(whole) - 5):
    path.write_bytes(whole[:length])
    fails(path, "copy it again")
  for data in (b"", b"garbage", pickled(VIEWS)[:40], b"\x80\x02}."):
    fails(torch_zip(path, None, [NUMBERS], data=data))
  path.write_bytes(os.urandom(1000))
  fails(path)


def legacy(path, tree, storages, count=None):
  parts = [pickled(0x1950A86A20F9469CFC6C), pickled(1001), pickled({"little_endian": True}),
           pickled(tree), pickled([s.key for s in storages])]
  for storage in storages:
    parts += [struct.pack("<q", count or len(storage.numbers)), storage.numbers.tobytes()]
  path.write_bytes(b"".join(parts))
  return path


def test_torch_files_from_before_version_1_6(tmp_path):
  other = Storage("7", "LongStorage", np.arange(3))
  tree = {**VIEWS, "other": tensor(other, 0, (3,), (1,))}
  path = legacy(tmp_path / "a.pth", tree, [NUMBERS, other])
  assert_same(open_weights(path), {**EXPECTED, "other": np.arange(3)})
  path.write_bytes(path.read_bytes()[:-4])
  fails(path, "ends too early")
  fails(legacy(path, tree, [NUMBERS, other], count=5), "copy it again")
  mark = tmp_path / "mark"
  fails(legacy(path, Call(Global("os", "system"), f"touch {mark}"), []), "it would call os.system")
  assert not mark.exists()
