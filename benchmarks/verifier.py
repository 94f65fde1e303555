"""Prints how well the scenes' verifier judges rendered pictures.

  python benchmarks/verifier.py --rows=6000
"""

import argparse
import time

from t2i_jax.data.scenes import LEVELS, SCORES, audit, verify


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--rows", type=int, default=6000, help="pictures a figure")
  parser.add_argument("--resolutions", type=int, nargs="+", default=[32, 64])
  args = parser.parse_args()

  print("accepted, %              " + "".join(f"{name:>10}" for name in SCORES))

  def show(title, scores):
    values = "".join(f"{100 * scores[name]:10.2f}" for name in SCORES)
    print(f"{title:25}{values}", flush=True)

  for resolution in args.resolutions:
    for level in LEVELS:
      print(f"-- {resolution} px, level {level}")
      # A blur of one pixel is asked for where a pixel is small.
      for condition in ("clean", "noise") + (("blur",) if resolution >= 64 else ()):
        scores = audit.accepted_true(level, resolution, args.rows, condition)
        show(f"true, {condition}", scores)
      for attribute in audit.CHANGES[level]:
        scores = audit.accepted_changed(level, resolution, args.rows, attribute)
        show(f"changed {attribute}", scores)
      images, captions = audit.true_rows(level, resolution, args.rows)
      start = time.perf_counter()
      verify(images, captions)
      print(f"{len(images) / (time.perf_counter() - start):.0f} pictures verified a second")
    print(f"-- {resolution} px, one-object captions")
    for decoy in audit.DECOYS:
      accepted = audit.accepted_decoys(resolution, args.rows, decoy)
      print(f"{decoy:25}{100 * accepted:10.2f}", flush=True)


if __name__ == "__main__":
  main()
