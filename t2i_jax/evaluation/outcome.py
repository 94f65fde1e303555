"""What an evaluation leaves: printed tables, `scores.json`, plots, pictures and the report."""

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

import t2i_jax
from t2i_jax import batch_spec
from t2i_jax.evaluation import plots, report, tables, verifier
from t2i_jax.evaluation.drawing import PICTURES, seconds_a_picture, spread
from t2i_jax.evaluation.folder import Shards, slug
from t2i_jax.evaluation.points import Point
from t2i_jax.evaluation.prompt_sets import PromptSet, Sources, pictures_of
from t2i_jax.evaluation.tables import Row
from t2i_jax.files import write_whole
from t2i_jax.training.grids import prompt_grid, save_picture

GRID = 64  # pictures of a grid
ORIGINAL = "original"
ACROSS = 4  # pictures of one prompt and point that are shown


def row(
  point: Point, prompts: PromptSet, shards: Shards, path: epath.Path, seed: int,
  results: Mapping[str, Any], categories: Mapping[str, Any], reconstruction: str = "",
) -> Row:
  """One point on one set of prompts as JSON: its results, and all that they depend on.

  Args:
    point, prompts, shards: what was drawn, and where it is.
    path: the evaluation's folder.
    seed: of the drawing.
    results: by name.
    categories: as of `scoring.by_category`.
    reconstruction: of what the pictures are reconstructions, as of `reconstructing.described`.
  """
  model = point.model
  seconds, warm = None, True
  if shards.path(PICTURES, 0).exists():
    seconds, warm = seconds_a_picture(shards)
  return {
    "point": point.label,
    "export": {
      "name": model.name, "path": model.path, "system": model.config.system,
      "step": model.exported.step, "ema": model.ema, "hash": model.digest,
      "parameters": model.parameters, "frozen": model.frozen,
      "resolution": batch_spec.resolution_of(model.system),
    },
    "set": prompts.name,
    "swept": point.swept,
    "options": point.options,
    "told": point.told,
    "seed": seed,
    "pictures": prompts.total,
    "captions": len({prompt.text for prompt in prompts.prompts}),
    "each": prompts.each,
    "batch_size": shards.size,
    "drawn": str(shards.folder.relative_to(path)) if seconds is not None else "",
    "seconds_a_picture": seconds,
    "warm": warm,
    "results": dict(results),
    "categories": dict(categories),
    **({"reconstruction": reconstruction} if reconstruction else {}),
  }


def show(rows: Sequence[Row], sets: Sequence[PromptSet], path: epath.Path, kept: bool,
         sources: Sources) -> None:
  """Prints the tables and, where the folder is kept, writes everything into it.

  Reconstructions are shown beside the pictures of `sources` that they are of.
  """
  by_set = [(prompts, [row for row in rows if row["set"] == prompts.name]) for prompts in sets]
  for _, own in by_set:
    print(text(own))
  if not kept:
    return
  command = " ".join(["python -m t2i_jax.evaluate", *map(shlex.quote, sys.argv[1:])])
  content = {"version": t2i_jax.__version__, "command": command, "results": list(rows)}
  write_whole(path / "scores.json", (json.dumps(content, indent=2) + "\n").encode())
  several = len(rows) > len(sets)
  if several and not plots.available():
    print('warning: no plots, as matplotlib is missing: pip install -e ".[plots]"', file=sys.stderr)
  sections = []
  for prompts, own in by_set:
    drawn = {}
    if several and plots.available():
      drawn = plots.draw_plots(own)
      for name, svg in drawn.items():
        write_whole(path / "plots" / f"{slug(prompts.name)}_{name}.svg", svg)
    sections.append(_section(prompts, own, drawn, path, sources))
  page = report.page(f"Evaluation of {', '.join(_names(rows))}", command, sections)
  write_whole(path / "report.html", page.encode())
  print(f"scores.json and report.html in {path}")


def text(rows: Sequence[Row]) -> str:
  """The tables of one set of prompts, and what they depend on."""
  lines = [rows[0]["set"], tables.text_table(*tables.main_table(rows))]
  judged = [row for row in rows if "verifier" in row["results"]]
  if len(judged) == 1:
    lines.append(verifier.table("  verifier", judged[0]["results"]["verifier"]["about"]))
  elif judged:
    lines.append(tables.text_table(*tables.verifier_table(judged)))
  lines += [tables.text_table(*table) for table in tables.category_tables(rows)]
  return "\n".join([*lines, *(f"  {note}" for note in tables.notes(rows))])


def _names(rows: Sequence[Row]) -> list[str]:
  return list(dict.fromkeys(row["export"]["name"] for row in rows))


def _section(
  prompts: PromptSet, rows: Sequence[Row], drawn: dict[str, bytes], path: epath.Path,
  sources: Sources,
) -> str:
  """A set's part of the page; its pictures go into `pictures/` too."""
  rows_drawn = [row for row in rows if row["drawn"]]
  shown = spread(len(prompts.prompts), report.PROMPTS)
  texts = [prompts.prompts[i].text for i in shown]
  pictures = []
  for own in rows_drawn:
    shards = Shards(path / own["drawn"], own["batch_size"], own["pictures"])
    across = min(prompts.each, ACROSS)
    indices = shown[:, None] * prompts.each + np.arange(across)
    images = shards.some(indices.reshape(-1))
    pictures.append(images.reshape(len(shown), across, *images.shape[1:]))
  labels = [row["point"] for row in rows_drawn]
  if rows_drawn and "reconstruction" in rows_drawn[0]:
    source = sources.of(prompts.split, rows_drawn[0]["export"]["resolution"])
    pictures.insert(0, pictures_of(source, shown, prompts.total)[:, None])
    labels.insert(0, ORIGINAL)
  if rows_drawn:
    _save_grid(prompts, rows_drawn, labels, pictures, texts, path)
  return report.section(rows, drawn, labels, texts if rows_drawn else [], pictures)


def _save_grid(
  prompts: PromptSet, rows: Sequence[Row], columns: Sequence[str], pictures: Sequence[np.ndarray],
  texts: Sequence[str], path: epath.Path,
) -> None:
  """Of one point its first pictures; of several those of the same prompts, side by side."""
  target = path / "pictures" / f"{slug(prompts.name)}.png"
  if len(columns) == 1:
    own = rows[0]
    shards = Shards(path / own["drawn"], own["batch_size"], own["pictures"])
    count = min(GRID, own["pictures"])
    save_picture(target, prompt_grid(shards.some(np.arange(count)), prompts.captions[:count]))
    return
  if len({images.shape[2:] for images in pictures}) > 1:
    return  # Exports of several resolutions; the page shows them.
  first = np.stack([images[:, 0] for images in pictures], axis=1)
  labels = [f"{column}: {text}" for text in texts for column in columns]
  save_picture(target, prompt_grid(first.reshape(-1, *first.shape[2:]), labels, len(columns)))
