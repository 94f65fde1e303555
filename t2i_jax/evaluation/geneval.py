"""Drawn pictures in the folders that GenEval's scripts read.

Ghosh, Hajishirzi and Schmidt 2023. For each row of its prompts' file, `00000/metadata.jsonl` with
the row, and the row's pictures as `00000/samples/0000.png`...
"""

import json

from etils import epath

from t2i_jax.errors import UserError
from t2i_jax.evaluation.folder import Shards
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
      save_picture(folder / "samples" / f"{sample:04d}.png", image)
      index += 1
