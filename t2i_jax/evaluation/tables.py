"""Results as tables: one line a point, and beneath them what the numbers depend on.

A row is what `scores.json` holds under "results", one for each point and set of prompts.
"""

from collections.abc import Sequence
from typing import Any

from t2i_jax import data

Row = dict[str, Any]
LOWER, HIGHER = " ↓", " ↑"  # where a result is better
ARROWS = {"lower": LOWER, "higher": HIGHER}
SHARES = ("verifier",)  # results that are printed as percentages


def result_names(rows: Sequence[Row]) -> list[str]:
  """Names of all results of rows, in order."""
  return list(dict.fromkeys(name for row in rows for name in row["results"]))


def number(name: str, result: dict[str, Any] | None) -> str:
  """A result's value as text, with its deviation."""
  if result is None or not isinstance(result["value"], int | float):
    return "-" if result is None else str(result["value"])  # a value that is no number is a text
  if name in SHARES:
    return f"{result['value']:.1%}"
  deviation = result.get("deviation")
  return f"{result['value']:.4g}" + (f" ± {deviation:.2g}" if deviation is not None else "")


def heading(name: str, rows: Sequence[Row]) -> str:
  """A result's name, with an arrow to where it is better."""
  found = [row["results"][name]["better"] for row in rows if name in row["results"]]
  return name + ARROWS.get(found[0], "")


def seconds(row: Row) -> str:
  given = row["seconds_a_picture"]
  # Of one batch alone, which compiles as well.
  return "-" if given is None else f"{given:.3g}{'' if row['warm'] else ', compiling too'}"


def main_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
  """Header and cells: point, parameters, seconds a picture, and every result."""
  names = result_names(rows)
  header = ["", "parameters", "s a picture", *(heading(name, rows) for name in names)]
  cells = [
    [row["point"], parameters(row), seconds(row),
     *(number(name, row["results"].get(name)) for name in names)]
    for row in rows
  ]
  return header, cells


def parameters(row: Row) -> str:
  model = row["export"]
  frozen = f" + {model['frozen']:,} frozen" if model["frozen"] else ""
  return f"{model['parameters']:,}{frozen}"


def verifier_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
  """Header and cells of the verifier's attributes, and of all of them with captions shuffled."""
  header = ["right", *data.ATTRIBUTES, "all, captions shuffled"]
  cells = []
  for row in rows:
    about = row["results"]["verifier"]["about"]
    cells.append([row["point"], *(f"{about['right'][name]:.1%}" for name in data.ATTRIBUTES),
                  f"{about['shuffled']['all']:.1%}"])
  return header, cells


def category_tables(rows: Sequence[Row]) -> list[tuple[list[str], list[list[str]]]]:
  """For each column of a file's prompts: header and cells of means by category."""
  tables = []
  for column in dict.fromkeys(c for row in rows for c in row["categories"]):
    for row in rows:
      groups = row["categories"].get(column, {})
      names = list(dict.fromkeys(k for group in groups.values() for k in group if k != "n"))
      cells = [
        [value, str(group["n"]), *(f"{group[name]:.4g}" for name in names)]
        for value, group in groups.items()
      ]
      tables.append(([f"{row['point']}: {column}", "pictures", *names], cells))
  return tables


def text_table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
  """Columns of equal width, the first to the left."""
  lines = [header, *cells]
  widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
  return "\n".join(
    "  " + "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def notes(rows: Sequence[Row]) -> list[str]:
  """What the rows' numbers depend on, a line each: drawing, exports, networks, references."""
  first, lines = rows[0], []
  each = f", {first['each']} of each" if first["each"] > 1 else ""
  reconstructed = "reconstruction" in first
  if reconstructed:
    lines.append(f"{first['pictures']} real pictures of {first['set']}, each against what becomes "
                 "of it: encoded to the mean of its latents' distribution, decoded, rounded to 8 "
                 f"bits; seed {first['seed']} of what metrics draw")
  else:
    lines.append(f"{first['pictures']} pictures of {first['captions']} captions{each} "
                 f"({first['set']}), seed {first['seed']}")
  for model in {row["export"]["name"]: row["export"] for row in rows}.values():
    own = [row for row in rows if row["export"]["name"] == model["name"]]
    kept = {k: v for k, v in own[0]["told"].items() if k not in own[0]["swept"]}
    options = ", ".join(f"{k}={v}" for k, v in kept.items()) or "none but the system's own"
    weights = "moving average" if model["ema"] else "weights of the last step"
    lines.append(f"{model['name']}: {model['system']}, step {model['step']}, {weights}, "
                 f"{model['resolution']} px, hash {model['hash'][:12]}, "
                 f"{model['path']}{'' if reconstructed else f'; options {options}'}")
  several = len(rows) > 1
  for name in result_names(rows):
    said: dict[str, list[str]] = {}  # points whose results are equal share a line
    for row in rows:
      if name in row["results"]:
        said.setdefault(row["results"][name]["line"], []).append(row["point"])
    lines += [f"{', '.join(points)}: {line}" if several else line for line, points in said.items()]
  return lines
