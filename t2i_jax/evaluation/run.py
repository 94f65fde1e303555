"""An evaluation from its flags to its report."""

import contextlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath
from jax.sharding import Mesh

from t2i_jax import batch_spec, data, run_data
from t2i_jax.data.base import digest_of
from t2i_jax.errors import UserError
from t2i_jax.evaluation import (
  drawing,
  folder,
  geneval,
  held_out,
  outcome,
  points,
  prompt_sets,
  references,
  scoring,
  verifier,
)  # fmt: skip
from t2i_jax.evaluation import flags as checks
from t2i_jax.evaluation.drawing import Progress
from t2i_jax.evaluation.folder import DRAWN, Shards
from t2i_jax.evaluation.points import Model, Point
from t2i_jax.evaluation.prompt_sets import PICTURES, PromptSet
from t2i_jax.evaluation.reconstructing import Reconstructor, described
from t2i_jax.evaluation.scoring import LOSS, OWN, VERIFIER
from t2i_jax.feature_networks import Networks
from t2i_jax.metrics.registry import make
from t2i_jax.parallel.distributed import is_primary
from t2i_jax.parallel.mesh import batch_shards, make_mesh
from t2i_jax.pipeline import Pipeline
from t2i_jax.sample import sampling_options
from t2i_jax.systems.capabilities import Evaluated, require
from t2i_jax.training.preemption import StopSignal, exit_stopped


def evaluate(flags: Any) -> None:
  """What `python -m t2i_jax.evaluate` does with its flags; see its help.

  Raises:
    UserError: for whatever the user can mend.
  """
  checks.check(flags)
  scoring.check_known(flags.metric)
  if flags.geneval:
    geneval.check_folder(flags.geneval)
  mesh = make_mesh({"data": -1})
  shards = batch_shards(mesh)
  models = points.read_models(flags.export, flags.guide, flags.resolution or 0)
  checks.check_kinds(flags, models)
  scoring.check_names(flags.metric, flags.each, models[0].reconstructs)
  config = models[0].config  # whose data set all exports are asked about
  prompt_sets.set_data(config, flags.data, flags.data_option)
  networks = Networks(checks.named_paths(flags.network), mesh, flags.batch_size, flags.resize)
  sources = prompt_sets.Sources(config)
  sets = _prompt_sets(flags, config, models[0], sources)
  metrics = flags.metric or _possible(flags, config, models)
  for model in models if LOSS in metrics else ():
    require(model.system, Evaluated, "the metric 'loss'")
  if VERIFIER in metrics:
    for model in models:
      verifier.check_judged(config, model.system, flags.pictures or 2)
  if models[0].reconstructs:
    at = [Point(model, {}, {}) for model in models]
  else:
    at = points.read_points(
      models, [sampling_options(flags, m.config, m.system) for m in models], flags.sweep
    )
    at = points.check_points(at, mesh, _warn)
    _warn_of_cut_prompts(models, sets)

  targets = geneval.targets(flags.geneval, [point.label for point in at], sets[0])
  drawn = [name for name in metrics if name not in OWN]
  with _folder(flags, at, sets, sources, shards) as (path, kept):
    compared = references.References(
      flags.reference, flags.reference_pictures or max(s.total for s in sets), networks,
      flags.batch_size, path,
    )
    by_point = {
      (model.name, prompts.name): compared.of(
        drawn, sources, prompts.split, batch_spec.resolution_of(model.system)
      )
      for model in models for prompts in sets
    }
    for point in at:
      size = scoring.size_of(point.options, point.model.system)
      for prompts in sets:
        scores = make(drawn, networks, by_point[point.model.name, prompts.name])
        scoring.check_measurable(scores, size, prompts)
    if flags.save_reference:
      _save_reference(flags, by_point)
    if flags.reference_only:
      return
    rows = []
    with _stopping(kept) as stop:
      try:
        for model in models:
          own = [point for point in at if point.model is model]
          rows += _measure(flags, mesh, model, own, sets, metrics, networks, by_point, sources,
                           path, stop)
      except drawing.Stopped:
        _warn(f"stopped as asked; what was done is in {path}, and the same command goes on from "
              "there")
        exit_stopped()
        return
    if is_primary():
      outcome.show(rows, sets, path, kept, sources)
      if flags.geneval:
        _write_geneval(targets, at, sets[0], path, flags.batch_size, shards)


def _prompt_sets(flags, config, model: Model, sources: prompt_sets.Sources) -> list[PromptSet]:
  if flags.prompts:
    prompts = prompt_sets.of_file(flags.prompts, flags.pictures, flags.each)
    if flags.geneval:
      geneval.check(prompts)
    return [prompts]
  splits = list(dict.fromkeys(flags.split)) or run_data.held_out_splits(config)
  prompt_sets.check_splits(config.data.name, splits)
  side = batch_spec.resolution_of(model.system)
  sets = []
  for split in splits:
    source, pictures = sources.of(split, side), flags.pictures or PICTURES
    # A caption may be drawn again with other noise; a picture comes back the same.
    if model.reconstructs and not source.infinite and pictures > len(source):
      if flags.pictures:
        raise UserError(f"--pictures={pictures}: split '{split}' has {len(source)}; take fewer, or "
                        "another --split")
      pictures = len(source)
    sets.append(prompt_sets.of_split(source, split, pictures, flags.each))
  return sets


def _possible(flags, config, models: Sequence[Model]) -> list[str]:
  """What is measured where nothing is asked for: the loss and the verifier's score."""
  if flags.prompts:
    if not flags.output and not flags.geneval:
      raise UserError("pictures of --prompts would neither be measured nor kept; give --metric, "
                      "--output or --geneval")
    return []
  if models[0].reconstructs:
    return list(scoring.OF_RECONSTRUCTIONS)
  possible = []
  if all(isinstance(model.system, Evaluated) for model in models):
    possible.append(LOSS)
  if data.verifier(config.data.name):
    try:
      for model in models:
        verifier.check_judged(config, model.system, 2)
      possible.append(VERIFIER)
    except UserError as error:
      _warn(f"warning: no score of the verifier: {error}")
  if not possible:
    raise UserError(f"nothing to measure: system {models[0].config.system} has no evaluation loss, "
                    f"and data set {config.data.name} no verifier; name metrics with --metric")
  return possible


def _warn_of_cut_prompts(models: Sequence[Model], sets: Sequence[PromptSet]) -> None:
  for model in models:
    texts = [prompt.text for prompts in sets for prompt in prompts.prompts]
    cut = [line for text in texts if (line := model.exported.tokenizers.truncated(text))]
    if cut:
      _warn(f"warning: {len(cut)} of {len(texts)} prompts are cut for {model.name}: {cut[0]}")


@contextlib.contextmanager
def _folder(
  flags, at: Sequence[Point], sets: Sequence[PromptSet], sources: prompt_sets.Sources, shards: int
) -> Iterator[tuple[epath.Path, bool]]:
  """The folder that everything goes to, and whether it is kept."""
  identity = {
    "seed": flags.seed,
    "prompts": {s.name: {"each": s.each, "pictures": s.total, "digest": s.digest} for s in sets},
    "batch_size": {s.name: _size(s, flags.batch_size, shards) for s in sets},
    "exports": {p.model.name: {"hash": p.model.digest, "step": p.model.exported.step} for p in at},
    "points": {point.label: point.options for point in at},
  }
  if at[0].model.reconstructs:
    sides = sorted({batch_spec.resolution_of(point.model.system) for point in at})
    identity["data"] = {
      "name": sources.config.data.name,
      "options": json.loads(sources.config.data.options.to_json_best_effort()),
      "resolutions": sides,
      "digests": {s.name: sources.of(s.split, sides[0]).digest() for s in sets},
    }
  if flags.output:
    with folder.opened(flags.output, identity) as path:
      yield path, True
    return
  path = folder.temporary()
  try:
    with folder.opened(path, identity) as opened:
      yield opened, False
  finally:
    shutil.rmtree(epath.Path(path).parent, ignore_errors=True)


def _size(prompts: PromptSet, batch_size: int, shards: int) -> int:
  return -(-min(batch_size, prompts.total) // shards) * shards


@contextlib.contextmanager
def _stopping(kept: bool) -> Iterator[Callable[[], bool]]:
  """Whether to stop; where nothing is kept, signals end the command at once."""
  if not kept:
    yield lambda: False
    return
  with StopSignal() as signal:
    yield signal.requested


def _save_reference(flags, by_point: dict[tuple[str, str], dict]) -> None:
  every = [pair for part in by_point.values() for pair in part.items()]
  merged = dict(every)
  if not merged:
    raise UserError("--save-reference: none of the metrics compares with real pictures; name one "
                    "that does, such as --metric=fid or --metric=fd_feature_net")
  if len({reference.digest for _, reference in every}) > len(merged):
    raise UserError("--save-reference is for one split and one resolution; name one --split")
  for name in references.save(merged, flags.save_reference):
    _say(f"statistics of {next(iter(merged.values())).n} real pictures in {name}")


def _measure(
  flags, mesh: Mesh, model: Model, at: Sequence[Point], sets: Sequence[PromptSet],
  metrics: Sequence[str], networks: Networks, by_point, sources: prompt_sets.Sources,
  path: epath.Path, stop: Callable[[], bool],
) -> list[dict[str, Any]]:
  """Draws, or reconstructs, and scores all points of one export; the rows of the results."""
  made = Reconstructor(model, mesh) if model.reconstructs else Pipeline.load(
    model.path, guide=flags.guide
  )
  rows, side, shards = [], batch_spec.resolution_of(model.system), batch_shards(mesh)
  for prompts in sets:
    losses, originals = {}, None
    if LOSS in metrics:
      source = sources.of(prompts.split, side, bucketed=True)
      losses = held_out.held_out_loss(made, source, prompts.split, flags.batch_size)
    if model.reconstructs:
      originals = sources.of(prompts.split, side)
    for point in at:
      kept = _shards(path, point, prompts, flags.batch_size, shards)
      results = scoring.loss_results(losses, prompts.split)
      if metrics != [LOSS]:
        if model.reconstructs:
          batches, verb = drawing.of_split(
            made, originals, prompts.total, kept.size), "reconstructed"
        else:
          batches, verb = drawing.of_prompts(
            made, prompts, flags.seed, point.options, kept.size), "drawn"
        progress = Progress(f"{point.label}, {prompts.name}", verb)
        drawing.draw(batches, kept, stop, progress)
      values = {}
      if VERIFIER in metrics:
        results[VERIFIER], values[VERIFIER] = scoring.judged(sources.config, prompts, kept)
      found, scores = scoring.measured(
        [name for name in metrics if name not in OWN], prompts, kept, networks,
        by_point[model.name, prompts.name], flags.seed, stop,
        Progress(f"{point.label}, {prompts.name}", "measured"), originals,
      )
      how = described(model, sources.config, prompts.split) if originals else ""
      results |= {name: scoring.as_json(name, result, how) for name, result in found.items()}
      rows.append(outcome.row(
        point, prompts, kept, path, flags.seed, results,
        scoring.by_category(prompts, scores, values), how,
      ))
  return rows


def _shards(
  path: epath.Path, point: Point, prompts: PromptSet, batch_size: int, shards: int
) -> Shards:
  """Where a point's pictures of a set are; two labels may be alike as names of folders."""
  name = f"{folder.slug(point.label)}_{digest_of(point.label)[:6]}"
  return Shards(
    path / DRAWN / name / folder.slug(prompts.name), _size(prompts, batch_size, shards),
    prompts.total,
  )


def _write_geneval(
  targets: Sequence[epath.Path], at: Sequence[Point], prompts: PromptSet, path: epath.Path,
  batch_size: int, shards: int,
) -> None:
  """Every point's pictures, each in its folder."""
  for point, inside in zip(at, targets, strict=True):
    geneval.write(inside, prompts, _shards(path, point, prompts, batch_size, shards))
    _say(f"{prompts.total} pictures of {len(prompts.prompts)} prompts for GenEval in {inside}")


def _say(line: str) -> None:
  if is_primary():
    print(line)


def _warn(line: str) -> None:
  if is_primary():
    print(line, file=sys.stderr)
