"""`python -m t2i_jax.evaluate --export=DIR`: what an export is worth on data it never saw."""

import json
import sys
import time

import numpy as np
from etils import epath

from t2i_jax import assembly, caches, command, data
from t2i_jax.errors import UserError, unknown

MEASURES = ("score", "loss")


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.evaluate",
    "Measures an export on held-out data: the loss, and on data sets with a verifier how many\n"
    "drawn pictures are right, by attribute, for their captions and for shuffled ones (which must\n"
    "collapse: if they do not, the model ignores the text).",
    "python -m t2i_jax.evaluate --export=runs/quickstart/export",
    "python -m t2i_jax.evaluate --export=DIR --split=held_out_pairs --pictures=1024 --guidance=3",
    "python -m t2i_jax.evaluate --export=DIR --measure=loss",
  )
  from t2i_jax.sample import add_export_flags

  add_export_flags(parser)
  parser.add_argument("--split", action="append", default=[],
                      help="a split; may be repeated; by default the run's evaluate.splits, or all "
                      "held-out ones")
  parser.add_argument("--measure", action="append", default=[], metavar="|".join(MEASURES),
                      help="what to measure; may be repeated; all that make sense by default")
  parser.add_argument("--pictures", type=int, default=256, help="drawn for a score (256)")
  parser.add_argument("--data-option", action="append", default=[], metavar="NAME=VALUE",
                      help="an option of the data set in place of the training run's")
  parser.add_argument("--output", default="",
                      help="folder for scores.json and a grid of the scored pictures")
  command.run(parser, argv, _evaluate)


def _evaluate(flags) -> None:
  for measure in flags.measure:
    if measure not in MEASURES:
      raise unknown("measure", measure, MEASURES)
  if flags.pictures < 2:
    raise UserError(f"--pictures={flags.pictures}: use 2 or more, so that captions can be shuffled")
  command.set_up_jax()
  from t2i_jax.pipeline import Pipeline
  from t2i_jax.sample import sampling_options

  pipeline = Pipeline.load(flags.export, guide=flags.guide)
  config = pipeline.config
  with config.unlocked():
    set_data_options(config, flags.data_option)
  splits = flags.split or assembly.held_out_splits(config)
  for split in splits:
    if split not in data.splits(config.data.name):
      raise unknown("split", split, data.splits(config.data.name))
  measures = flags.measure or _possible(pipeline)
  if not measures:
    raise UserError(f"nothing to measure: system {config.system} has no evaluation loss, and data "
                    f"set {config.data.name} no verifier")
  results = {"export": str(flags.export), "step": pipeline.step, "seed": flags.seed, "splits": {}}
  for split in splits:
    found = results["splits"].setdefault(split, {})
    if "loss" in measures:
      found["loss"] = held_out_loss(pipeline, split, flags.batch_size)
      print(", ".join(f"{k} {v:.5g}" for k, v in found["loss"].items()))
    if "score" in measures:
      options = sampling_options(flags, pipeline)
      found["score"] = score(
        pipeline, split, flags.pictures, flags.seed, options, flags.batch_size, flags.output
      )
      print(table(split, found["score"]))
  if flags.output:
    folder = epath.Path(flags.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps(results, indent=2) + "\n")


def _possible(pipeline) -> list[str]:
  from t2i_jax.systems import base

  possible = []
  if isinstance(pipeline.system, base.Evaluated):
    possible.append("loss")
  if data.verifier(pipeline.config.data.name) and isinstance(pipeline.system, base.Sampler):
    try:
      check_judged(pipeline.config, pipeline.system, 2)
      possible.append("score")
    except UserError as error:
      print(f"warning: no score: {error}", file=sys.stderr)
  return possible


def set_data_options(config, pairs: list[str]) -> None:
  """Sets options of the config's data set from texts "NAME=VALUE"; UserError for a bad one."""
  from t2i_jax import config as configs

  defaults = data.default_options(config.data.name)
  for text in pairs:
    name, equals, value = text.partition("=")
    if not equals or name not in defaults:
      raise unknown(f"option of data set '{config.data.name}'", name, defaults)
    config.data.options[name] = configs.typed(f"data option {name}", value, defaults[name])


def held_out_loss(pipeline, split: str, batch_size: int) -> dict[str, float]:
  """Means of the system's evaluation loss over a whole split (at most 64 batches)."""
  from t2i_jax.hooks import HeldOutLoss
  from t2i_jax.parallel.mesh import batch_shards

  source = assembly.open_data(pipeline.config, split, assembly.resolution_of(pipeline.system))
  shards = batch_shards(pipeline.mesh)
  size = -(-batch_size // shards) * shards
  measure = HeldOutLoss(
    pipeline.system, source, caches.ReadText(pipeline.tokenizers), pipeline.mesh, size, 64,
    0, split, None,
  )
  return measure.measure(pipeline.variables)


def score(pipeline, split: str, pictures: int, seed: int, options: dict, batch_size: int = 64,
          output: str = "") -> dict[str, object]:
  """Draws the first captions of a split and asks the data set's verifier.

  Args:
    pipeline: draws.
    split, pictures: whose first captions, and how many.
    seed, options, batch_size: of the drawing.
    output: folder for a grid of the first 64 pictures; none if empty.

  Returns:
    `right`: fraction by attribute for the captions; `shuffled`: the same when
    each picture is judged by another one's caption; `pictures`, and
      `captions`, how many of theirs differ; `options`;
    `seconds_a_picture`, compilation included.

  Raises:
    UserError: for a data set without a verifier.
  """
  config = pipeline.config
  verify = data.verifier(config.data.name)
  if verify is None:
    raise UserError(f"data set '{config.data.name}' has no verifier, so --measure=score cannot be "
                    "had; use --measure=loss")
  check_judged(config, pipeline.system, pictures)
  source = assembly.open_data(config, split, assembly.resolution_of(pipeline.system))
  captions = source.fetch(np.arange(pictures) % len(source), np.arange(pictures, dtype=np.uint64)
                          ).captions
  started = time.monotonic()

  def progress(done: int) -> None:
    print(f"  {split}: {done}/{pictures} pictures drawn", file=sys.stderr)

  drawn = pipeline(captions, seed, batch_size=batch_size, progress=progress, **options)
  seconds = time.monotonic() - started
  if output:
    from t2i_jax.training.grids import prompt_grid, save_picture

    grid = prompt_grid(drawn[:64], captions[:64])
    save_picture(epath.Path(output).expanduser() / f"{split}.png", grid)
  return {
    "right": _fractions(verify(drawn, captions)),
    "shuffled": _fractions(verify(drawn, derangement(captions))),
    "pictures": pictures,
    "captions": len(set(captions)),
    "options": options,
    "seconds_a_picture": seconds / pictures,
  }


def check_judged(config, system, pictures: int) -> None:
  """Raises UserError where the data set's verifier would refuse what the system draws."""
  if pictures < 2:
    raise UserError(f"pictures={pictures}: judge 2 or more, so that captions can be shuffled")
  side = assembly.resolution_of(system)
  source = assembly.open_data(config, assembly.held_out_splits(config)[0], side)
  captions = source.fetch(np.zeros(1, int), np.zeros(1, np.uint64)).captions
  data.verifier(config.data.name)(np.zeros((1, side, side, 3), np.uint8), captions)


def derangement(captions: list[str]) -> list[str]:
  """Captions shuffled, fixed for their number, so that none stays in its place."""
  order = np.random.default_rng(0).permutation(len(captions))
  shuffled = [""] * len(captions)
  for here, there in zip(order, np.roll(order, 1), strict=True):
    shuffled[here] = captions[there]
  return shuffled


def _fractions(verdict: dict[str, np.ndarray]) -> dict[str, float]:
  return {name: float(np.mean(verdict[name])) for name in data.ATTRIBUTES}


def table(split: str, result: dict) -> str:
  """A split's scores as text."""
  width = max(len(name) for name in data.ATTRIBUTES) + 2
  options = ", ".join(f"{k}={v}" for k, v in result["options"].items()) or "defaults"
  lines = [
    f"{split}: {result['pictures']} pictures of {result['captions']} captions ({options}; "
    f"{result['seconds_a_picture']:.3f} s a picture)",
    f"  {'':{width}}{'captions':>10}{'shuffled':>10}",
  ]
  for name in data.ATTRIBUTES:
    right, shuffled = result["right"][name], result["shuffled"][name]
    lines.append(f"  {name:{width}}{right:>10.1%}{shuffled:>10.1%}")
  return "\n".join(lines)


if __name__ == "__main__":
  main()
