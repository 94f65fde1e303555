"""Metrics of a run's own pictures: at their own cadence while it trains, and at its end."""

import sys
import time
from collections.abc import Callable
from typing import Any

from etils import epath
from jax.sharding import Mesh

from t2i_jax import batch_spec, data, run_data
from t2i_jax.errors import UserError
from t2i_jax.evaluation import prompt_sets, references, scoring, verifier
from t2i_jax.evaluation.scoring import OWN, VERIFIER
from t2i_jax.metrics.registry import make
from t2i_jax.parallel.distributed import is_primary
from t2i_jax.pipeline import Pipeline
from t2i_jax.training.grids import prompt_grid, save_picture
from t2i_jax.training.state import State
from t2i_jax.training.writers import Writers

BATCH = 64  # pictures drawn and measured at a time


class RunScores:
  """Draws the first captions of a run's splits and measures the pictures, always the same way.

  The networks and the references are read and measured when it is made, so that what is wrong is
  found before anything is trained. Pictures come from `sample.seed` and `sample.options`.

  Attributes:
    splits: on which it measures.
  """

  def __init__(self, config: Any, pipeline: Pipeline, mesh: Mesh, workdir: epath.Path,
               alive: Callable[[], None] = lambda: None):
    """`alive` is called now and then while pictures are drawn and measured."""
    self.splits = run_data.held_out_splits(config)
    self._config, self._pipeline, self._workdir = config, pipeline, workdir
    self._alive = alive
    self._names = [name for name in config.evaluate.metrics if name not in OWN]
    self._last: tuple[int, dict[str, Any]] | None = None
    scoring.check_names(config.evaluate.metrics, 1)
    pictures, side = config.evaluate.pictures, batch_spec.resolution_of(pipeline.system)
    if scoring.LOSS in config.evaluate.metrics:
      raise UserError("evaluate.metrics has 'loss', which evaluate.every measures; leave it out")
    self._judges = data.verifier(config.data.name) is not None
    if self._judges or VERIFIER in config.evaluate.metrics:
      try:
        verifier.check_judged(config, pipeline.system, pictures)
      except UserError as error:
        if not self._names or VERIFIER in config.evaluate.metrics or pictures < 2:
          raise
        self._judges = False  # nobody has asked for it by name
        print(f"warning: no score of the verifier: {error}", file=sys.stderr)
    if not self._judges and pictures < 2:
      raise UserError(f"evaluate.pictures={pictures}: draw 2 or more to measure")
    self._sources = prompt_sets.Sources(config)
    from t2i_jax.feature_networks import Networks  # it reads every kind of file: not always needed

    self._networks = Networks(dict(config.evaluate.networks), mesh, min(BATCH, pictures))
    compared = references.References((), pictures, self._networks, BATCH, workdir)
    self._references = {
      split: compared.of(self._names, self._sources, split, side) for split in self.splits
    }
    size = scoring.size_of(config.sample.options, pipeline.system)
    for split in self.splits:
      self._scores(split).check(size)

  def _scores(self, split: str):
    seed = self._config.sample.seed
    return make(self._names, self._networks, self._references[split], seed)

  def measure(self, step: int, variables: Any, grids: bool = False) -> dict[str, dict[str, Any]]:
    """Scores by split: what `verifier.scored` gives where there is one, and `results` as JSON.

    Args:
      step: of the run; the same step is drawn once.
      variables: of the system.
      grids: write a grid of each split's pictures into `scores/`.
    """
    if self._last is None or self._last[0] != step:
      self._last = (step, {split: self._of(split, variables) for split in self.splits})
    found = self._last[1]
    if grids and is_primary():
      for split, (_, drawn, captions) in found.items():
        grid = prompt_grid(drawn[:64], captions[:64])
        save_picture(self._workdir / "scores" / f"{split}.png", grid)
    return {split: scores for split, (scores, _, _) in found.items()}

  def _of(self, split: str, variables: Any):
    config, pictures = self._config, self._config.evaluate.pictures
    source = self._sources.of(split, batch_spec.resolution_of(self._pipeline.system))
    captions = prompt_sets.of_split(source, split, pictures, 1).captions
    options, started = config.sample.options.to_dict(), time.monotonic()
    drawn = self._pipeline(
      captions, config.sample.seed, variables=variables, batch_size=BATCH,
      progress=lambda done: self._alive(), **options
    )
    found: dict[str, Any] = {"pictures": pictures, "options": options}
    if self._judges:
      found = verifier.scored(config, drawn, captions, options, time.monotonic() - started)
    scores = self._scores(split)
    if self._names:
      for start in range(0, pictures, BATCH):
        stop = min(start + BATCH, pictures)
        scores.update(drawn[start:stop], captions=captions[start:stop])
        self._alive()
      found["results"] = {name: scoring.as_json(name, r) for name, r in scores.results().items()}
    return found, drawn, captions


class MeasurePictures:
  """`RunScores` as a hook of the loop: scores of the averaged parameters, as `split/metric`."""

  name = "scores"

  def __init__(self, scores: RunScores, every: int, writers: Writers):
    self.every = every
    self._scores, self._writers = scores, writers

  def __call__(self, step: int, state: State) -> None:
    values = {}
    for split, found in self._scores.measure(step, state.variables(ema=True)).items():
      if "right" in found:
        values |= {f"{split}/right/{name}": share for name, share in found["right"].items()}
      values |= {f"{split}/{name}": float(result["value"])  # of a text, where it is no number
                 for name, result in found.get("results", {}).items()}
    self._writers.scalars(step, values)


def lines(split: str, found: dict[str, Any]) -> str:
  """A split's scores as text."""
  parts = [verifier.table(verifier.title(split, found), found)] if "right" in found else [split]
  parts += [f"  {result['line']}" for result in found.get("results", {}).values()]
  return "\n".join(parts)
