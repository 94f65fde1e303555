"""What scanning over equal blocks saves and costs: compile time, memory and step time.

  python benchmarks/scan.py

Training steps with `model.scan` on and off, compiled ahead of time for the machine that it runs on,
without the cache of compiled programs; the smaller ones are run too, both in turns. Networks have
their published depths; those that are only compiled are narrow, as a program's length is of the
depth and not of the width.
"""

import argparse
import dataclasses
import statistics
from typing import Any

from t2i_jax import command, config_files


@dataclasses.dataclass(frozen=True)
class Case:
  """A network.

  Attributes:
    config: that trains it.
    settings: of the config, beside `model.scan`.
    model: other values of its section `model`.
    runs: whether its steps are timed.
  """

  config: str
  settings: dict[str, str]
  model: dict[str, Any]
  runs: bool = False


_SHARED = {"train.batch_size": "4", "precision.compute": "float32"}
_NOTHING_AGAIN = {**_SHARED, "model.remat": "none"}
CASES = {
  "DiT-S/2, depth 12": Case(
    "configs/dit.py:size=S/2", _NOTHING_AGAIN, {}, runs=True
  ),
  "DiT-XL/2's depth 28, width 64": Case(
    "configs/dit.py:size=XL/2", _NOTHING_AGAIN, {"width": 64, "heads": 4, "resolution": 64},
  ),
  "SD3's depth 24, width 64": Case(
    "configs/sd3.py:size=3-medium,encoder=transformer", _NOTHING_AGAIN,
    {"width": 64, "heads": 4, "resolution": 64},
  ),
  # Up to ten blocks in a row at the smallest side.
  "SDXL's U-Net, 32 channels": Case(
    "configs/sdxl.py:size=base,dataset=scenes",
    {**_SHARED, "model.remat": "False"}, {"channels": 32, "head_channels": 32, "resolution": 128},
  ),
}  # fmt: skip
TINY = {
  "DiT, depth 4": Case(
    "configs/dit.py:size=S/2", _NOTHING_AGAIN,
    {"width": 32, "heads": 2, "depth": 4, "resolution": 64}, runs=True,
  ),
}  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=5, help="timed steps of what is run")
  parser.add_argument("--cases", default="", help="parts of names of what to take, with commas")
  parser.add_argument("--tiny", action="store_true", help="one small network, to try the script")
  command.run(parser, None, benchmark)


def benchmark(flags: argparse.Namespace) -> None:
  import jax

  from t2i_jax.parallel.host_memory import keep_freed_memory

  keep_freed_memory()  # as training does
  print(f"jax {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}; medians "
        f"of {flags.rounds} steps in turns")
  print(f"{'':32} {'compiled in':>22} {'temporaries':>20} {'a step':>20}")
  print(f"{'':32} {'one by one':>12} {'scan':>9} {'one by one':>12} {'scan':>7} "
        f"{'one by one':>12} {'scan':>7}")
  for name, case in (TINY if flags.tiny else CASES).items():
    if any(part in name for part in flags.cases.split(",")):
      print(row(name, case, flags.rounds), flush=True)


def row(name: str, case: Case, rounds: int) -> str:
  """A line of the table: seconds, MiB and, of what is run, ms of a step."""
  from parts import in_turns

  both = [Step(case, scan) for scan in (False, True)]
  text = f"{name:32} {both[0].seconds:10.1f} s {both[1].seconds:7.1f} s"
  text += "".join(f"{step.temporaries / 2**20:{width}.0f} MiB"
                  for step, width in zip(both, (9, 4), strict=True))
  if not case.runs:
    return text
  for step in both:
    step.create()
  times = in_turns(*(step.run for step in both), rounds=rounds)
  one, scan = (1e3 * statistics.median(found) for found in times)
  return text + f" {one:9.1f} ms {scan:5.1f} ms"


class Step:
  """A case's training step, compiled.

  Attributes:
    seconds: that lowering and compiling it took.
    temporaries: bytes that it needs beside its state and its batch.
  """

  def __init__(self, case: Case, scan: bool):
    import jax

    from t2i_jax import batch_spec
    from t2i_jax.parallel.mesh import batch_sharding, make_mesh
    from t2i_jax.planning import published, report
    from t2i_jax.restore import Plan
    from t2i_jax.training.compiled import CompiledStep
    from t2i_jax.training.step import StepOptions, make_step

    config = config_files.load_config(case.config, {**case.settings, "model.scan": str(scan)})
    with config.unlocked():
      config.model.update(case.model)
    system = report.build(config, published.names_of(config), encode=False).system
    self.mesh = make_mesh(config.mesh.to_dict())
    with jax.set_mesh(self.mesh):
      self.plan = Plan.make(config, self.mesh, system, {}, 10**6, lambda value, key: 0)
      self.batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(self.mesh)),
        batch_spec.abstract_batch(system, config.train.batch_size),
      )
      self.step = CompiledStep(make_step(system, self.plan.optimizers, StepOptions()),
                               self.plan.shardings)
      self.step.program(self.plan.abstract_state, self.batch)
      self.temporaries = self.step.memory(self.plan.abstract_state, self.batch)["temporaries"]
    self.seconds = self.step.compile_seconds

  def create(self) -> None:
    """The state and a batch of zeros, on the device."""
    import jax

    self.batch = jax.tree.map(
      lambda x: jax.numpy.zeros(x.shape, x.dtype, device=x.sharding), self.batch
    )
    with jax.set_mesh(self.mesh):
      self.state = self.plan.create(self.batch, {})

  def run(self) -> None:
    import jax

    with jax.set_mesh(self.mesh):
      self.state, metrics = self.step(self.state, self.batch)
      jax.block_until_ready((self.state, metrics))


if __name__ == "__main__":
  main()
