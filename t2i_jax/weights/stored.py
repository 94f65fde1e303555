"""Tensors that lie in files, and `open_weights`, which finds them."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from t2i_jax.errors import UserError

# Where Hugging Face's libraries put a model's tensors, best first. Of each the index of a sharded
# model has ".index.json" behind it.
NAMES = (
  "model.safetensors", "diffusion_pytorch_model.safetensors", "open_clip_model.safetensors",
  "pytorch_model.bin", "diffusion_pytorch_model.bin", "open_clip_pytorch_model.bin",
)  # fmt: skip
TORCH = (".pt", ".pth", ".bin", ".ckpt")


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file, read when asked for.

  Attributes:
    shape, dtype: of the array; bfloat16 is ml_dtypes'.
    read: the array; raises UserError where the file does not hold it.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


Tensors = Mapping[str, Stored]


def open_weights(path: str | os.PathLike) -> dict[str, Stored]:
  """The tensors of a checkpoint by name. Nothing is read but their names and shapes.

  Args:
    path: a `.safetensors` file; a `.pt`, `.pth`, `.bin` or `.ckpt` file of PyTorch, of which no
      code is run; an index (`.index.json`) of several of these; or a folder that holds one of
      them under Hugging Face's names.

  Raises:
    UserError: there is no such file; it is not whole; it is of another format; shards are missing;
      or it holds what is neither a tensor nor a plain container.
  """
  path = Path(path)
  if path.is_dir():
    path = _in_folder(path)
  if not path.is_file():
    raise UserError(f"no weights at '{path}'")
  if path.name.endswith(".index.json"):
    return _sharded(path)
  if path.suffix == ".safetensors":
    from t2i_jax.weights.safetensors_file import open_safetensors

    return open_safetensors(path)
  if path.suffix in TORCH:
    from t2i_jax.weights.torch_file import open_torch

    return open_torch(path)
  raise UserError(f"'{path}' is of no known format: give a .safetensors, {', '.join(TORCH)} or "
                  ".index.json file, or a folder that holds one")


def _in_folder(folder: Path) -> Path:
  for name in NAMES:
    for candidate in (folder / name, folder / f"{name}.index.json"):
      if candidate.is_file():
        return candidate
  raise UserError(f"no weights in the folder '{folder}': none of {', '.join(NAMES)}, nor an index "
                  "(.index.json) of one")


def _sharded(index: Path) -> dict[str, Stored]:
  """The tensors of all shards that an index names."""
  try:
    shard_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if not all(isinstance(item, str) for pair in shard_of.items() for item in pair):
      raise TypeError("weight_map is not from names to files")
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{index} is no index of shards ({type(error).__name__}: {error}); copy it "
                    "again") from error
  shards = sorted(set(shard_of.values()))
  # A shard beside the index and nowhere else: an index of unknown origin names no path.
  outside = [name for name in shards if Path(name).name != name or name in ("", ".", "..")]
  if outside:
    raise UserError(f"{index} names a file that is not beside it: '{outside[0]}'")
  missing = [name for name in shards if not (index.parent / name).is_file()]
  if missing:
    raise UserError(f"{index.parent} is not whole: {len(missing)} of {len(shards)} shards are "
                    f"missing ({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}); "
                    "copy them again")
  tensors: dict[str, Stored] = {}
  for name in shards:
    held = open_weights(index.parent / name)
    expected = {key for key, shard in shard_of.items() if shard == name}
    absent = sorted(expected - set(held))
    if absent:
      raise UserError(f"{index.parent / name} lacks '{absent[0]}' and {len(absent) - 1} more that "
                      f"{index.name} says it has; copy both again")
    tensors |= {key: held[key] for key in expected}
  return tensors
