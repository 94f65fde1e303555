"""What the training loop costs beside the bare compiled step.

  python benchmarks/loop.py --config=configs/quickstart.py

The same compiled program is run twice in turn, several times: alone, on one
batch that lies on the device, and through the loop with its loader, prefetch,
metrics and log. Printed: medians of seconds a step, and their ratio.
"""

import argparse
import statistics
import tempfile
import time

import jax
from etils import epath

from t2i_jax import assembly, batch_spec, caches, command, config_files, run_data, tokenizing
from t2i_jax.data.loader import Loader
from t2i_jax.data.prefetch import Prefetcher
from t2i_jax.parallel.mesh import batch_sharding, host_rows, make_mesh
from t2i_jax.parallel.sharding import put
from t2i_jax.restore import Plan
from t2i_jax.training import loop
from t2i_jax.training.compiled import CompiledStep
from t2i_jax.training.step import StepOptions, make_step


def main():
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--config", default="configs/quickstart.py")
  parser.add_argument("--steps", type=int, default=20, help="steps a round")
  parser.add_argument("--rounds", type=int, default=5)
  flags = parser.parse_args()

  command.set_up_jax()
  config = config_files.load_config(flags.config)
  mesh = make_mesh(config.mesh.to_dict())
  size = config.train.batch_size
  system = assembly.build_system(config)
  source = run_data.open_data(
    config, run_data.training_split(config), batch_spec.resolution_of(system)
  )
  tokenizers = tokenizing.make_tokenizer(config, source)
  loader = Loader(
    source, caches.ReadText(tokenizers), size, config.seed, host_rows(size, mesh)
  )
  place = lambda batch: put(batch, batch_sharding(mesh))  # noqa: E731
  with jax.set_mesh(mesh), tempfile.TemporaryDirectory() as folder:
    plan = Plan.make(config, mesh, system, {}, 10**6, lambda value, key: 0)
    batch = place(loader.peek())
    state = plan.create(batch, {})
    step = CompiledStep(make_step(system, plan.optimizers, StepOptions()), plan.shardings)
    log_file = epath.Path(folder) / "metrics.jsonl"

    def bare(state):
      start = time.monotonic()
      for _ in range(flags.steps):
        state, metrics = step(state, batch)
      jax.block_until_ready(metrics)
      return state, (time.monotonic() - start) / flags.steps

    def looped(state, batches, first):
      options = loop.LoopOptions(first + flags.steps, 10, 0, size)
      log = loop.Log(options, lambda step, values: log_file.write_text(str(values)))
      start = time.monotonic()
      state, _ = loop.train(
        step, state, first, batches, options, log, lambda step, state, meta: None
      )
      return state, (time.monotonic() - start) / flags.steps

    times = {"bare step": [], "loop": []}
    with Prefetcher(loader, place) as batches:
      state, _ = bare(state)
      for round_ in range(flags.rounds):
        state, seconds = bare(state)
        times["bare step"].append(seconds)
        state, seconds = looped(state, batches, round_ * flags.steps)
        times["loop"].append(seconds)
  medians = {name: statistics.median(values) for name, values in times.items()}
  device = jax.devices()[0].device_kind
  print(f"{flags.config} on {jax.device_count()} x {device}, jax {jax.__version__}, batch {size}, "
        f"{flags.rounds} rounds of {flags.steps} steps")
  for name, seconds in medians.items():
    spread = f"{min(times[name]):.4f} to {max(times[name]):.4f}"
    print(f"{name:10} {seconds:.4f} s a step ({spread})")
  print(f"the loop's throughput is {medians['bare step'] / medians['loop']:.3f} of the bare step's")


if __name__ == "__main__":
  main()
