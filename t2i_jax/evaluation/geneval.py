"""Drawn pictures in the folders that GenEval's scripts read.

Ghosh, Hajishirzi and Schmidt 2023. For each row of its prompts' file, `00000/metadata.jsonl` with
the row, and the row's pictures as `00000/samples/0000.png`...
"""

import json
from collections.abc import Sequence

from etils import epath

from t2i_jax.data.base import digest_of
from t2i_jax.errors import UserError
from t2i_jax.evaluation.folder import Shards, slug
from t2i_jax.evaluation.prompt_sets import PromptSet
from t2i_jax.files import write_whole
from t2i_jax.training.grids import save_picture


def check(prompts: PromptSet) -> None:
  """Raises UserError unless the prompts are rows that GenEval's scripts read."""
  for number, prompt in enumerate(prompts.prompts, start=1):
    lacking = [name for name in ("tag", "include", "prompt") if name not in prompt.about]
    if lacking:
      raise UserError(f"--geneval: row {number} of the prompts has no '{lacking[0]}'; give "
                      "GenEval's own file, --prompts=evaluation_metadata.jsonl")


def check_folder(path: str) -> None:
  """Raises UserError where something else than such a folder is in its place."""
  folder = epath.Path(path).expanduser()
  if folder.exists() and not folder.is_dir():
    raise UserError(f"--geneval={path} is a file; name a folder")
  foreign = [] if not folder.exists() else [
    inside.name for inside in folder.iterdir()
    if not (inside.name.isdigit() and (inside / "metadata.jsonl").exists())
    and not any(inside.glob("00000/metadata.jsonl"))
  ]
  if foreign:
    raise UserError(f"--geneval={path} is there and holds {foreign[0]}; choose another folder")


def targets(path: str, labels: Sequence[str], prompts: PromptSet) -> list[epath.Path]:
  """Where the pictures of points go: of one into the folder, of several each into one inside.

  Args:
    path: the folder; none for "".
    labels: of the points.
    prompts: with the rows of GenEval's file.

  Raises:
    UserError: pictures would stay among the new ones, and GenEval's scripts score all.
  """
  if not path:
    return []
  target, names = epath.Path(path).expanduser(), [slug(label) for label in labels]
  found = [target] if len(labels) == 1 else [
    # Two labels may be alike as names of folders.
    target / (f"{name}_{digest_of(label)[:6]}" if names.count(name) > 1 else name)
    for name, label in zip(names, labels, strict=True)
  ]
  for folder in found:
    _check_kept(folder, prompts)
  return found


def _check_kept(path: epath.Path, prompts: PromptSet) -> None:
  rows = [json.dumps(dict(prompt.about)) for prompt in prompts.prompts]
  wanted = {_sample(n) for n in range(prompts.each)}
  for inside in path.iterdir() if path.exists() else ():
    metadata, samples = inside / "metadata.jsonl", inside / "samples"
    if not inside.name.isdigit() or not metadata.exists():
      continue
    number = int(inside.name)
    ours = number < len(rows) and metadata.read_text(encoding="utf-8") == rows[number]
    there = {file.name for file in (samples.iterdir() if samples.exists() else ())
             if not file.name.startswith(".")}
    if not ours or there - wanted:
      raise UserError(f"--geneval={path} holds pictures of other prompts, or more of each, in "
                      f"{inside.name}; choose another folder")


def _sample(number: int) -> str:
  return f"{number:04d}.png"


def write(path: epath.Path, prompts: PromptSet, shards: Shards) -> None:
  """Writes one point's pictures.

  Args:
    path: the folder; what is there already under the same names is replaced.
    prompts: with the rows of GenEval's file.
    shards: the pictures.
  """
  index = 0
  for images in shards.pictures():
    for image in images:
      prompt, sample = divmod(index, prompts.each)
      folder = path / f"{prompt:05d}"
      if sample == 0:
        row = json.dumps(dict(prompts.prompts[prompt].about))
        write_whole(folder / "metadata.jsonl", row.encode())
      save_picture(folder / "samples" / _sample(sample), image)
      index += 1
