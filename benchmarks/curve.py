"""Scores every checkpoint of a run with the data set's verifier: right pictures against minutes.

  python -m t2i_jax.main --config=configs/quickstart.py --workdir=DIR \
    --config.checkpoint.every=10% --config.checkpoint.keep_last=20
  python benchmarks/curve.py --workdir=DIR --split=held_out_combinations --plot=curve.svg

Minutes are of training steps alone, without compiling, drawing and saving. The
plot needs matplotlib (the extra "plots").
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from etils import epath

from t2i_jax import assembly, command, data
from t2i_jax.evaluation.prompt_sets import set_data
from t2i_jax.evaluation.verifier import score
from t2i_jax.parallel.mesh import make_mesh
from t2i_jax.pipeline import Pipeline
from t2i_jax.restore import restored_variables
from t2i_jax.training.checkpoint import Checkpoints


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--workdir", required=True, type=Path)
  parser.add_argument("--split", default="held_out_combinations")
  parser.add_argument("--pictures", type=int, default=256)
  parser.add_argument("--data-option", action="append", default=[], metavar="NAME=VALUE",
                      help="an option of the data set in place of the run's, such as levels=two")
  parser.add_argument("--output", type=Path, help="a JSON file for the figures")
  parser.add_argument("--plot", type=Path, help="an SVG or PNG file for the curve")
  args = parser.parse_args()
  command.set_up_jax()
  checkpoints = Checkpoints(epath.Path(args.workdir) / "checkpoints", read_only=True)
  steps = checkpoints.steps()
  checkpoints.close()
  minutes, pipeline, rows = minutes_at(args.workdir, steps), None, []
  print("minutes    step" + "".join(f"{name:>10}" for name in data.ATTRIBUTES))
  for step, spent in zip(steps, minutes, strict=True):
    config, _, variables, tokenizers, about = restored_variables(
      epath.Path(args.workdir), step, ema=True
    )
    if pipeline is None:
      set_data(config, "", args.data_option)
      pipeline = Pipeline(
        assembly.build_with(config, about), tokenizers, make_mesh({"data": -1}), config=config
      )
    pipeline.variables = variables
    options = config.sample.options.to_dict()
    right = score(pipeline, args.split, args.pictures, 0, options)["right"]
    rows.append({"step": step, "minutes": spent, "right": right})
    print(f"{spent:7.1f} {step:7}" + "".join(f"{right[name]:10.1%}" for name in data.ATTRIBUTES),
          flush=True)
  if args.output:
    args.output.write_text(json.dumps(rows, indent=1) + "\n")
  if args.plot:
    plot(rows, args.split, args.plot)


def minutes_at(workdir: Path, steps: Sequence[int]) -> list[float]:
  """Minutes of training up to each step, between the lines of metrics.jsonl by interpolation."""
  logged, minutes = [0], [0.0]
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    entry = json.loads(line)
    if "steps_per_second" in entry:
      minutes.append(minutes[-1] + (entry["step"] - logged[-1]) / entry["steps_per_second"] / 60)
      logged.append(entry["step"])
  return np.interp(steps, logged, minutes).tolist()


def plot(rows: list[dict], split: str, path: Path) -> None:
  """Draws the share right in each attribute, and in all, against minutes."""
  from matplotlib.figure import Figure

  axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
  for name in data.ATTRIBUTES:
    axes.plot(
      [row["minutes"] for row in rows], [100 * row["right"][name] for row in rows], label=name,
      linewidth=3 if name == "all" else 1, color="black" if name == "all" else None,
    )
  axes.set(xlabel="minutes of training", ylabel="% right", ylim=(0, 101), xlim=(0, None),
           title=split.replace("_", " "))
  axes.grid(alpha=0.3)
  axes.legend()
  figure.savefig(path)


if __name__ == "__main__":
  main()
