"""Scores of what was drawn, each with all that it depends on."""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from t2i_jax import batch_spec
from t2i_jax.data.base import Source, digest_of
from t2i_jax.errors import UserError, unknown
from t2i_jax.evaluation import verifier
from t2i_jax.evaluation.drawing import PICTURES, Progress, Stopped
from t2i_jax.evaluation.folder import Shards
from t2i_jax.evaluation.prompt_sets import PromptSet, pictures_of
from t2i_jax.metrics.reference import Reference
from t2i_jax.metrics.registry import METRICS, Networks, make
from t2i_jax.metrics.scores import Result, Scores, Seen
from t2i_jax.parallel.distributed import agree_any, broadcast_bytes, is_primary

# Beginnings of results that are better when they are lower, and that are neither way.
DISTANCES = ("fid", "fd_", "rfid", "rfd_", "kid", "kd_", "cmmd", "lpips_distance",
             "feature_net_distance")  # fmt: skip
NEITHER = ("latent_",)
MEANS = ("clip_score", "clip_cosine")  # metrics that are means over pictures, of a category too
SAVE_SECONDS = 30.0  # between two savings of what is kept of the pictures
LOSS, VERIFIER = "loss", "verifier"
OF_RECONSTRUCTIONS = ("psnr", "ssim", "latents")  # where nothing else is asked for
OWN = {
  LOSS: "the system's loss on the split",
  VERIFIER: "share of pictures that the data set's verifier finds right",
}


def listing() -> str:
  """All metrics, and the networks that they need, as a text."""
  lines = ["metrics:"]
  for name, line in OWN.items():
    lines.append(f"  {name:28} {line}")
  for name, entry in METRICS.items():
    network = f" [--network={entry.network}=FILE]" if entry.network else ""
    lines.append(f"  {name:28} {entry.line}{network}")
  return "\n".join(lines)


def check_known(names: Sequence[str]) -> None:
  """Raises UserError for a metric that does not exist."""
  for name in names:
    if name not in OWN and name not in METRICS:
      raise unknown("metric", name, [*OWN, *METRICS])


def check_names(names: Sequence[str], each: int, reconstructs: bool = False) -> None:
  """Raises UserError for a metric that does not exist, or that the pictures cannot have.

  Args:
    names: of the metrics.
    each: pictures of a prompt.
    reconstructs: whether they are reconstructions, not drawn.
  """
  check_known(names)
  for name in names:
    needs = METRICS[name].needs if name in METRICS else ()
    if reconstructs:
      if lacking := {"repeats", "codes"} & set(needs):
        what = "several pictures of a caption" if "repeats" in lacking else "a tokenizer's codes"
        raise UserError(f"{name} needs {what}, and a first stage gives one reconstruction of each "
                        "picture; choose another metric")
      continue
    if set(needs) & {"originals", "codes", "latents"}:
      raise UserError(f"{name} compares a picture with what it was made of, and drawn pictures "
                      "were made of text; choose another metric, or --export a first stage")
    if "repeats" in needs and each < 2:
      raise UserError(f"{name} compares pictures of the same prompt; draw several with --each=2 or "
                      "more")


def size_of(options: Mapping[str, Any], system: Any) -> tuple[int, int]:
  """Height and width of the pictures that a system draws with these options."""
  side = batch_spec.resolution_of(system)
  return tuple(options.get(name) or side for name in ("height", "width"))


def check_measurable(scores: Scores, size: tuple[int, int], prompts: PromptSet) -> None:
  """Raises UserError where pictures (height, width) of these prompts are too few or too small."""
  scores.check(size)
  for metric in scores.metrics.values():
    if prompts.total < metric.least:
      raise UserError(f"{metric.name} needs at least {metric.least} pictures, and {prompts.name} "
                      f"gives {prompts.total}; draw more with --pictures, or leave it out")


def measured(
  names: Sequence[str], prompts: PromptSet, shards: Shards, networks: Networks,
  references: Mapping[str, Reference], seed: int, stop: Callable[[], bool], progress: Progress,
  originals: Source | None = None,
) -> tuple[dict[str, Result], Scores | None]:
  """What the metrics of `METRICS` say of drawn pictures, or of reconstructions of `originals`.

  Pictures are measured in their order, and what is kept of them is stored every so often and read
  back exactly, so that an interrupted command's numbers are those of one that was not.

  Returns:
    The results by name, and what was kept of the pictures; None where nothing is measured.

  Raises:
    UserError: a network or reference is missing or another one, or there are too few pictures.
    Stopped: `stop` said so.
  """
  if not names:
    return {}, None
  scores = make(names, networks, references, seed)
  key = digest_of(json.dumps(scores.identity, sort_keys=True))[:12]
  path = shards.folder / f"state_{key}.npz"
  if broadcast_bytes(b"1" if path.exists() else b"0") == b"1" and not _restored(scores, path):
    scores = make(names, networks, references, seed)
  captions = prompts.captions
  progress.begin(shards.total, scores.n)
  saved = time.monotonic()
  for shard in range(len(shards)):
    rows = shards.rows(shard)
    if rows.start < scores.n:
      continue  # a state is always of whole shards
    kept, index = shards.read(PICTURES, shard), np.array(rows)
    compared = originals is not None and "originals" in scores.needs
    scores.update(
      kept["images"], index, captions[rows.start : rows.stop],
      pictures_of(originals, index, shards.total) if compared else None,
      latents=kept.get("latents"),
    )
    progress.add(len(rows))
    stopping = agree_any(stop())
    last = rows.stop == shards.total
    if is_primary() and (stopping or last or time.monotonic() - saved > SAVE_SECONDS):
      scores.save(path)
      saved = time.monotonic()
    if stopping and not last:
      raise Stopped
  progress.end()
  return scores.results(), scores


def _restored(scores: Scores, path: epath.Path) -> bool:
  """Whether what was kept could be read, on all processes; the pictures are there to be measured
  again."""
  try:
    scores.restore(path)
    failed = ""
  except UserError as error:
    failed = str(error)
  if agree_any(bool(failed)):
    if is_primary():
      print(f"warning: {failed or path}; the pictures are measured again", file=sys.stderr)
    return False
  return True


def as_json(name: str, result: Result, reconstruction: str = "") -> dict[str, Any]:
  """A result for `scores.json`; `reconstruction` says of what it is one, if it is."""
  if reconstruction:
    about = {**result.about, "reconstruction": reconstruction}
    result = dataclasses.replace(result, about=about)
  described = result.described()
  better = "lower" if name.startswith(DISTANCES) else "higher"
  return {
    "value": described["value"], "n": result.n, "deviation": described.get("deviation"),
    "better": "" if name.startswith(NEITHER) else better, "about": dict(result.about),
    "remarks": list(result.remarks), "line": result.line(),
  }


def judged(config: Any, prompts: PromptSet, shards: Shards) -> tuple[dict[str, Any], np.ndarray]:
  """The verifier's score as JSON, and whether each picture is right [n].

  Args:
    config: whose data set judges.
    prompts, shards: of the pictures.
  """
  found = verifier.judge(config, shards.pictures(), prompts.captions)
  value, name = found["right"]["all"], config.data.name
  about = {"data_set": name, "right": found["right"], "shuffled": found["shuffled"]}
  line = (f"{VERIFIER} {value:.1%} ({shards.total} pictures right in everything by the verifier of "
          f"{name}; {found['shuffled']['all']:.1%} with the captions shuffled)")
  return {**_plain(value, shards.total, "higher", line), "about": about}, found["each"]["all"]


def loss_results(losses: Mapping[str, float], split: str) -> dict[str, dict[str, Any]]:
  """Held-out losses by name as JSON."""
  return {
    f"loss/{name}": _plain(
      value, None, "", f"loss/{name} {value:.5g} (held-out pictures of {split}, the same rows, "
      "noise and times each time)",
    )
    for name, value in losses.items()
  }


def _plain(value: float, n: int | None, better: str, line: str) -> dict[str, Any]:
  value = value if math.isfinite(value) else str(value)  # JSON has no word for what is no number
  return {"value": value, "n": n, "deviation": None, "better": better, "about": {}, "remarks": [],
          "line": line}


def by_category(
  prompts: PromptSet, scores: Scores | None, values: Mapping[str, np.ndarray]
) -> dict[str, dict[str, dict[str, float]]]:
  """Means over the categories of a file's prompts: `{column: {category: {"n", metric: mean}}}`.

  Args:
    prompts: of the pictures.
    scores: what `measured` kept of them, in their order.
    values: by picture [n], of other metrics.
  """
  metrics = [m for name, m in scores.metrics.items() if name in MEANS] if scores else []
  if not metrics and not values:
    return {}
  captions = prompts.captions

  def means(rows: np.ndarray) -> dict[str, float]:
    seen = Seen(len(rows), rows, rows, tuple(captions[i] for i in rows))
    found = {result.name: result.value for metric in metrics for result in metric.compute(seen)}
    return {"n": len(rows), **found, **{k: float(np.mean(v[rows])) for k, v in values.items()}}

  return {
    column: {category: means(rows) for category, rows in groups.items()}
    for column, groups in prompts.groups().items()
  }
