"""How many drawn pictures are right for their captions, by the data set's verifier."""

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from t2i_jax import batch_spec, data, run_data
from t2i_jax.errors import UserError
from t2i_jax.evaluation.prompt_sets import of_split


def judge(config: Any, pictures: Iterable[np.ndarray], captions: list[str]) -> dict[str, Any]:
  """Asks the data set's verifier of pictures for their captions, and for another one's each.

  Args:
    config: of the run, whose data set it is.
    pictures: uint8 [n, H, W, 3] each, as many as captions in all.
    captions: of the pictures, in order.

  Returns:
    `right`: fraction by attribute for the captions; `shuffled`: the same when each picture is
    judged by another one's caption; `each`: {attribute: bool [n]} for the captions.
  """
  verify = _verifier(config)
  others = derangement(captions)
  right, wrong, start = [], [], 0
  for images in pictures:
    stop = start + len(images)
    right.append(verify(images, captions[start:stop]))
    wrong.append(verify(images, others[start:stop]))
    start = stop
  each, shuffled = (
    {name: np.concatenate([part[name] for part in parts]) for name in data.ATTRIBUTES}
    for parts in (right, wrong)
  )
  means = lambda found: {name: float(np.mean(found[name])) for name in data.ATTRIBUTES}  # noqa: E731
  return {"right": means(each), "shuffled": means(shuffled), "each": each}


def score(pipeline, split: str, pictures: int, seed: int, options: dict) -> dict[str, object]:
  """Draws the first captions of a split and asks the data set's verifier.

  Args:
    pipeline: draws.
    split, pictures: whose first captions, and how many.
    seed, options: of the drawing.

  Returns:
    `right`, `shuffled`: as of `judge`; `pictures`, and `captions`, how many of theirs differ;
    `options`; `seconds_a_picture`, compilation included.

  Raises:
    UserError: for a data set without a verifier.
  """
  check_judged(pipeline.config, pipeline.system, pictures)
  side = batch_spec.resolution_of(pipeline.system)
  captions = of_split(run_data.open_data(pipeline.config, split, side), split, pictures, 1).captions
  started = time.monotonic()
  drawn = pipeline(captions, seed, **options)
  seconds = time.monotonic() - started
  return scored(pipeline.config, drawn, captions, options, seconds)


def scored(
  config: Any, drawn: np.ndarray, captions: list[str], options: dict, seconds: float
) -> dict[str, object]:
  """What `score` returns, of pictures [n, H, W, 3] that took some seconds."""
  found = judge(config, [drawn], captions)
  return {
    "right": found["right"],
    "shuffled": found["shuffled"],
    "pictures": len(drawn),
    "captions": len(set(captions)),
    "options": options,
    "seconds_a_picture": seconds / len(drawn),
  }


def check_judged(config, system, pictures: int) -> None:
  """Raises UserError where the data set's verifier would refuse what the system draws."""
  if pictures < 2:
    raise UserError(f"pictures={pictures}: judge 2 or more, so that captions can be shuffled")
  side = batch_spec.resolution_of(system)
  verify = _verifier(config)
  source = run_data.open_data(config, run_data.held_out_splits(config)[0], side)
  captions = source.fetch(np.zeros(1, int), np.zeros(1, np.uint64)).captions
  verify(np.zeros((1, side, side, 3), np.uint8), captions)


def _verifier(config):
  verify = data.verifier(config.data.name)
  if verify is None:
    raise UserError(f"data set '{config.data.name}' has no verifier, so there is no metric "
                    f"'verifier' on it; those that have: {', '.join(data.VERIFIERS)}")
  return verify


def derangement(captions: list[str]) -> list[str]:
  """Captions shuffled, fixed for their number, so that none stays in its place."""
  order = np.random.default_rng(0).permutation(len(captions))
  shuffled = [""] * len(captions)
  for here, there in zip(order, np.roll(order, 1), strict=True):
    shuffled[here] = captions[there]
  return shuffled


def table(title: str, found: dict[str, Any]) -> str:
  """What `judge` found, as text."""
  width = max(len(name) for name in data.ATTRIBUTES) + 2
  lines = [title, f"  {'':{width}}{'captions':>10}{'shuffled':>10}"]
  for name in data.ATTRIBUTES:
    right, shuffled = found["right"][name], found["shuffled"][name]
    lines.append(f"  {name:{width}}{right:>10.1%}{shuffled:>10.1%}")
  return "\n".join(lines)


def title(split: str, found: dict[str, Any]) -> str:
  """What `score` found is of, in a line."""
  options = ", ".join(f"{k}={v}" for k, v in found["options"].items()) or "defaults"
  return (f"{split}: {found['pictures']} pictures of {found['captions']} captions ({options}; "
          f"{found['seconds_a_picture']:.3f} s a picture)")
