"""Pickles of PyTorch's files, read without PyTorch and without running what they hold.

A pickle is a program that names functions to call. Here it may name those below and no others,
each of which is replaced by one of ours that only notes where a tensor lies.
"""

import dataclasses
import math
import pickle
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

STORAGES = {
  "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
  "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}  # fmt: skip
_MOST_NUMBERS = 1 << 40
# A pickle names tensors; it does not hold their numbers.
LARGEST_PICKLE = 1 << 28


class Refused(pickle.UnpicklingError):
  """A pickle names what may not be built."""


class _Fixed:
  """What a pickle may name and pass on, and may not change."""

  __slots__ = ()

  def __setstate__(self, state):
    raise Refused("it would change what a tensor is")


@dataclasses.dataclass(frozen=True, slots=True)
class Storage(_Fixed):
  """Numbers in the file, under a key that says where."""

  dtype: np.dtype
  count: int
  key: str

  __setstate__ = _Fixed.__setstate__


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor(_Fixed):
  """A view of a storage, in elements."""

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]

  __setstate__ = _Fixed.__setstate__


class _Function(_Fixed):
  """A function of PyTorch's, replaced by one of ours."""

  __slots__ = ("_call",)

  def __init__(self, call: Callable[..., Any]):
    self._call = call

  def __call__(self, *arguments):
    return self._call(*arguments)


class _Inert:
  """What stands for a setting or a callback of the script that trained: nothing of it is kept."""

  def __init__(self, *_):
    pass

  def _ignored(self, *_):
    pass

  __setstate__ = __setitem__ = append = extend = add = _ignored


class Script:
  """A module of TorchScript: its attributes, of which tensors and other modules are kept."""

  def __setstate__(self, state):
    self.attributes = state if isinstance(state, Mapping) else {}


def _rebuild_tensor(storage, offset, shape, strides, *_):
  if not isinstance(storage, Storage):
    raise Refused("a tensor without a storage")
  tensor = Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
  negative = min((tensor.offset, *tensor.shape, *tensor.strides)) < 0
  if negative or len(tensor.shape) != len(tensor.strides):
    raise Refused("a tensor of impossible shape")
  last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
  # Of a tensor without numbers, too, the shape is given to numpy.
  if math.prod(n for n in tensor.shape if n) > _MOST_NUMBERS:
    raise Refused("a tensor of impossible shape")
  # Strides of zero could make a terabyte of one number.
  if 0 not in tensor.shape and max(last + 1, math.prod(tensor.shape)) > storage.count:
    raise Refused("a tensor larger than its storage")
  return tensor


def _rebuild_parameter(tensor, *_):
  return tensor


class _Dict(dict):
  """An ordered dict; state_dict() sets an attribute on its result, which is dropped."""

  def __setstate__(self, state):
    pass


_GLOBALS: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): _Dict,
  ("torch._utils", "_rebuild_tensor"): _Function(_rebuild_tensor),
  ("torch._utils", "_rebuild_tensor_v2"): _Function(_rebuild_tensor),
  ("torch._utils", "_rebuild_parameter"): _Function(_rebuild_parameter),
  ("torch", "Size"): tuple,
  **{("torch", name): name for name in STORAGES},
  **{(module, name): kind for module in ("builtins", "__builtin__")
     for name, kind in {"set": set, "frozenset": frozenset}.items()},
  # Settings and counters that training scripts keep beside the tensors.
  **{(module, name): _Inert for module, name in (
    ("torch", "device"), ("argparse", "Namespace"), ("pathlib", "PosixPath"), ("numpy", "dtype"),
    ("numpy.core.multiarray", "scalar"), ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
  )},
  **{("torch", name): name for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
  )},
}  # fmt: skip
# Lists of TorchScript's, which are given as lists.
_GLOBALS |= {
  ("torch.jit._pickle", f"build_{kind}list"): _Function(lambda items: items)
  for kind in ("int", "double", "bool", "tensor")
}
# Latent diffusion's checkpoints hold callbacks of this package.
_INERT_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric")


class _Whole:
  """A file that says so when it ends too early."""

  def __init__(self, file: BinaryIO):
    self._file = file

  def read(self, size: int) -> bytes:
    found = self._file.read(size) if size <= LARGEST_PICKLE else b""
    if len(found) < size:
      raise EOFError("the file ends too early")
    return found

  def readline(self) -> bytes:
    found = self._file.readline()
    if not found.endswith(b"\n"):
      raise EOFError("the file ends too early")
    return found


class Unpickler(pickle._Unpickler):
  """Python's own unpickler written in Python: that in C makes room for as many objects as a pickle
  says it has."""

  def __init__(self, file: BinaryIO):
    super().__init__(_Whole(file), encoding="utf-8")
    self.storages: dict[str, Storage] = {}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in _GLOBALS:
      return _GLOBALS[module, name]
    package = module.partition(".")[0]
    if package in _INERT_PACKAGES:
      return _Inert
    if package == "__torch__":  # a class whose code lies beside, in the archive, unread
      return Script
    raise Refused(f"it would call {module}.{name}")

  def persistent_load(self, pid: Any) -> Storage:
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
      raise Refused("a reference that is no storage")
    _, kind, key, _, count = pid[:5]
    if kind not in STORAGES:
      raise Refused(f"a storage of type {kind}")
    if len(pid) > 5 and pid[5] is not None:
      raise Refused("a storage that is a view of another one")
    return self.storages.setdefault(
      str(key), Storage(np.dtype(STORAGES[kind]), int(count), str(key))
    )
