"""Scores an export with the data set's verifier over values of its sampling options, as a plot.

  python benchmarks/sweep.py --export=runs/ddpm/export --along=steps=5,10,20,50 \
    --series=solver=ddpm,ddim,dpmpp_2m --plot=solvers.svg
  python benchmarks/sweep.py --export=runs/adm/export --guide=runs/classifier/export \
    --along=guide_scale=0,1,2,4 --plot=guidance.svg

Every point draws the same captions from the same noise. The plot needs matplotlib (the extra
"plots").
"""

import argparse
import itertools
import json
import time
from pathlib import Path

from t2i_jax import command
from t2i_jax import config as configs
from t2i_jax.errors import UserError
from t2i_jax.evaluate import score
from t2i_jax.pipeline import Pipeline

STYLES = tuple(itertools.product(("-", "--", ":"), (f"C{i}" for i in range(8))))


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--export", required=True, type=Path)
  parser.add_argument("--guide", default="", help="an export that steers the sampler")
  parser.add_argument("--along", required=True, metavar="NAME=V1,V2,...",
                      help="the option along the plot's axis")
  parser.add_argument("--series", default="", metavar="NAME=V1,V2,...",
                      help="an option with a curve for each value")
  parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE")
  parser.add_argument("--split", default="held_out_combinations")
  parser.add_argument("--pictures", type=int, default=128)
  parser.add_argument("--attribute", default="all")
  parser.add_argument("--output", type=Path, help="a JSON file for the figures")
  parser.add_argument("--plot", type=Path, help="an SVG or PNG file")
  args = parser.parse_args()
  command.set_up_jax()
  pipeline = Pipeline.load(args.export, guide=args.guide)
  defaults = pipeline.config.sample.options.to_dict()
  fixed = dict(values(text, defaults, single=True) for text in args.option)
  fixed = {name: value for name, (value,) in fixed.items()}
  name, points = values(args.along, defaults)
  series, curves = values(args.series, defaults) if args.series else ("", [""])
  rows = []
  for curve, point in itertools.product(curves, points):
    options = {**defaults, **fixed, name: point, **({series: curve} if series else {})}
    started = time.perf_counter()
    try:
      right = score(pipeline, args.split, args.pictures, 0, options)["right"]
    except UserError as error:
      print(f"{series} {curve}, {name} {point}: left out: {error}", flush=True)
      continue
    rows.append({"series": curve, name: point, "right": right})
    print(f"{series} {curve}, {name} {point}: "
          + ", ".join(f"{key} {value:.1%}" for key, value in right.items())
          + f" ({time.perf_counter() - started:.0f} s)", flush=True)
  if args.output:
    args.output.write_text(json.dumps(rows, indent=1) + "\n")
  if args.plot:
    plot(rows, name, args.attribute, f"{args.split.replace('_', ' ')}, {args.pictures} pictures",
         args.plot)


def values(text: str, defaults: dict, single: bool = False) -> tuple[str, list]:
  """A sampling option and its values."""
  name, _, given = text.partition("=")
  configs.choose("sampling option", name, defaults)
  parts = [given] if single else given.split(",")
  return name, [configs.typed(f"option {name}", part, defaults[name]) for part in parts]


def plot(rows: list[dict], name: str, attribute: str, title: str, path: Path) -> None:
  """Draws the share that is right in an attribute along an option, a curve for each series."""
  from matplotlib.figure import Figure

  axes = (figure := Figure(figsize=(6.5, 4), layout="constrained")).subplots()
  curves = list(dict.fromkeys(row["series"] for row in rows))
  for curve, (line, colour) in zip(curves, itertools.cycle(STYLES), strict=False):
    own = [row for row in rows if row["series"] == curve]
    axes.plot([row[name] for row in own], [100 * row["right"][attribute] for row in own], line,
              marker=".", color=colour, label=str(curve))
  axes.set(xlabel=name.replace("_", " "), ylabel="% right", ylim=(-1, 101), title=title)
  if name == "steps":
    axes.set_xscale("log", base=2)
    ticks = sorted({row[name] for row in rows})
    axes.set_xticks(ticks, map(str, ticks))
  axes.grid(alpha=0.3)
  if len(curves) > 1:
    axes.legend(fontsize=7, ncols=2)
  figure.savefig(path)


if __name__ == "__main__":
  main()
