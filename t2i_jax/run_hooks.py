"""What a run does beside stepping, as its config asks: held-out loss, pictures, their scores."""

import json
import time

from t2i_jax import batch_spec, caches, data, export, run_data
from t2i_jax.errors import UserError
from t2i_jax.evaluation.training import MeasurePictures, RunScores, lines
from t2i_jax.hooks import DrawReconstructions, DrawSamples, HeldOutLoss, default_prompts
from t2i_jax.parallel.distributed import is_primary
from t2i_jax.restore import Run
from t2i_jax.systems.capabilities import FirstStage, Sampler, require
from t2i_jax.training import loop
from t2i_jax.training.writers import tell


def make_hooks(
  config, system, source, latents, read_text, pipeline, mesh, workdir, writers, run: Run, steps_of,
  alive
) -> tuple[list[loop.Hook], RunScores | None]:
  """What the run does beside stepping, and what measures its pictures, if anything.

  What is wrong with it is found now, not hours later.
  """
  hooks: list[loop.Hook] = []
  every = steps_of(config.evaluate.every, "evaluate.every")
  if every:
    for split in run_data.held_out_splits(config):
      held_out = caches.open_split(config, split, system, latents)
      read_text.check(held_out, f"{config.data.name}, {split}")
      hooks.append(HeldOutLoss(
        system, held_out, read_text, mesh, config.train.batch_size,
        config.evaluate.batches, every, split, writers,
      ))
  every = steps_of(config.sample.every, "sample.every")
  if pipeline is None:
    if every and isinstance(system, FirstStage):
      hooks.append(DrawReconstructions(
        system, _held_out(config, source, system, decoded=True), mesh, config.sample.count, every,
        workdir, writers,
      ))
    _is_scored(config, system)
    return hooks, None
  options = config.sample.options.to_dict()
  if every or _is_scored(config, system):
    pipeline.check(run.plan.abstract_state.variables(ema=True), **options)
  scores = None
  if _is_scored(config, system):
    scores = RunScores(config, pipeline, mesh, workdir, alive)
  measured = steps_of(config.evaluate.metrics_every, "evaluate.metrics_every")
  if measured and scores is None:
    raise UserError("evaluate.metrics_every is set, and there is nothing to measure; set "
                    "evaluate.metrics and evaluate.pictures")
  if measured:
    hooks.append(MeasurePictures(scores, measured, writers))
  if every:
    prompts = list(config.sample.prompts) or default_prompts(
      _held_out(config, source, system, decoded=False), config.sample.count
    )
    pipeline.read(prompts, len(prompts))
    for line in pipeline.truncated(prompts):
      tell(f"warning: {line}")
    hooks.append(DrawSamples(
      pipeline, prompts, every, config.sample.seed, options, workdir, writers
    ))
  return hooks, scores


def _held_out(config, source, system, decoded: bool):
  """The first held-out split that there is, else the training set; as `open_data` has it or not."""
  side = batch_spec.resolution_of(system)
  for split in run_data.held_out_splits(config):
    try:
      if decoded:
        return run_data.open_data(config, split, side)
      options = config.data.options.to_dict()
      return data.open_source(config.data.name, split, side, config.seed, options)
    except UserError as error:
      tell(f"warning: samples are of the training split: {error}")
  return source


def _is_scored(config, system) -> bool:
  """Whether pictures are measured: the config asks for it, and something can be."""
  if config.evaluate.metrics:
    require(system, Sampler, "evaluate.metrics")
    if not config.evaluate.pictures:
      raise UserError("evaluate.metrics are of evaluate.pictures pictures, and that is 0; set it")
    return True
  judged = data.verifier(config.data.name) is not None and isinstance(system, Sampler)
  return config.evaluate.pictures > 0 and judged


def score(workdir, scores: RunScores, step: int, variables) -> None:
  """Measures pictures of held-out captions, prints the scores, and adds them to the export."""
  started = time.monotonic()
  found = scores.measure(step, variables, grids=True)
  tables = [lines(split, of_split) for split, of_split in found.items()]
  for text in tables:
    tell(text)
  tell(f"drawn and scored in {time.monotonic() - started:.1f} s")
  if is_primary():
    (workdir / "scores").mkdir(exist_ok=True)
    (workdir / "scores" / "scores.json").write_text(json.dumps(found, indent=2) + "\n")
    notes = "Of pictures drawn at the end of training:\n\n```\n" + "\n\n".join(tables) + "\n```"
    export.add_to_card(workdir / "export", notes)
