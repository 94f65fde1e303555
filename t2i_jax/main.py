"""`python -m t2i_jax.main --config=configs/NAME.py --workdir=DIR`: trains any system."""

import time
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from t2i_jax import assembly, command, export
from t2i_jax import config as configs
from t2i_jax.data.loader import Loader
from t2i_jax.data.prefetch import Prefetcher
from t2i_jax.errors import UserError
from t2i_jax.hooks import DrawSamples, HeldOutLoss, default_prompts
from t2i_jax.parallel.distributed import agree_any, is_primary
from t2i_jax.parallel.flops import peak_flops
from t2i_jax.parallel.mesh import batch_sharding, check_batch, host_rows, make_mesh
from t2i_jax.parallel.sharding import put
from t2i_jax.pipeline import Pipeline
from t2i_jax.restore import Run, held_variables
from t2i_jax.systems import base
from t2i_jax.training import loop
from t2i_jax.training.compiled import CompiledStep
from t2i_jax.training.preemption import StopSignal
from t2i_jax.training.step import StepOptions, check_accumulation, make_step
from t2i_jax.training.writers import Progress, Writers, say


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.main",
    "Trains the system of a config: one loop for every family of model, on one device or a pod.\n"
    "Any key of the config can be set on the command line, as --config.KEY=VALUE. A run that was\n"
    "stopped goes on where it was when the same command is given again.",
    "python -m t2i_jax.main --config=configs/quickstart.py --workdir=runs/quickstart",
    "python -m t2i_jax.main --config=configs/ddpm.py:size=64,dataset=emoji --workdir=runs/emoji",
    "python -m t2i_jax.main --config=configs/ddpm.py:size=tiny --workdir=runs/try "
    "--config.train.duration='100 steps'",
    "python -m t2i_jax.main --config=configs/ddpm.py --show",
  )
  parser.add_argument("--config", required=True, metavar="FILE.py[:KEY=VALUE,...]",
                      help="the config, and its arguments such as size and dataset")
  parser.add_argument("--workdir", default="",
                      help="where checkpoints, metrics, samples and the export go")
  parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard files too")
  parser.add_argument("--show", action="store_true", help="print the config and stop")
  overrides, rest = _split_overrides(argv)
  command.run(parser, rest, lambda flags: _main(flags, overrides))


def _split_overrides(argv: list[str] | None) -> tuple[dict[str, str], list[str]]:
  """`--config.KEY=VALUE` flags as a dictionary, and the other words."""
  import sys

  words = list(sys.argv[1:] if argv is None else argv)
  overrides, rest = {}, []
  while words:
    word = words.pop(0)
    if not word.startswith("--config."):
      rest.append(word)
      continue
    key, equals, value = word.removeprefix("--config.").partition("=")
    if not equals and words and not words[0].startswith("--"):
      value = words.pop(0)
    overrides[key] = value
  return overrides, rest


def _main(flags, overrides: dict[str, str]) -> None:
  config = configs.load_config(flags.config, overrides)
  if flags.show:
    print(configs.to_json(config), end="")
    return
  if not flags.workdir:
    raise UserError("--workdir is missing: name the folder that this run may write to")
  command.set_up_jax()
  train(config, flags.workdir, flags.tensorboard)


def train(config: ConfigDict, workdir: str, tensorboard: bool = False) -> loop.State:
  """Trains, checkpoints, draws samples and exports; resumes what `workdir` holds.

  Returns:
    The last state.

  Raises:
    UserError: for whatever the user can mend.
  """
  started = time.monotonic()
  workdir = epath.Path(workdir)
  mesh = make_mesh(config.mesh.to_dict())
  check_batch(config.train.batch_size, mesh, "train.batch_size")
  rows = host_rows(config.train.batch_size, mesh)
  assembly.claim_workdir(workdir, config)

  components, frozen = assembly.load_components(config)
  system = assembly.build_system(config, components)
  source = assembly.open_data(
    config, assembly.training_split(config), assembly.resolution_of(system), str(workdir)
  )
  tokenizer = assembly.run_tokenizer(config, workdir, source)
  loader = Loader(
    source, assembly.tokenize_with(tokenizer), config.train.batch_size, config.seed, rows,
    config.data.workers,
  )
  assembly.check_batch_spec(system, loader.peek(), config.data.name)
  steps_of = _durations(config, None if source.infinite else len(source))
  total = steps_of(config.train.duration, "train.duration")

  with jax.set_mesh(mesh), Writers(workdir, is_primary(), tensorboard) as writers:
    run = Run.open(config, workdir, mesh, system, frozen, loader, total, steps_of)
    try:
      if run.step == 0 or run.step >= total:
        _say_parameters(run)
      writers.truncate_after(run.step)
      compiled = CompiledStep(
        make_step(system, run.plan.optimizers, StepOptions(
          config.seed, config.train.accumulate, config.ema.decay, config.ema.warmup
        )),
        run.plan.shardings,
      )
      for warning in check_accumulation(system, config.train.accumulate):
        _say(f"warning: {warning}")
      flops = _compile(compiled, run, put(loader.peek(), batch_sharding(mesh)))
      _say(f"ready to train after {time.monotonic() - started:.1f} s, at step {run.step}/{total}")
      hooks = _hooks(config, system, source, tokenizer, mesh, workdir, writers, steps_of)
      options = loop.LoopOptions(
        total, steps_of(config.log.every, "log.every") or total,
        steps_of(config.checkpoint.every, "checkpoint.every"), config.train.batch_size, flops,
        (peak_flops(jax.devices()[0]) or 0.0) * jax.device_count(),
      )
      training_started = time.monotonic()
      with Prefetcher(loader, lambda b: put(b, batch_sharding(mesh)), config.data.prefetch) as batches:
        state, step = _loop(compiled, run, batches, options, writers, hooks)
      run.checkpoints.wait()
      _say(f"trained to step {step}/{total} in {time.monotonic() - training_started:.1f} s")
      if step == total:
        _export(config, workdir, system, state, step, tokenizer)
      return state
    finally:
      run.checkpoints.close()


def _loop(compiled, run: Run, batches, options, writers: Writers, hooks):
  log = loop.Log(options, writers.scalars, run.window)
  progress = Progress(options.total, run.step, enabled=is_primary())
  several = jax.process_count() > 1
  with StopSignal() as signal:

    def stop(step: int) -> bool:
      if not several:
        return signal.requested()
      # Asking the other hosts is a collective, so it is done at the logging cadence.
      return step % options.log_every == 0 and agree_any(signal.requested())

    try:
      state, step = loop.train(
        compiled, run.take_state(), run.step, batches, options, log, run.save, hooks, stop,
        progress.update,
      )
    finally:
      progress.close()
  if step < options.total:
    _say(f"stopped as asked; step {step} is saved, and the same command goes on from there")
  return state, step


def _durations(config: ConfigDict, epoch_size: int | None):
  """Turns a duration of this run into steps."""
  size = config.train.batch_size
  total = configs.steps_of(config.train.duration, "train.duration", size, epoch_size)
  if total == 0:
    raise UserError("train.duration is 0, so there is nothing to train")

  def steps_of(value: Any, key: str) -> int:
    return configs.steps_of(value, key, size, epoch_size, total)

  return steps_of


def _hooks(config, system, source, tokenizer, mesh, workdir, writers, steps_of) -> list[loop.Hook]:
  hooks: list[loop.Hook] = []
  every = steps_of(config.evaluate.every, "evaluate.every")
  if every:
    for split in assembly.held_out_splits(config):
      held_out = assembly.open_data(config, split, assembly.resolution_of(system))
      hooks.append(HeldOutLoss(
        system, held_out, assembly.tokenize_with(tokenizer), mesh, config.train.batch_size,
        config.evaluate.batches, every, split, writers,
      ))
  every = steps_of(config.sample.every, "sample.every")
  if every and isinstance(system, base.Sampler):
    prompts = list(config.sample.prompts) or _held_out_prompts(config, source, system)
    pipeline = Pipeline(system, tokenizer, mesh)
    for line in pipeline.truncated(prompts):
      _say(f"warning: {line}")
    base.make_options(system, config.sample.options)
    hooks.append(DrawSamples(
      pipeline, prompts, every, config.sample.seed, config.sample.options.to_dict(), workdir,
      writers,
    ))
  return hooks


def _held_out_prompts(config, source, system) -> list[str]:
  """Captions of the first held-out split that has any, else of the training set."""
  for split in assembly.held_out_splits(config):
    source = assembly.open_data(config, split, assembly.resolution_of(system))
    break
  return default_prompts(source, config.sample.count)


def _compile(compiled: CompiledStep, run: Run, batch: Any) -> float:
  """Compiles the step, says what it needs, and returns its FLOPs."""
  state = run.plan.abstract_state
  memory = compiled.memory(state, batch)
  flops = compiled.flops(state, batch)
  peak = f", {memory['peak'] / 2**20:,.0f} MiB a device" if memory else ""
  _say(f"step compiled in {compiled.compile_seconds:.1f} s: {flops:.3g} FLOPs{peak}")
  return flops


def _say_parameters(run: Run) -> None:
  if not is_primary():
    return
  from clu import parameter_overview

  _say(parameter_overview.get_parameter_overview(run.plan.abstract_state.params, max_lines=30,
                                                 include_stats=False))


def _export(config, workdir, system, state, step, tokenizer) -> None:
  variables = held_variables(system, state, ema=True)
  if is_primary():
    path = export.write(str(workdir / "export"), config, step, variables, tokenizer)
    _say(f"export written to {path}; draw with: python -m t2i_jax.sample --export={path} "
         "--prompt='...'")


def _say(line: str) -> None:
  if is_primary():
    say(line)


if __name__ == "__main__":
  main()
