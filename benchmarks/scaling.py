"""How a training step scales on paper, from the programs that a TPU's compiler makes of it.

  python benchmarks/scaling.py --output=scaling.json --plot=docs/scaling.svg   # needs 'jax[tpu]'

The work of a chip stays the same while slices grow: a fixed number of pictures a chip, each slice
with its parameters whole on every chip ("data"), spread over all of its chips ("fsdp") and over
groups of 32 ("fsdp=32", from 32 chips on). Bytes and FLOPs are of the compiled program; the seconds
are theirs at the speeds that are published for the chip (`t2i_jax/parallel/chips.py`), and a step
takes at least the longest of them.

Every point is stored in --output when it is done, and one that is there is not compiled again.
The plot needs matplotlib (the extra "plots").
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t2i_jax import command, config_files
from t2i_jax import config as configs
from t2i_jax.errors import UserError
from t2i_jax.files import write_whole

CONFIG = "configs/dit.py:size=XL/2,dataset=folder,encoder=transformer"
# All of a v5e's slices from one machine on, and several of the largest.
POINTS = ("v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16", "2*v5e:16x16",
          "4*v5e:16x16")
LAYOUTS = {"data": {"data": -1, "fsdp": 1}, "fsdp": {"data": 1, "fsdp": -1}}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default=CONFIG, help="and --config.KEY=VALUE, as of plan")
  parser.add_argument("--points", default=",".join(POINTS), help="slices, or NUMBER*slice")
  parser.add_argument("--layouts", default="data,fsdp,fsdp=32",
                      help="data, fsdp, or fsdp=N: spread over N chips, repeated over the others")
  parser.add_argument("--pictures", type=int, default=8, help="a step of a chip")
  parser.add_argument("--output", type=Path, default=Path("scaling.json"))
  parser.add_argument("--plot", type=Path, help="an SVG file")
  settings, rest = command.split_settings(None)
  command.run(parser, rest, lambda flags: scaling(flags, settings))


def scaling(flags: argparse.Namespace, settings: Sequence[str]) -> None:
  # Compiling for a TPU runs on the CPU; a TPU that is there is another's.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  known = json.loads(flags.output.read_text()) if flags.output.exists() else []
  rows = []
  for point in flags.points.split(","):
    for layout in flags.layouts.split(","):
      number, _, topology = point.rpartition("*")
      asked = {
        "config": flags.config, "settings": sorted(settings), "topology": topology,
        "slices": int(number or 1), "layout": layout, "pictures": flags.pictures,
      }  # fmt: skip
      row = next((row for row in known if asked.items() <= row.items()), None)
      if row is None:
        print(f"compiling for {point}, {layout}", flush=True)
        try:
          row = asked | measured(**asked)
        except UserError as error:  # a layout that this slice cannot have
          print(f"left out: {error}", flush=True)
          continue
        known.append(row)
        write_whole(flags.output, (json.dumps(known, indent=1) + "\n").encode())
      rows.append(row)
  print(table(rows))
  if flags.plot:
    write_whole(flags.plot, plot(rows))


def measured(
  config: str, settings: Sequence[str], topology: str, slices: int, layout: str, pictures: int
) -> dict[str, Any]:
  """One point, as `python -m t2i_jax.plan` has it."""
  from t2i_jax.parallel.topology import chip_of, slice_mesh
  from t2i_jax.planning import published, report

  loaded = config_files.load_config(config, {"precision.compute": "bfloat16",
                                        **command.overrides(settings)})
  mesh = slice_mesh(topology, axes_of(layout) | {"slice": slices}, slices)
  with loaded.unlocked():
    loaded.train.batch_size = pictures * mesh.size
  parts = report.build(loaded, published.names_of(loaded), encode=False)
  found = report.measure(loaded, mesh, chip_of(topology), parts)
  return {
    "chips": found.chips, "parameters": found.trained, "flops": found.flops,
    "needs": dict(found.needs), "fits": found.fits, "refusal": found.refusal,
    "moved": found.moved,
    "collectives": {kind: dataclasses.asdict(x) for kind, x in found.collectives.items()},
    "bounds": {} if found.refusal else found.bounds,
  }  # fmt: skip


def axes_of(layout: str) -> dict[str, int]:
  """Sizes of a mesh's axes; UserError for an unknown layout."""
  name, _, size = layout.partition("=")
  if size.isdigit() and name == "fsdp":
    return {"data": -1, "fsdp": int(size)}
  return configs.choose("layout", layout, LAYOUTS)


def table(rows: Sequence[dict[str, Any]]) -> str:
  """The points as Markdown: the peak and what a chip sends in GiB, and times in ms."""
  kinds = sorted({kind for row in rows for kind, sent in row["collectives"].items()
                  if sent["wire"]})
  lines = [
    ["slices", "chips", "layout", "peak", *kinds, "to other slices", "arithmetic", "memory",
     "links", "network", "bound by", "pictures/s"],
  ]  # fmt: skip
  for row in rows:
    sent, bounds = row["collectives"], row["bounds"]
    where = f"{row['slices']} x " * (row["slices"] > 1) + row["topology"]
    if not bounds:
      lines.append([where, str(row["chips"]), row["layout"], "does not fit",
                    *[""] * (len(lines[0]) - 4)])
      continue
    binding = max(bounds, key=bounds.get)
    lines.append([
      where, str(row["chips"]), row["layout"],
      f"{row['needs']['peak'] / 2**30:.1f}" + ", does not fit" * (not row["fits"]),
      *(f"{sent[kind]['wire'] / 2**30:.2f}" if kind in sent else "0" for kind in kinds),
      f"{sum(x['network'] for x in sent.values()) / 2**30:.3f}",
      *(f"{1e3 * bounds.get(name, 0.0):.1f}" for name in ("arithmetic", "memory", "links",
                                                          "network")),
      binding, f"{row['pictures'] * row['chips'] / bounds[binding]:,.0f}",
    ])  # fmt: skip
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
  return "\n".join([text[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|",
                    *text[1:]])


def plot(rows: Sequence[dict[str, Any]]) -> bytes:
  """An SVG: for each layout, what a step takes at least, by what binds it, against chips."""
  import io

  try:
    import matplotlib
    from matplotlib.figure import Figure
  except ImportError as error:
    raise UserError("--plot needs matplotlib: pip install -e '.[plots]'") from error
  layouts = list(dict.fromkeys(row["layout"] for row in rows))
  figure = Figure(figsize=(4 * len(layouts), 3.4), layout="constrained")
  for axes, layout in zip(
    figure.subplots(1, len(layouts), sharey=True, squeeze=False)[0], layouts, strict=True
  ):
    own = sorted((row for row in rows if row["layout"] == layout and row["bounds"]),
                 key=lambda row: row["chips"])
    chips = [row["chips"] for row in own]
    for name, marker in (("arithmetic", "o"), ("memory", "s"), ("links", "^"), ("network", "v")):
      there = [row for row in own if name in row["bounds"]]
      axes.plot([row["chips"] for row in there],
                [1e3 * row["bounds"][name] for row in there], marker=marker, label=name)
    for row in own:
      if not row["fits"]:
        axes.annotate("does not fit", (row["chips"], 1e3 * max(row["bounds"].values())),
                      xytext=(0, 5), textcoords="offset points", fontsize=6, ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(chips, map(str, chips), rotation=45)
    axes.set(xlabel="chips", title=layout, ylim=(0, None))
    axes.grid(alpha=0.3)
  first = figure.axes[0]
  first.set_ylabel(f"ms a step at least, {rows[0]['pictures']} pictures a chip")
  first.legend(fontsize=8)
  content = io.BytesIO()
  # The same points make the same file.
  with matplotlib.rc_context({"svg.hashsalt": "t2i_jax"}):
    figure.savefig(content, format="svg", metadata={"Date": None})
  return content.getvalue()


if __name__ == "__main__":
  main()
