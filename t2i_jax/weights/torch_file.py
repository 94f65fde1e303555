"""Reading PyTorch's files without PyTorch and without running what they hold.

A pickle is a program that names functions to call. Here it may name those below and no others,
each of which is replaced by one of ours that only notes where a tensor lies.
"""

import dataclasses
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.weights.stored import Stored

STORAGES = {
  "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
  "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}  # fmt: skip
# The first number in files that torch.save wrote before version 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MOST_NUMBERS = 1 << 40
# A pickle names tensors; it does not hold their numbers.
_LARGEST_PICKLE = 1 << 28
# Containers in which training scripts put a model's tensors, beside counters and optimizers.
WRAPPERS = ("state_dict", "model_state_dict", "params_ema", "params")


class Refused(pickle.UnpicklingError):
  """A pickle names what may not be built."""


class _Fixed:
  """What a pickle may name and pass on, and may not change."""

  __slots__ = ()

  def __setstate__(self, state):
    raise Refused("it would change what a tensor is")


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage(_Fixed):
  """Numbers in the file, under a key that says where."""

  dtype: np.dtype
  count: int
  key: str

  __setstate__ = _Fixed.__setstate__


@dataclasses.dataclass(frozen=True, slots=True)
class _Tensor(_Fixed):
  """A view of a storage, in elements."""

  storage: _Storage
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


class _Script:
  """A module of TorchScript: its attributes, of which tensors and other modules are kept."""

  def __setstate__(self, state):
    self.attributes = state if isinstance(state, Mapping) else {}


def _rebuild_tensor(storage, offset, shape, strides, *_):
  if not isinstance(storage, _Storage):
    raise Refused("a tensor without a storage")
  tensor = _Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
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
    found = self._file.read(size) if size <= _LARGEST_PICKLE else b""
    if len(found) < size:
      raise EOFError("the file ends too early")
    return found

  def readline(self) -> bytes:
    found = self._file.readline()
    if not found.endswith(b"\n"):
      raise EOFError("the file ends too early")
    return found


class _Unpickler(pickle._Unpickler):
  """Python's own unpickler written in Python: that in C makes room for as many objects as a pickle
  says it has."""

  def __init__(self, file: BinaryIO):
    super().__init__(_Whole(file), encoding="utf-8")
    self.storages: dict[str, _Storage] = {}

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in _GLOBALS:
      return _GLOBALS[module, name]
    package = module.partition(".")[0]
    if package in _INERT_PACKAGES:
      return _Inert
    if package == "__torch__":  # a class whose code lies beside, in the archive, unread
      return _Script
    raise Refused(f"it would call {module}.{name}")

  def persistent_load(self, pid: Any) -> _Storage:
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
      raise Refused("a reference that is no storage")
    _, kind, key, _, count = pid[:5]
    if kind not in STORAGES:
      raise Refused(f"a storage of type {kind}")
    if len(pid) > 5 and pid[5] is not None:
      raise Refused("a storage that is a view of another one")
    return self.storages.setdefault(
      str(key), _Storage(np.dtype(STORAGES[kind]), int(count), str(key))
    )


def open_torch(path: Path) -> dict[str, Stored]:
  """The tensors of a file of torch.save or torch.jit.save, by name; no code in it is run.

  Nested containers give dotted names. Where one of them is called `state_dict` or so, it is what is
  read, as in training checkpoints.

  Raises:
    UserError: the file is not whole, is no file of torch.save's, or names a function or a class
      that is neither a tensor nor a plain container.
  """
  try:
    with path.open("rb") as file:
      if file.read(4) == b"PK\x03\x04":
        tree, place = _read_zip(path)
      else:
        file.seek(0)
        tree, place = _read_legacy(path, file)
    found = dict(_flat(_unwrapped(tree), set()))
  except Refused as error:
    raise UserError(f"{path} is not read, because it holds more than tensors and plain containers: "
                    f"{error}. Ask for safetensors, or save its state_dict alone") from error
  except OSError as error:
    raise UserError(f"cannot read {path}: {error.strerror or error}") from error
  except Exception as error:  # what a damaged pickle raises is not bounded
    raise UserError(f"{path} is no whole file of torch.save ({type(error).__name__}: {error}); "
                    "copy it again") from error
  tensors = {
    name: Stored(tensor.shape, tensor.storage.dtype, _reader(path, tensor, place(tensor.storage)))
    for name, tensor in found.items()
  }
  if not tensors:
    raise UserError(f"{path} holds no tensor")
  return tensors


def _read_zip(path: Path) -> tuple[Any, Callable[[_Storage], int]]:
  """The pickled tree of a zip file, and where each storage begins in the file."""
  with zipfile.ZipFile(path) as archive:
    entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise ValueError("no data.pkl in it")
    root = pickles[0].partition("/")[0]
    if f"{root}/byteorder" in entries and archive.read(f"{root}/byteorder").strip() != b"little":
      raise ValueError("its numbers are big-endian")
    about = entries[pickles[0]]
    if about.compress_type != zipfile.ZIP_STORED or about.file_size > _LARGEST_PICKLE:
      raise Refused("a pickle that is compressed or larger than any list of tensors")
    with archive.open(pickles[0]) as file:
      unpickler = _Unpickler(file)
      tree = unpickler.load()
  starts = {}
  with path.open("rb") as file:
    for key, storage in unpickler.storages.items():
      info = entries.get(f"{root}/data/{key}")
      size = storage.count * storage.dtype.itemsize
      if info is None or info.compress_type != zipfile.ZIP_STORED or info.file_size < size:
        raise ValueError(f"storage {key} is missing or too small")
      # The local header may be longer than the directory's copy: torch pads it to align numbers.
      file.seek(info.header_offset)
      header = file.read(30)
      if header[:4] != b"PK\x03\x04":
        raise ValueError(f"storage {key} is not where the directory says")
      name_length, extra_length = struct.unpack("<HH", header[26:30])
      starts[key] = info.header_offset + 30 + name_length + extra_length
  return tree, lambda storage: starts[storage.key]


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, Callable[[_Storage], int]]:
  """The same of a file from before torch 1.6: pickles, then the storages one after the other."""
  if _Unpickler(file).load() != LEGACY_MAGIC:
    raise ValueError("no file of torch.save")
  protocol, system = _Unpickler(file).load(), _Unpickler(file).load()
  if protocol != 1001 or not system.get("little_endian", True):
    raise ValueError("its numbers are big-endian, or its protocol is unknown")
  unpickler = _Unpickler(file)
  tree = unpickler.load()
  keys = _Unpickler(file).load()
  starts = {}
  for key in keys:
    storage = unpickler.storages[str(key)]
    (count,) = struct.unpack("<q", file.read(8))
    if count != storage.count:
      raise ValueError(f"storage {key} has {count} numbers, not {storage.count}")
    starts[str(key)] = file.tell()
    file.seek(count * storage.dtype.itemsize, 1)
  if file.tell() > path.stat().st_size:
    raise ValueError("the file ends too early")
  return tree, lambda storage: starts[storage.key]


def _unwrapped(tree: Any) -> Any:
  if isinstance(tree, Mapping):
    for name in WRAPPERS:
      if isinstance(tree.get(name), Mapping):
        return tree[name]
  return tree


def _flat(tree: Any, seen: set[int], prefix: str = ""):
  """Dotted names and tensors of nested containers, each container once: it may hold itself."""
  if isinstance(tree, _Script):
    tree = getattr(tree, "attributes", {})
  if isinstance(tree, _Tensor):
    yield prefix, tree
  elif isinstance(tree, (Mapping, list, tuple)) and id(tree) not in seen:
    seen.add(id(tree))
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for name, value in items:
      yield from _flat(value, seen, f"{prefix}.{name}" if prefix else str(name))


def _reader(path: Path, tensor: _Tensor, start: int) -> Callable[[], np.ndarray]:
  def read() -> np.ndarray:
    dtype = tensor.storage.dtype
    if 0 in tensor.shape:
      return np.zeros(tensor.shape, dtype)
    # Only what the view spans is read, however large its storage.
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    flat = np.fromfile(path, dtype, span, offset=start + tensor.offset * dtype.itemsize)
    if flat.size != span:
      raise UserError(f"{path} is not whole; copy it again")
    strides = [s * dtype.itemsize for s in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)

  return read
