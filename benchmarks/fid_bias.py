"""How Frechet and kernel distances depend on the number of pictures, where the truth is known.

  python benchmarks/fid_bias.py --plot=docs/fid_bias.svg  # the plot needs pip install -e ".[plots]"

Features are drawn from Gaussians of 256 dimensions, whose variances fall as 1 / i, as those of
networks' features roughly do. The real ones have mean zero. One model has their covariance and a
mean that is off; the other's mean is off by a little more, and it varies less: its true distance is
larger. Frechet distances are to the real distribution itself, so that the bias is of the N drawn
rows alone; kernel distances are to 50,000 real rows, in up to four subsets of 500. Printed and
drawn are means and standard deviations over seeds.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices so small are slower on several

import numpy as np

from t2i_jax.metrics.frechet import Moments, frechet_distance
from t2i_jax.metrics.kernel import kid

WIDTH, SUBSET = 256, 500
SIZES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 30000, 50000)
VARIANCES = 1.0 / np.arange(1, WIDTH + 1)
# Squared length of the mean, and standard deviations over the real ones.
MODELS = {"as varied as real": (0.30, 1.0), "less varied": (0.31, 0.9)}


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--seeds", type=int, default=5)
  parser.add_argument("--plot", default="", metavar="FILE.svg")
  flags = parser.parse_args()
  real = np.random.default_rng(0).normal(size=(max(SIZES), WIDTH)) * np.sqrt(VARIANCES)
  found = {}
  for name, (shift, spread) in MODELS.items():
    truth = shift + (1 - spread) ** 2 * VARIANCES.sum()
    runs = np.array([measured(real, shift, spread, seed) for seed in range(1, flags.seeds + 1)])
    found[name] = (truth, runs)
    print(f"{name}: true Frechet distance {truth:.4f}; {flags.seeds} seeds")
    for n, (frechet, kernel) in zip(SIZES, np.moveaxis(runs, 0, -1), strict=True):
      print(f"  N {n:6}  Frechet {frechet.mean():7.4f} +- {frechet.std():.4f}"
            f"  (N times its bias {n * (frechet.mean() - truth):5.0f})"
            f"  kernel {kernel.mean():.6f} +- {kernel.std():.6f}", flush=True)
  if flags.plot:
    draw(found, flags)


def measured(real: np.ndarray, shift: float, spread: float, seed: int) -> np.ndarray:
  """Frechet and kernel distances [sizes, 2] of the first N rows of one seed's."""
  rng = np.random.default_rng(seed)
  rows = spread * np.sqrt(VARIANCES) * rng.normal(size=(max(SIZES), WIDTH))
  rows += np.sqrt(shift / WIDTH)
  moments, distances, before = Moments(), [], 0
  for n in SIZES:
    moments.update(rows[before:n])
    before = n
    frechet = frechet_distance(
      moments.mean, moments.covariance, np.zeros(WIDTH), np.diag(VARIANCES)
    )
    size = min(SUBSET, n)
    kernel, _ = kid(rows[:n], real, min(4, max(1, n // size)), size, seed)
    distances.append((frechet, kernel))
  return np.array(distances)


def draw(found: dict, flags) -> None:
  import matplotlib
  from matplotlib.figure import Figure

  figure = Figure(figsize=(9, 3.6), layout="constrained")
  for column, axes in enumerate(figure.subplots(1, 2)):
    for colour, (name, (truth, runs)) in zip(("C0", "C1"), found.items(), strict=True):
      mean, deviation = runs[..., column].mean(axis=0), runs[..., column].std(axis=0)
      axes.plot(SIZES, mean, marker=".", color=colour, label=name)
      axes.fill_between(SIZES, mean - deviation, mean + deviation, color=colour, alpha=0.2, lw=0)
      if column == 0:
        axes.axhline(truth, color=colour, ls="--", lw=1, label=f"its true distance, {truth:.3f}")
    axes.set(xscale="log", xlabel="pictures N",
             ylabel=("Frechet distance", "kernel distance")[column])
    if column == 0:
      axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
  with matplotlib.rc_context({"svg.hashsalt": "t2i_jax"}):  # the same numbers make the same file
    figure.savefig(Path(flags.plot), format="svg", metadata={"Date": None})


if __name__ == "__main__":
  main()
