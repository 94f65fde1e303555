"""The device mesh: five named axes, from one chip to several slices of a pod.

One device and a pod run the same code: every mesh has every axis, most of
them of size 1. Axis types are `Auto`: the compiler propagates shardings, and
networks only mark activations (`sharding.logical`).
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from t2i_jax.errors import UserError, unknown

# Outermost first: neighbours on the last axis talk most, so they sit closest.
AXES = ("slice", "data", "fsdp", "sequence", "tensor")

# The mesh axes over which a batch's leading axis is split.
batch_axes = ("slice", "data", "fsdp")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh with all of `AXES`, in that order.

  Args:
    sizes: devices along an axis, by axis; axes left out have size 1, and one
      axis may be -1: it takes the devices that the others leave.
    devices: all devices to use; by default `jax.devices()`.

  Raises:
    UserError: an unknown axis, a size below 1, sizes that do not multiply to
      the number of devices, or a `slice` that is not the number of slices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = _fill(sizes, len(devices))
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if devices[0].platform != "tpu":
    # Devices are listed host by host, so the inner axes stay within a host.
    array = np.asarray(devices, object).reshape(shape)
  elif slices == 1:
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  elif shape[0] == slices:
    array = mesh_utils.create_hybrid_device_mesh(
      (1, *shape[1:]),
      (slices, 1, 1, 1, 1),
      devices,
      allow_split_physical_axes=True,
    )
  else:
    raise UserError(
      f"mesh.slice is {shape[0]}, but the devices are in {slices} slices; set mesh.slice={slices}"
    )
  return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fill(sizes: Mapping[str, int], count: int) -> tuple[int, ...]:
  """Sizes along `AXES` for `count` devices, with the -1 filled in."""
  given = {str(name): size for name, size in sizes.items()}
  for name, size in given.items():
    if name not in AXES:
      raise unknown("mesh axis", name, AXES)
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
      raise UserError(f"mesh.{name} is {size!r}; set a number of devices, or -1 for the rest")
  shape = [given.get(name, 1) for name in AXES]
  text = ", ".join(f"{name}={size}" for name, size in zip(AXES, shape, strict=True) if size != 1)
  free = [name for name, size in zip(AXES, shape, strict=True) if size == -1]
  known = math.prod(size for size in shape if size != -1)
  if len(free) > 1:
    raise UserError(f"mesh.{free[0]} and mesh.{free[1]} are both -1; only one axis can be filled")
  if free:
    if count % known:
      raise UserError(
        f"mesh ({text}) cannot be filled: {known} does not divide the {count} devices; "
        f"set sizes whose product divides {count}"
      )
    return tuple(count // known if size == -1 else size for size in shape)
  if known != count:
    raise UserError(
      f"mesh ({text or 'all sizes 1'}) is for {known} devices, but there are {count}; "
      f"set one size to -1, such as mesh.data=-1, or sizes whose product is {count}"
    )
  return tuple(shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over `batch_axes`, all others whole; fits every leaf of a batch."""
  return NamedSharding(mesh, PartitionSpec(batch_axes))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
  """Into how many parts a batch's leading axis is split."""
  return math.prod(mesh.shape[name] for name in batch_axes)


def check_batch(batch_size: int, mesh: Mesh, what: str) -> None:
  """Raises UserError if `batch_size` cannot be split over the mesh.

  `what` is the setting's name as the user knows it, such as `batch_size`.
  """
  if batch_size < 1:
    raise UserError(f"{what}={batch_size} is no batch; use 1 or more")
  shards = batch_shards(mesh)
  if batch_size % shards:
    below = batch_size // shards * shards
    fitting = f"{below} or {below + shards}" if below > 0 else f"{shards}"
    split = " x ".join(f"{name}={mesh.shape[name]}" for name in batch_axes if mesh.shape[name] > 1)
    over = f"the {shards} parts of the mesh ({split})" if split else "one device"
    raise UserError(f"{what}={batch_size} does not divide over {over}; set {what}={fitting}")


def host_rows(batch_size: int, mesh: Mesh, process: int | None = None) -> np.ndarray:
  """Rows of the global batch that a process must feed, ascending, int64 [rows].

  Where every host's devices are neighbours in the mesh, process h of P has
  rows [hB/P, (h+1)B/P). A TPU's mesh may order hosts otherwise, and hosts that
  share a `tensor` or `sequence` group feed the same rows.

  Args:
    batch_size: rows of the global batch; `check_batch` has passed.
    process: process index; by default this one.
  """
  process = jax.process_index() if process is None else process
  owned = [
    range(*index[0].indices(batch_size))
    for device, index in batch_sharding(mesh).devices_indices_map((batch_size,)).items()
    if device.process_index == process
  ]
  return np.unique(np.concatenate([np.asarray(rows, np.int64) for rows in owned]))
