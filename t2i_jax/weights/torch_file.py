"""Files of torch.save: where their tensors lie, each read when it is asked for, and nothing run."""

import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.weights.stored import Stored
from t2i_jax.weights.torch_pickle import LARGEST_PICKLE, Refused, Script, Storage, Tensor, Unpickler

# The first number in files that torch.save wrote before version 1.6.
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
# Containers in which training scripts put a model's tensors, beside counters and optimizers.
WRAPPERS = ("state_dict", "model_state_dict", "params_ema", "params")


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


def _read_zip(path: Path) -> tuple[Any, Callable[[Storage], int]]:
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
    if about.compress_type != zipfile.ZIP_STORED or about.file_size > LARGEST_PICKLE:
      raise Refused("a pickle that is compressed or larger than any list of tensors")
    with archive.open(pickles[0]) as file:
      unpickler = Unpickler(file)
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


def _read_legacy(path: Path, file: BinaryIO) -> tuple[Any, Callable[[Storage], int]]:
  """The same of a file from before torch 1.6: pickles, then the storages one after the other."""
  if Unpickler(file).load() != LEGACY_MAGIC:
    raise ValueError("no file of torch.save")
  protocol, system = Unpickler(file).load(), Unpickler(file).load()
  if protocol != 1001 or not system.get("little_endian", True):
    raise ValueError("its numbers are big-endian, or its protocol is unknown")
  unpickler = Unpickler(file)
  tree = unpickler.load()
  keys = Unpickler(file).load()
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
  if isinstance(tree, Script):
    tree = getattr(tree, "attributes", {})
  if isinstance(tree, Tensor):
    yield prefix, tree
  elif isinstance(tree, (Mapping, list, tuple)) and id(tree) not in seen:
    seen.add(id(tree))
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    for name, value in items:
      yield from _flat(value, seen, f"{prefix}.{name}" if prefix else str(name))


def _reader(path: Path, tensor: Tensor, start: int) -> Callable[[], np.ndarray]:
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
