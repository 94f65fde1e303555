"""Plots of results along what is swept, as SVG; matplotlib is imported when one is drawn."""

import io
import itertools
from collections.abc import Sequence
from typing import Any

from t2i_jax.evaluation.tables import LOWER, SHARES, Row, heading, result_names

STYLES = tuple(itertools.product(("-", "--", ":"), (f"C{i}" for i in range(8))))
AT_MOST = 4  # results that are set against each other, first ones first


def available() -> bool:
  """Whether matplotlib, the extra "plots", is there."""
  import importlib.util

  return importlib.util.find_spec("matplotlib") is not None


def numeric_axes(rows: Sequence[Row]) -> list[str]:
  """Swept options that are numbers and have several values."""
  names = list(dict.fromkeys(name for row in rows for name in row["swept"]))
  return [
    name for name in names
    if all(_is_number(row["swept"].get(name)) for row in rows)
    and len({row["swept"][name] for row in rows}) > 1
  ]


def draw_plots(rows: Sequence[Row]) -> dict[str, bytes]:
  """SVG files by name: every result along each axis, and results against each other along one.

  Args:
    rows: of one set of prompts.
  """
  plots = {}
  names = [name for name in result_names(rows)
           if len({row["results"].get(name, {}).get("value") for row in rows}) > 1]
  for axis in numeric_axes(rows):
    for name in names:
      plots[f"{name}_along_{axis}"] = _along(rows, axis, name)
    for one, other in _pairs(rows, names):
      plots[f"{one}_against_{other}_along_{axis}"] = _against(rows, axis, one, other)
  if not numeric_axes(rows) and len(rows) > 1:
    for one, other in _pairs(rows, names):
      plots[f"{one}_against_{other}"] = _against(rows, "", one, other)
  return {name.replace("/", "_"): content for name, content in plots.items()}


def _pairs(rows: Sequence[Row], names: Sequence[str]) -> list[tuple[str, str]]:
  """Results to set against each other, distances upwards, as they are usually plotted."""
  first = sorted(names[:AT_MOST], key=lambda name: not heading(name, rows).endswith(LOWER))
  return list(itertools.combinations(first, 2))


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _curves(rows: Sequence[Row], axis: str) -> dict[str, list[Row]]:
  """Rows that differ in the axis alone, by what they have in common."""
  curves: dict[str, list[Row]] = {}
  for row in rows:
    others = [f"{k}={v}" for k, v in row["swept"].items() if k != axis]
    curves.setdefault(" ".join([row["export"]["name"], *others]), []).append(row)
  return {name: sorted(own, key=lambda row: row["swept"].get(axis, 0))
          for name, own in curves.items()}


def _value(row: Row, name: str) -> float:
  value = row["results"].get(name, {}).get("value")
  return value * (100 if name in SHARES else 1) if _is_number(value) else float("nan")


def _label(rows: Sequence[Row], name: str) -> str:
  better = heading(name, rows).removeprefix(name)
  return f"{name}{', %' * (name in SHARES)}{better}"


def _figure(rows: Sequence[Row]):
  from matplotlib.figure import Figure

  figure = Figure(figsize=(6, 3.8), layout="constrained")
  axes = figure.subplots()
  axes.grid(alpha=0.3)
  axes.set_title(f"{rows[0]['set'].replace('_', ' ')}, {rows[0]['pictures']} pictures", fontsize=10)
  return figure, axes


def _along(rows: Sequence[Row], axis: str, name: str) -> bytes:
  figure, axes = _figure(rows)
  curves = _curves(rows, axis)
  for (label, own), (line, colour) in zip(curves.items(), itertools.cycle(STYLES), strict=False):
    points, values = [row["swept"][axis] for row in own], [_value(row, name) for row in own]
    axes.plot(points, values, line, marker=".", color=colour, label=label)
    deviations = [row["results"].get(name, {}).get("deviation") for row in own]
    if all(deviation is not None for deviation in deviations):
      axes.fill_between(points, [v - d for v, d in zip(values, deviations, strict=True)],
                        [v + d for v, d in zip(values, deviations, strict=True)],
                        color=colour, alpha=0.15, linewidth=0)
  if axis == "steps":
    ticks = sorted({row["swept"][axis] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, map(str, ticks))
  axes.set(xlabel=axis.replace("_", " "), ylabel=_label(rows, name))
  return _finished(figure, axes, curves)


def _against(rows: Sequence[Row], axis: str, one: str, other: str) -> bytes:
  figure, axes = _figure(rows)
  curves = _curves(rows, axis)
  for (label, own), (line, colour) in zip(curves.items(), itertools.cycle(STYLES), strict=False):
    x, y = [_value(row, other) for row in own], [_value(row, one) for row in own]
    axes.plot(x, y, line, marker=".", color=colour, label=label)
    for row, left, up in zip(own, x, y, strict=True):
      if axis and left == left and up == up:
        axes.annotate(f"{row['swept'][axis]:g}", (left, up), textcoords="offset points",
                      xytext=(4, 4), fontsize=7, color=colour)
  axes.set(xlabel=_label(rows, other), ylabel=_label(rows, one))
  if axis:
    axes.set_title(f"{axes.get_title()}; along {axis.replace('_', ' ')}", fontsize=10)
  return _finished(figure, axes, curves)


def _finished(figure, axes, curves: dict) -> bytes:
  import matplotlib

  if len(curves) > 1:
    axes.legend(fontsize=7, ncols=2)
  content = io.BytesIO()
  # The same results make the same file.
  with matplotlib.rc_context({"svg.hashsalt": "t2i_jax"}):
    figure.savefig(content, format="svg", metadata={"Date": None})
  return content.getvalue()
