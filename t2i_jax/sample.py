"""`python -m t2i_jax.sample --export=DIR --prompt=...`: draws pictures from an export."""

import re
import sys
from pathlib import Path

import numpy as np

from t2i_jax import command
from t2i_jax.errors import UserError
from t2i_jax.prompts import read_prompts

GRID = 256  # pictures that the grid has at most
COMMON = ("guidance", "steps", "solver")
STRENGTH = 0.7  # of a picture to begin with


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.sample",
    "Draws pictures for prompts from an export: a PNG a picture, and a grid with the prompts.\n"
    "Nothing but the export's folder is needed. The same seed, prompt and options give the same\n"
    "picture on one device or many.",
    "python -m t2i_jax.sample --export=runs/quickstart/export --prompt='a small red ring at the "
    "top'",
    "python -m t2i_jax.sample --export=DIR --prompt='a dog' --count=8 --seed=3 --guidance=4 "
    "--steps=30",
    "python -m t2i_jax.sample --export=DIR --prompts=prompts.txt --output=pictures "
    "--option=eta=0.5",
    "python -m t2i_jax.sample --export=DIR --prompt='a dog' --image=cat.png --mask=head.png "
    "--negative='a cat'",
    "python -m t2i_jax.sample --export=DIR --guide=runs/semantic/export --guide-image=cat.png "
    "--guide-weight=style=50 --count=8",
  )
  add_export_flags(parser)
  parser.add_argument("--offload-text", action="store_true",
                      help="keep a frozen text encoder off the devices while pictures are drawn")
  parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
  parser.add_argument("--prompts", metavar="FILE",
                      help="a text file with a prompt on each line, or a .tsv or .jsonl file with "
                      "a column of prompts, such as PartiPrompts' or GenEval's")
  parser.add_argument("--negative", default="", metavar="PROMPT",
                      help="what guidance is to lead away from, in place of the empty text")
  parser.add_argument("--image", metavar="FILE",
                      help="a picture to begin with; --option=strength=S draws it anew by the "
                      f"share S of the steps (all with a mask, {STRENGTH} without)")
  parser.add_argument("--mask", metavar="FILE",
                      help="of the picture: white is drawn anew, black stays")
  parser.add_argument("--guide-image", metavar="FILE",
                      help="a picture that semantic guidance leads to; --prompt may then be left "
                      "out")
  parser.add_argument("--guide-weight", action="append", default=[], metavar="KIND=WEIGHT",
                      help="how much semantic guidance leads to the prompt (text) and to the "
                      "picture's meaning (semantic), style and content; may be repeated")
  parser.add_argument("--count", type=int, default=1, help="pictures a prompt (1)")
  parser.add_argument("--output", default="samples", help="folder to write to (samples)")
  command.run(parser, argv, _sample)


def add_export_flags(parser, several: bool = False) -> None:
  """Flags of every command that draws from an export, or from `several`."""
  if several:
    parser.add_argument("--export", action="append", required=True, metavar="[NAME=]DIR",
                        help="an export's folder; repeated, to compare several")
  else:
    parser.add_argument("--export", required=True, help="the export's folder")
  parser.add_argument("--guide", default="", metavar="EXPORT",
                      help="another export, which steers the sampler: a noisy classifier, or "
                      "semantic guidance")
  parser.add_argument("--seed", type=int, default=0, help="of the pictures (0)")
  parser.add_argument("--batch-size", type=int, default=64, help="pictures drawn at a time (64)")
  for name in COMMON:
    parser.add_argument(f"--{name}", help=f"the sampler's {name}, if it has one")
  parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE",
                      help="another option of the system's sampler; may be repeated")


def sampling_options(flags, config, system) -> dict[str, object]:
  """The sampler's options from an export's config, with those that the flags give.

  Raises:
    UserError: for an option that the system does not have, a value of another
      type, or a guide's scale where there is no guide.
  """
  import dataclasses

  from t2i_jax.errors import unknown
  from t2i_jax.systems.base import GUIDE
  from t2i_jax.values import typed

  options = config.sample.options.to_dict()
  given = [f"{name}={getattr(flags, name)}" for name in COMMON if getattr(flags, name) is not None]
  defaults = {f.name: f.default for f in dataclasses.fields(system.Options)}
  for text in given + flags.option:
    name, equals, value = text.partition("=")
    if not equals:
      raise UserError(f"--option={text} is not NAME=VALUE")
    if name not in defaults:
      raise unknown(f"sampling option of {config.system}", name, defaults)
    if name == "guide_scale" and GUIDE not in getattr(system, "components", {}):
      raise UserError(f"--option={text} is of a guide, and there is none; name one, --guide=EXPORT")
    options[name] = typed(f"sampling option {name}", value, defaults[name])
  return options


def _sample(flags) -> None:
  prompts = _prompts(flags)
  if flags.count < 1:
    raise UserError(f"--count={flags.count} draws nothing; use 1 or more")
  command.set_up_jax()
  from t2i_jax.pipeline import Pipeline
  from t2i_jax.training.grids import prompt_grid, save_picture

  pipeline = Pipeline.load(
    flags.export, offload_text=flags.offload_text, guide=flags.guide
  )
  options = sampling_options(flags, pipeline.config, pipeline.system)
  image, known = _beginning(flags, pipeline.system, options)
  guide = _leading(flags, pipeline.system)
  output = Path(flags.output).expanduser()
  output.mkdir(parents=True, exist_ok=True)
  for line in pipeline.truncated(prompts):
    print(f"warning: {line}", file=sys.stderr)
  repeated = [prompt for prompt in prompts for _ in range(flags.count)]
  from tqdm import tqdm

  first, done = [], 0
  with tqdm(total=len(repeated), unit="picture", disable=not sys.stderr.isatty()) as bar:
    # Each batch is on the disk before the next is drawn.
    for drawn in pipeline.batches(
      repeated, flags.seed, batch_size=flags.batch_size, negative=flags.negative, image=image,
      known=known, **guide, **options,
    ):  # fmt: skip
      for picture in drawn:
        save_picture(output / f"{done:05d}_{_slug(repeated[done])}.png", picture)
        done += 1
      first += list(drawn[: GRID - len(first)])
      bar.update(len(drawn))
  save_picture(output / "grid.png", prompt_grid(np.stack(first), repeated[: len(first)]))
  print(f"{len(repeated)} pictures and grid.png in {output}")


def _beginning(flags, system, options) -> tuple[np.ndarray | None, np.ndarray | None]:
  """The picture to begin with, and where it is to stay; sets its strength if nothing does."""
  if not flags.image:
    if flags.mask:
      raise UserError(f"--mask={flags.mask} is of a picture to begin with; give --image too")
    return None, None
  from t2i_jax.systems.capabilities import Editor, require

  require(system, Editor, "--image")
  height, width = (options.get(side) or system.resolution for side in ("height", "width"))
  if height != width:
    raise UserError(f"--image is cropped to a square, and {height} x {width} are to be drawn; make "
                    "height and width the same")
  image = _decoded(flags.image, height)
  known = _decoded(flags.mask, height).mean(axis=-1) < 128 if flags.mask else None
  if known is None and not any(text.startswith("strength=") for text in flags.option):
    options["strength"] = STRENGTH
  return image, known


def _leading(flags, system) -> dict[str, object]:
  """What `Pipeline.batches` is told of the guide's picture and weights."""
  from t2i_jax import guiding
  from t2i_jax.values import typed

  weights = {}
  for text in flags.guide_weight:
    kind, equals, value = text.partition("=")
    if not equals:
      raise UserError(f"--guide-weight={text} is not KIND=WEIGHT")
    weights[kind] = typed(f"--guide-weight={kind}", value, 0.0)
  if not flags.guide_image and not weights:
    return {}
  if not (flags.prompt or flags.prompts):
    weights.setdefault("text", 0.0)  # the empty prompt leads nowhere
  side = guiding.picture_guide(system).resolution
  image = _decoded(flags.guide_image, side) if flags.guide_image else None
  return {"guide_image": image, "guide_weights": weights}


def _decoded(file: str, side: int) -> np.ndarray:
  """A picture, uint8 [side, side, 3]."""
  from t2i_jax.data.images import BadImage, decode

  try:
    return decode(file, side)
  except BadImage as error:
    raise UserError(f"{error}; give a picture such as a PNG or JPEG") from error


def _prompts(flags) -> list[str]:
  prompts = list(flags.prompt)
  if flags.prompts:
    prompts += [prompt.text for prompt in read_prompts(flags.prompts)]
  if not prompts and flags.guide_image:
    return [""]
  if not prompts:
    raise UserError("no prompts: give --prompt='...' or --prompts=FILE with a prompt on each line")
  for prompt in prompts:
    if any("\ud800" <= character <= "\udfff" for character in prompt):
      raise UserError(f"--prompt={ascii(prompt)} is not UTF-8 text; check the terminal's encoding")
  return prompts


def _slug(prompt: str) -> str:
  return re.sub(r"\W+", "-", prompt.lower()).strip("-")[:48]


if __name__ == "__main__":
  main()
