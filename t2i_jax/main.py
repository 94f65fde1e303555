"""`python -m t2i_jax.main --config=configs/NAME.py --workdir=DIR`: trains any system."""

import math
import time
import zlib
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from t2i_jax import (
  assembly,
  batch_spec,
  bucketing,
  caches,
  command,
  config_files,
  durations,
  export,
  guiding,
  run_data,
  run_hooks,
  systems,
  tokenizing,
  workdirs,
)
from t2i_jax import config as configs
from t2i_jax.data.loader import Loader
from t2i_jax.data.prefetch import Prefetcher
from t2i_jax.errors import UserError
from t2i_jax.parallel.distributed import agree_any, agree_on, is_primary
from t2i_jax.parallel.flops import peak_flops
from t2i_jax.parallel.mesh import batch_sharding, batch_shards, check_batch, host_rows, make_mesh
from t2i_jax.parallel.sharding import put
from t2i_jax.pipeline import Pipeline
from t2i_jax.restore import Run, held_variables, on_host
from t2i_jax.systems import trees
from t2i_jax.systems.capabilities import Sampler
from t2i_jax.training import loop
from t2i_jax.training.compiled import CompiledStep
from t2i_jax.training.marker import Marker
from t2i_jax.training.preemption import StopSignal, exit_stopped
from t2i_jax.training.profiling import Profile, parse_steps
from t2i_jax.training.step import StepOptions, check_accumulation, check_division, make_step
from t2i_jax.training.watchdog import PATIENCE, Watchdog
from t2i_jax.training.writers import Progress, Writers, tell

# Steps between two questions whether any host was asked to stop: it takes a collective.
_ASK_EVERY = 10


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.main",
    "Trains the system of a config: one loop for every family of model, on one device or a pod.\n"
    "Any key of the config can be set on the command line, as --config.KEY=VALUE. A run that was\n"
    "stopped goes on where it was when the same command is given again.",
    "python -m t2i_jax.main --config=configs/quickstart.py --workdir=runs/quickstart",
    "python -m t2i_jax.main --config=configs/ddpm.py:size=emoji,dataset=emoji --workdir=runs/emoji",
    "python -m t2i_jax.main --config=configs/ddpm.py:size=tiny --workdir=runs/try "
    "--config.train.duration='100 steps'",
    "python -m t2i_jax.main --config=configs/ddpm.py --show",
  )
  parser.add_argument("--config", required=True, metavar="FILE.py[:KEY=VALUE,...]",
                      help="the config, and its arguments such as size and dataset")
  parser.add_argument("--workdir", default="",
                      help="where checkpoints, metrics, samples and the export go")
  parser.add_argument("--tensorboard", action="store_true", help="write TensorBoard files too")
  parser.add_argument("--patience", type=float, metavar="MINUTES",
                      help="end with status 75 where nothing moves for so long; 0 for never "
                           f"({PATIENCE:g} with several processes, else 0)")
  parser.add_argument("--profile", metavar="FIRST:LAST", default="",
                      help="record these steps into WORKDIR/profile, for XProf")
  parser.add_argument("--show", action="store_true", help="print the config and stop")
  settings, rest = command.split_settings(argv)
  command.run(parser, rest, lambda flags: _main(flags, settings))


def _main(flags, settings: Sequence[str]) -> None:
  config = config_files.load_config(flags.config, command.overrides(settings))
  if flags.show:
    print(configs.to_json(config), end="")
    return
  if not flags.workdir:
    raise UserError("--workdir is missing: name the folder that this run may write to")
  if flags.patience is not None and not 0 <= flags.patience < math.inf:
    raise UserError(f"--patience={flags.patience}: use a number of minutes, or 0")
  profile = parse_steps(flags.profile) if flags.profile else None
  command.set_up_jax()
  train(config, flags.workdir, flags.tensorboard, flags.patience, profile)


def train(config: ConfigDict, workdir: str, tensorboard: bool = False,
          patience: float | None = None, profile: tuple[int, int] | None = None) -> loop.State:
  """Trains, checkpoints, draws samples and exports; resumes what `workdir` holds.

  Args:
    config: of the run.
    workdir: where everything goes.
    tensorboard: write TensorBoard files too.
    patience: as of `Watchdog`.
    profile: steps to record, as of `Profile`.

  Returns:
    The last state.

  Raises:
    UserError: for whatever the user can mend.
  """
  started = time.monotonic()
  with Watchdog(patience) as watchdog:
    configs.check_ranges(config)
    agree_on("the checksum of the config", zlib.crc32(configs.to_json(config).encode()) >> 1,
             "give all the same command and the same files")
    workdir = epath.Path(workdir).expanduser()
    mesh = make_mesh(config.mesh.to_dict())
    check_batch(config.train.batch_size, mesh, "train.batch_size")
    rows = host_rows(config.train.batch_size, mesh)
    workdirs.check_workdir(workdir, config)
    workdirs.check_shared(workdir)
    with workdirs.locked(workdir):
      recorder = Profile(profile, workdir / "profile")
      state, done = _train(config, workdir, mesh, rows, tensorboard, started, watchdog, recorder)
  if not done:
    exit_stopped()
  return state


def _train(
  config, workdir, mesh, rows, tensorboard, started, watchdog, recorder
) -> tuple[loop.State, bool]:
  components = assembly.load_components(config, workdir)
  assembly.take_sampling_options(config, components)
  cache = caches.open_text_cache(config, components)
  latents = caches.open_latents(config, components)
  system = assembly.build_system(
    config, components.systems, cached_null=cache and cache.null(),
    cached_latent=latents and latents.field, latent_statistics=latents and latents.statistics,
  )
  source = caches.open_split(
    config, run_data.training_split(config), system, latents,
    None if "://" in str(workdir) else str(workdir),
  )
  if latents is not None:
    tell(f"training on the latents in {config.data.latents}: an epoch is its {len(source)} pictures"
         f"{', the first of an endless data set' if source.was_infinite else ''}")
  tokenizers = guiding.with_tokenizer(
    tokenizing.run_tokenizers(config, workdir, source, components.tokenizers), components.tokenizers
  )
  read_text = caches.ReadText(tokenizers, cache)
  read_text.check(source, f"{config.data.name}, {run_data.training_split(config)}")
  loader = Loader(
    source, read_text, config.train.batch_size, config.seed, rows, config.data.workers
  )
  for line in tokenizing.truncated_captions(config, tokenizers, source.captions()):
    tell(f"warning: {line}")
  if source.buckets is not None:
    agree_on("the checksum of the pictures' shapes", zlib.crc32(source.buckets.of) >> 1,
             "give all processes the same files")
  shapes = loader.shapes()
  batch_spec.check_batch_spec(
    system, loader.peek(), config.data.name, [shape for shape, _ in shapes]
  )
  check_division(system, config.train.batch_size, config.train.accumulate, batch_shards(mesh))
  for warning in check_accumulation(system, config.train.accumulate):
    tell(f"warning: {warning}")
  steps_of = durations.of_run(config, None if source.infinite else len(source))
  total = steps_of(config.train.duration, "train.duration")

  with jax.set_mesh(mesh), Writers(workdir, is_primary(), tensorboard) as writers:
    run = Run.open(config, workdir, mesh, system, components, loader, total, steps_of)
    try:
      compiled = CompiledStep(
        make_step(system, run.plan.optimizers, StepOptions(
          config.seed, config.train.accumulate, config.ema.decay, config.ema.warmup
        )),
        run.plan.shardings,
      )
      pipeline = None
      if isinstance(system, Sampler):
        pipeline = Pipeline(system, tokenizers, mesh, config=config, resting=run.resting)
      hooks, scores = run_hooks.make_hooks(
        config, system, source, latents, read_text, pipeline, mesh, workdir, writers, run, steps_of,
        watchdog.alive,
      )
      flops = 0.0
      if run.step < total:
        _say_parameters(run)
        flops = _compile(compiled, run, bucketing.of_shapes(
          put(loader.peek(), batch_sharding(mesh)), shapes
        ))
      options = loop.LoopOptions(
        total, steps_of(config.log.every, "log.every") or total,
        steps_of(config.checkpoint.every, "checkpoint.every"), config.train.batch_size, flops,
        (peak_flops(jax.devices()[0]) or 0.0) * jax.device_count(),
      )
      run.save_frozen(components, config, mesh)
      workdirs.claim_workdir(workdir, config, tokenizers)
      writers.truncate_after(run.step, run.lines)
      begins = f"resuming at step {run.step}" if run.step else "beginning"
      tell(f"ready to train after {time.monotonic() - started:.1f} s: {begins}, {total} steps of "
           f"{config.train.batch_size} examples")
      training_started = time.monotonic()
      sharding = batch_sharding(mesh)
      with Prefetcher(loader, lambda b: put(b, sharding), config.data.prefetch) as batches:
        with recorder:
          state, step = _loop(
            compiled, run, batches, options, workdir, writers, hooks, watchdog, recorder
          )
      tell(f"trained to step {step}/{total} in {time.monotonic() - training_started:.1f} s")
      if step >= total:
        variables = held_variables(system, state, ema=True)
        _export(config, workdir, trees.merge(variables, run.resting), step, tokenizers, components)
        if scores is not None:
          run_hooks.score(workdir, scores, step, variables)
      return state, step >= total
    except BaseException as error:
      watchdog.failed(error)  # the checkpoints may wait for processes that wait for this one
      raise
    finally:
      run.checkpoints.close()


def _loop(
  compiled, run: Run, batches, options, workdir: epath.Path, writers: Writers, hooks,
  watchdog: Watchdog, recorder: Profile,
):

  def write(step: int, values: dict[str, float]) -> None:
    run.checkpoints.check()  # a save that failed in the background is heard of now
    writers.scalars(step, values)

  def save(step: int, state, meta) -> None:
    writers.flush()
    agree_on("the step to save", step, "start all processes again")
    run.save(step, state, meta)
    watchdog.moved(step)

  def mark(step: int, done: list[str]) -> None:
    if is_primary():
      writers.flush()
      Marker(step, tuple(done), writers.lines(step)).write(workdir)

  log = loop.Log(options, write, run.window)
  progress = Progress(options.total, run.step, enabled=is_primary())
  several = jax.process_count() > 1
  with StopSignal() as signal:

    def stop(step: int) -> bool:
      watchdog.moved(step)
      recorder.at(step)
      if not several:
        return signal.requested()
      return step % min(options.log_every, _ASK_EVERY) == 0 and agree_any(signal.requested())

    try:
      state, step = loop.train(
        compiled, run.take_state(), run.step, batches, options, log, save, hooks, stop,
        progress.update, run.hooks_done, mark,
      )
      run.checkpoints.wait()
    finally:
      progress.close()
      watchdog.rest()
  if step < options.total:
    tell(f"stopped as asked; step {step} is saved, and the same command goes on from there")
  return state, step


def _compile(compiled: CompiledStep, run: Run, batches: list[tuple[Any, float]]) -> float:
  """Compiles the step for each shape of batch, says what it needs, and returns its mean FLOPs.

  All before the first step: hosts that compiled on the way would wait for each other.
  """
  state, peak, flops = run.plan.abstract_state, 0, 0.0
  several = f" for {len(batches)} shapes of pictures" if len(batches) > 1 else ""
  tell(f"compiling the step{several}; a minute or so{' each' if several else ''}, and longer for "
       "large networks")
  for batch, share in batches:
    peak = max(peak, compiled.memory(state, batch).get("peak", 0))
    flops += share * compiled.flops(state, batch)
  needs = f", {peak / 2**20:,.0f} MiB a device" if peak else ""
  tell(f"step compiled{several} in {compiled.compile_seconds:.1f} s: {flops:.3g} FLOPs{needs}")
  return flops


def _say_parameters(run: Run) -> None:
  if not is_primary():
    return
  params = run.plan.abstract_state.params
  try:
    from clu import parameter_overview
  except ImportError:
    tell(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters (clu would list them)")
    return
  tell(parameter_overview.get_parameter_overview(params, max_lines=30, include_stats=False))


def _export(config, workdir, variables, step, tokenizers, components) -> None:
  variables = on_host(variables)
  if is_primary():
    path = export.write(
      workdir / "export", config, step, variables, tokenizers, components.about
    )
    draws = systems.load(config.system).Options is not None
    use = f"; draw with: python -m t2i_jax.sample --export={path} --prompt='...'" if draws else ""
    tell(f"export written to {path}{use}")


if __name__ == "__main__":
  main()
