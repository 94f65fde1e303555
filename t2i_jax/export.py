"""Exports: self-contained folders from which pictures are drawn.

  config.json            what the model is, its step, and the other files' sizes
  variables.safetensors  parameters (EMA unless asked otherwise) and collections
  tokenizer.json         of the prompts, for each text encoder
  README.md              the model card

`python -m t2i_jax.export --help` makes one from a run's checkpoint.
"""

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

import t2i_jax
from t2i_jax import config as configs
from t2i_jax.errors import UserError
from t2i_jax.model_card import model_card
from t2i_jax.systems import trees
from t2i_jax.text.tokenizer import Tokenizers
from t2i_jax.weights.stored import Stored

CONFIG, VARIABLES, TOKENIZER, CARD = (
  "config.json", "variables.safetensors", "tokenizer.json", "README.md"
)
FORMAT = 3


@dataclasses.dataclass
class Export:
  """An export that was read.

  Attributes:
    path: its folder.
    config: of the run that made it.
    step: of the training at which it was made.
    variables: `{collection: {group: tree}}` of numpy arrays, or of `Stored`s.
    tokenizers: of its prompts.
    components: what builds the frozen systems in it, by name: `config`, `components`, `step`.
  """

  path: epath.Path
  config: ConfigDict
  step: int
  variables: dict[str, dict[str, Any]]
  tokenizers: Tokenizers
  components: dict[str, Any]


def write(
  path: str | os.PathLike,
  config: ConfigDict,
  step: int,
  variables: Mapping[str, Any],
  tokenizers: Tokenizers,
  components: Mapping[str, Any] | None = None,
  ema: bool = True,
  notes: str = "",
) -> epath.Path:
  """Writes an export beside `path`, then puts it there whole, in place of an older one.

  Args:
    path: the folder.
    config: of the run.
    step: of the training.
    variables: of all groups that sampling needs; arrays on the host, or `Stored`s, which are
      read one at a time.
    tokenizers: of the prompts.
    components: what builds the frozen systems among them, as in `Export`.
    ema: whether the parameters are moving averages.
    notes: Markdown for the model card, such as scores.

  Raises:
    UserError: where something else is in its place, or it cannot be written.
  """
  import shutil

  from t2i_jax.weights.safetensors_file import write_safetensors

  path = located(path)
  check_replaceable(path)
  remote = "://" in os.fspath(path)
  beside = path.with_name(f".{path.name}.writing")
  if remote:
    beside = epath.Path(tempfile.mkdtemp()) / path.name
  try:
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    flat = trees.flatten(variables)
    write_safetensors(beside / VARIABLES, {name: _stored(leaf) for name, leaf in flat.items()})
    (beside / TOKENIZER).write_text(tokenizers.to_json(), encoding="utf-8")
    (beside / CARD).write_text(model_card(config, step, flat, ema, notes), encoding="utf-8")
    about = {
      "format": FORMAT,
      "version": t2i_jax.__version__,
      "step": step,
      "ema": ema,
      "files": {name: (beside / name).stat().length for name in (VARIABLES, TOKENIZER)},
      "components": dict(components or {}),
      "config": config.to_dict(),
    }
    (beside / CONFIG).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
    if remote:
      _upload(beside, path)
      shutil.rmtree(beside.parent)
    elif path.exists():
      old = path.with_name(f".{path.name}.old")
      shutil.rmtree(old, ignore_errors=True)
      path.rename(old)
      beside.rename(path)
      shutil.rmtree(old, ignore_errors=True)
    else:
      beside.rename(path)
  except (OSError, UserError) as error:
    shutil.rmtree(beside.parent if remote else beside, ignore_errors=True)
    if isinstance(error, UserError):
      if not isinstance(error.__cause__, OSError):
        raise
      error = error.__cause__  # whose file is one that nobody asked for
    raise UserError(f"cannot write the export {path}: {error.strerror or error}; "
                    "free space there or choose another folder") from error
  return path


def _stored(leaf: Any) -> Stored:
  if isinstance(leaf, Stored):
    return leaf
  array = np.asarray(leaf)
  return Stored(array.shape, array.dtype, lambda: array)


def located(path: str | os.PathLike) -> epath.Path:
  """An absolute path, `~` replaced; of a store such as `gs://` as it is."""
  path = epath.Path(path).expanduser()
  return path if "://" in os.fspath(path) else epath.Path(os.path.abspath(path))


def _upload(folder: epath.Path, path: epath.Path) -> None:
  """Copies an export to where nothing can be renamed: its config last, which makes it one."""
  path.mkdir(parents=True, exist_ok=True)
  (path / CONFIG).unlink(missing_ok=True)
  for name in (VARIABLES, TOKENIZER, CARD, CONFIG):
    (folder / name).copy(path / name, overwrite=True)


def check_replaceable(path: str | os.PathLike) -> None:
  """Raises UserError where `path` is there and is neither an export nor an empty folder."""
  path = located(path)
  if not path.exists() or (path.is_dir() and not any(path.iterdir())):
    return
  if not (path / CONFIG).is_file() or not (path / VARIABLES).is_file():
    raise UserError(f"'{path}' is there and is no export, so it is not replaced; choose another "
                    "folder for the export, or move it away")


def _where_else(*runs: epath.Path) -> str:
  """Where the export is, or how it is made, if one of these folders is a run."""
  for run in runs:
    if (run / "export" / CONFIG).is_file():
      return f"; did you mean '{run / 'export'}'?"
    if (run / "checkpoints").is_dir():
      return (f": the run '{run}' has not ended; python -m t2i_jax.export --workdir={run} "
              "--output=DIRECTORY makes one of its last checkpoint")
  return ""


def read(path: str | os.PathLike, stored: bool = False) -> Export:
  """Reads an export.

  Args:
    path: its folder.
    stored: leave the numbers where they are: the variables are `Stored`s, and the folder must stay.

  Raises:
    UserError: for a folder that is none, or from which something is missing.
  """
  from safetensors import SafetensorError
  from safetensors.numpy import load, load_file

  path = epath.Path(path).expanduser()
  if not (path / CONFIG).is_file():
    raise UserError(f"no export at '{path}': it has no {CONFIG}{_where_else(path, path.parent)}")
  try:
    about = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if isinstance(about, dict) and "model_type" in about:
      raise UserError(f"'{path}' is a Hugging Face folder, not an export; make one of it with "
                      f"python -m t2i_jax.convert --source={path} --output=EXPORT")
    step = int(about["step"])
    files = {name: int(about["files"][name]) for name in (VARIABLES, TOKENIZER)}
    config = configs.from_json(json.dumps(about["config"]))
    components = dict(about["components"])
  except (ValueError, KeyError, TypeError) as error:
    why = f"{type(error).__name__}: {error}"
    if where := _where_else(path):
      raise UserError(f"'{path}' is no export{where}") from None
    raise UserError(f"{path / CONFIG} is not an export's ({why}); copy it again") from error
  if about.get("format") != FORMAT:
    raise UserError(f"{path} has export format {about.get('format')}, this version reads {FORMAT}; "
                    f"use t2i_jax {about.get('version')}")
  lacking = sorted({"system", "model", "text", *configs.shared_sections()} - set(config))
  if lacking:
    raise UserError(f"{path / CONFIG}: its config has no section '{lacking[0]}'; use t2i_jax "
                    f"{about.get('version')}, which wrote it")
  for name in (VARIABLES, TOKENIZER):
    if not (path / name).is_file():
      raise UserError(f"the export {path} is not whole: {name} is missing; copy it again")
    size = (path / name).stat().length
    if size != files[name]:
      raise UserError(f"the export {path} is not whole: {name} has {size} bytes of {files[name]}; "
                      "copy it again")
  if stored:
    from t2i_jax.weights.stored import open_weights

    flat = open_weights(path / VARIABLES)
    return Export(
      path, config, step, trees.unflatten(flat), Tokenizers.load(path / TOKENIZER), components
    )
  try:
    local = "://" not in os.fspath(path)
    flat = load_file(path / VARIABLES) if local else load((path / VARIABLES).read_bytes())
  except (SafetensorError, ValueError) as error:
    raise UserError(f"{path / VARIABLES} cannot be read: {error}; copy it again") from error
  return Export(
    path, config, step, trees.unflatten(flat), Tokenizers.load(path / TOKENIZER), components
  )


def fingerprint(path: str | os.PathLike) -> str:
  """SHA-256 of what an export that was read computes: its system, numbers and tokenizers."""
  path = epath.Path(path).expanduser()
  config = json.loads((path / CONFIG).read_text(encoding="utf-8"))["config"]
  about = {name: config[name] for name in ("system", "model", "text")}
  digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
  digest.update((path / TOKENIZER).read_bytes())
  with (path / VARIABLES).open("rb") as file:
    while block := file.read(1 << 24):
      digest.update(block)
  return digest.hexdigest()


def add_to_card(path: str | os.PathLike, notes: str) -> None:
  """Adds Markdown, such as scores, to an export's model card."""
  card = located(path) / CARD
  card.write_text(f"{card.read_text().rstrip()}\n\n{notes}\n")


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  from t2i_jax import command

  parser = command.parser(
    "t2i_jax.export",
    "Makes an export, the folder that sampling needs, from a run's checkpoint.",
    "python -m t2i_jax.export --workdir=runs/ddpm --output=ddpm-export",
  )
  parser.add_argument("--workdir", required=True, help="the run's work directory")
  parser.add_argument("--output", required=True, help="the folder to write; replaced if it exists")
  parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
  parser.add_argument("--no-ema", action="store_true",
                      help="the parameters themselves, not their moving average")
  command.run(parser, argv, _export)


def _export(flags) -> None:
  from t2i_jax.restore import restored_variables

  check_replaceable(flags.output)
  ema = not flags.no_ema
  config, step, variables, tokenizers, components = restored_variables(
    epath.Path(flags.workdir), flags.step, ema
  )
  print(write(flags.output, config, step, variables, tokenizers, components, ema))


if __name__ == "__main__":
  main()
