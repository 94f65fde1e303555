import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from t2i_jax.errors import UserError
from t2i_jax.parallel import mesh as mesh_lib


@dataclasses.dataclass(frozen=True)
class FakeDevice:
  """What the mesh code reads of a device that this machine does not have."""

  id: int
  process_index: int = 0
  slice_index: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"
  coords: tuple[int, int, int] = (0, 0, 0)
  core_on_chip: int = 0


def test_fills_one_axis_and_keeps_the_order():
  mesh = mesh_lib.make_mesh({"fsdp": -1, "tensor": 2})
  assert mesh.axis_names == mesh_lib.AXES
  assert dict(mesh.shape) == {"slice": 1, "data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
  assert set(mesh.axis_types) == {AxisType.Auto}
  assert list(mesh.devices.flat) == jax.devices()


def test_one_device():
  mesh = mesh_lib.make_mesh({"data": -1}, jax.devices()[:1])
  assert mesh.size == 1


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    ({"data": 4}, ["data=4", "4 devices", "there are 8", "mesh.data=-1"]),
    ({}, ["there are 8", "mesh.data=-1"]),
    ({"data": 16}, ["16 devices", "there are 8"]),
    ({"data": -1, "tensor": 3}, ["tensor=3", "3 does not divide the 8 devices"]),
    ({"data": -1, "fsdp": -1}, ["mesh.data", "mesh.fsdp", "-1"]),
    ({"dat": 8}, ["'dat'", "did you mean 'data'"]),
    ({"data": 0}, ["mesh.data is 0"]),
    ({"data": 2.0}, ["mesh.data is 2.0"]),
  ],
)
def test_wrong_sizes(sizes, words):
  with pytest.raises(UserError) as error:
    mesh_lib.make_mesh(sizes)
  assert all(word in str(error.value) for word in words), str(error.value)


def test_tpu_slices_are_the_outermost_axis():
  devices = [
    FakeDevice(8 * s + 4 * y + x, process_index=2 * s + y, slice_index=s, coords=(x, y, 0))
    for s in range(2)
    for y in range(2)
    for x in range(4)
  ]
  with pytest.raises(UserError, match="set mesh.slice=2"):
    mesh_lib.make_mesh({"fsdp": -1}, devices)
  mesh = mesh_lib.make_mesh({"slice": 2, "fsdp": 4, "tensor": 2}, devices)
  assert dict(mesh.shape) == {"slice": 2, "data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
  for s in range(2):
    assert {d.slice_index for d in mesh.devices[s].flat} == {s}


def test_batch_sharding_splits_the_leading_axis_only():
  mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  x = jax.device_put(np.zeros((8, 6)), mesh_lib.batch_sharding(mesh))
  assert x.addressable_shards[0].data.shape == (2, 6)
  y = jax.device_put(np.zeros((8, 6)), mesh_lib.replicated(mesh))
  assert y.addressable_shards[0].data.shape == (8, 6)


def test_check_batch_says_which_sizes_would_do():
  mesh = mesh_lib.make_mesh({"data": 4, "tensor": 2})
  mesh_lib.check_batch(12, mesh, "batch_size")
  with pytest.raises(UserError, match="batch_size=10 .*4 parts.*data=4.*set batch_size=8 or 12"):
    mesh_lib.check_batch(10, mesh, "batch_size")
  with pytest.raises(UserError, match="set batch_size=4$"):
    mesh_lib.check_batch(3, mesh, "batch_size")
  with pytest.raises(UserError, match="batch_size=0"):
    mesh_lib.check_batch(0, mesh, "batch_size")


def _mesh(processes):
  """A mesh of 4 data x 2 tensor devices whose hosts are given in mesh order."""
  devices = [FakeDevice(i, process_index=p, platform="cpu") for i, p in enumerate(processes)]
  return Mesh(np.asarray(devices, object).reshape(1, 4, 1, 1, 2), mesh_lib.AXES)


def test_host_rows():
  neighbours = _mesh([0, 0, 0, 0, 1, 1, 1, 1])
  assert list(mesh_lib.host_rows(8, neighbours, 1)) == [4, 5, 6, 7]
  interleaved = _mesh([0, 0, 1, 1, 0, 0, 1, 1])
  assert list(mesh_lib.host_rows(8, interleaved, 1)) == [2, 3, 6, 7]
  shared = _mesh([0, 1, 0, 1, 2, 3, 2, 3])
  assert list(mesh_lib.host_rows(8, shared, 0)) == [0, 1, 2, 3]
  assert list(mesh_lib.host_rows(8, shared, 1)) == [0, 1, 2, 3]
