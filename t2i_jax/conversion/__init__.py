"""Public models to exports of ours, and back; `t2i_jax/convert.py` is the command."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from t2i_jax.errors import UserError

LENGTH = 77  # tokens of a caption, of CLIP and of latent diffusion, and of T5 in SD3
SAFETENSORS = ".safetensors"
DTYPES = ("stored", "float32", "float16", "bfloat16")


def dtype_of(name: str) -> Any:
  """What `KeyMap.load` takes for one of `DTYPES`."""
  import jax.numpy as jnp

  from t2i_jax.weights.key_map import STORED

  return STORED if name == "stored" else jnp.dtype(name)


def read_json(path: Path) -> dict[str, Any]:
  """A config's settings; UserError for what is none."""
  if not path.is_file():
    raise UserError(f"no {path.name} in '{path.parent}'; copy it there")
  with blamed(str(path)):
    given = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(given, dict):
      raise TypeError("it is no object")
    return given


def write_json(path: Path, given: dict[str, Any]) -> None:
  path.write_text(json.dumps(given, indent=2) + "\n", encoding="utf-8")


def new_folder(path: Path) -> Path:
  """Makes a folder; UserError where something is."""
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise UserError(f"'{path}' is there and not empty, so it is not written to; choose another")
  path.mkdir(parents=True, exist_ok=True)
  return path


def new_file(name: str) -> Path:
  """The path of a file of tensors that is to be written; UserError where something is."""
  path = Path(name).expanduser()
  if path.suffix != SAFETENSORS:
    raise UserError(f"--output={name} is no name of a file; let it end in {SAFETENSORS}")
  if path.exists():
    raise UserError(f"'{path}' is there already, so it is not written to; choose another")
  return path


def begun(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Tensors by names that begin so, as those of a part do in the file of a whole model."""
  return {prefix + name: tensor for name, tensor in tensors.items()}


@contextlib.contextmanager
def blamed(what: str) -> Iterator[None]:
  """Whatever a file's contents lead to is that file's fault."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    why = str(error).strip().splitlines()[0] if str(error).strip() else ""
    raise UserError(f"{what} is not of such a model ({type(error).__name__}: {why[:200]}); copy it "
                    "again") from error
