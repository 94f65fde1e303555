"""Reading and writing safetensors, a tensor at a time."""

import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.weights.stored import Stored

DTYPES = {
  "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
  "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def open_safetensors(path: Path) -> dict[str, Stored]:
  """The tensors of a safetensors file by name.

  Raises:
    UserError: the file is not whole, its header is damaged or claims what the file does not hold,
      a name comes twice, or a type is unknown.
  """
  from safetensors import SafetensorError, safe_open

  try:
    # The library compares the header with the file: lengths, overlaps and holes.
    with safe_open(path, "numpy"):
      pass
  except (SafetensorError, OSError) as error:
    raise UserError(f"{path} is no whole safetensors file ({error}); copy it again") from error
  with path.open("rb") as file:
    (length,) = struct.unpack("<Q", file.read(8))
    entries = json.loads(file.read(length), object_pairs_hook=lambda pairs: pairs)
  twice = [name for name, count in Counter(name for name, _ in entries).items() if count > 1]
  if twice:
    raise UserError(f"{path} holds '{twice[0]}' twice; take it from another source")
  tensors = {}
  for name, entry in entries:
    if name == "__metadata__":
      continue
    about = dict(entry)
    if about["dtype"] not in DTYPES:
      raise UserError(f"{path}: '{name}' is of type {about['dtype']}, which is not read here")
    start, _ = about["data_offsets"]
    dtype, shape = np.dtype(DTYPES[about["dtype"]]), tuple(about["shape"])
    tensors[name] = Stored(shape, dtype, _reader(path, 8 + length + start, shape, dtype))
  return tensors


def _reader(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype):
  def read() -> np.ndarray:
    # Read and not mapped: pages of a map would stay in memory beside the array made of them.
    array = np.fromfile(path, dtype, int(np.prod(shape)), offset=offset)
    if array.size != np.prod(shape):
      raise UserError(f"{path} has become shorter while it was read")
    return array.reshape(shape)

  return read


def write_safetensors(
  path: str | os.PathLike,
  tensors: Mapping[str, tuple[tuple[int, ...], np.dtype, Callable[[], np.ndarray]]],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a safetensors file that never needs more than one tensor in memory.

  The file is written beside `path` and renamed when it is whole.

  Args:
    path: the file, replaced if it exists.
    tensors: shape, type and value of each tensor by name, or `Stored`s.
    metadata: texts for the header; {"format": "pt"} if none, which transformers asks for.

  Raises:
    UserError: a type that safetensors does not have, or the file cannot be written.
  """
  path = Path(path)
  entries, offset = {"__metadata__": dict(metadata or {"format": "pt"})}, 0
  readers = []
  # Largest types first, as the library does it, so that each tensor is aligned.
  order = sorted(tensors, key=lambda name: (-np.dtype(_parts(tensors[name])[1]).itemsize, name))
  for name in order:
    shape, dtype, read = _parts(tensors[name])
    if dtype not in NAMES:
      raise UserError(f"'{name}' is of type {dtype}, which safetensors cannot hold")
    end = offset + int(np.prod(shape)) * dtype.itemsize
    entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
    readers.append((name, shape, dtype, read))
    offset = end
  header = json.dumps(entries, separators=(",", ":")).encode()
  header += b" " * (-len(header) % 8)
  beside = path.with_name(f".{path.name}.writing")
  try:
    with beside.open("wb") as file:
      file.write(struct.pack("<Q", len(header)) + header)
      for name, shape, dtype, read in readers:
        array = read()
        if array.shape != shape or array.dtype != dtype:
          raise ValueError(f"'{name}' is {array.dtype}{array.shape}, announced {dtype}{shape}")
        file.write(array.tobytes())
    beside.replace(path)
  except OSError as error:
    beside.unlink(missing_ok=True)
    raise UserError(f"cannot write {path}: {error.strerror or error}; free space there or choose "
                    "another place") from error


def _parts(tensor):
  if isinstance(tensor, Stored):
    return tensor.shape, np.dtype(tensor.dtype), tensor.read
  shape, dtype, read = tensor
  return tuple(shape), np.dtype(dtype), read
