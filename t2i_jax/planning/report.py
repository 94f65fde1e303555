"""One training step compiled for a slice: what it needs, what bounds it, what to do about it."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from t2i_jax import assembly, batch_spec, durations, systems
from t2i_jax.parallel.chips import Chip
from t2i_jax.parallel.mesh import batch_sharding, batch_shards, check_batch
from t2i_jax.parallel.topology import bytes_a_chip
from t2i_jax.planning import published
from t2i_jax.planning.collectives import Traffic, traffic
from t2i_jax.restore import Plan
from t2i_jax.systems import trees
from t2i_jax.systems.base import System
from t2i_jax.systems.capabilities import FirstStage, TextEncoder
from t2i_jax.training.compiled import CompiledStep
from t2i_jax.training.step import StepOptions, check_division, make_step

# A plan's run is this long: only schedules see it.
STEPS = 100_000
FIRST_STAGE = "first_stage"
# What a TPU's compiler spends on a program, on jax's scale from -1 to 1. A run's programs get
# "full". "least" searches no tilings: ten convolutions compile in 5 s of a core rather than in
# 100 s, with the same collectives and a fifth more temporaries, so it errs to the safe side.
EFFORTS = {"least": -1.0, "full": 0.0}


@dataclasses.dataclass(frozen=True)
class Report:
  """A step on a slice.

  Attributes:
    batch_size: pictures a step, of all chips.
    chips: how many.
    chip: what each can do.
    trained, frozen: numbers of parameters; frozen ones are those that the step computes with.
    flops: of a step, over all chips.
    needs: bytes of a chip: arguments, outputs, temporaries and peak; {} where the compiler refused.
    moved: bytes that a chip reads and writes of its memory, at least: all it is given and gives
      back once, and each temporary twice.
    collectives: by kind, of a chip.
    seconds: that compiling took.
    effort: how hard the compiler tried, one of `EFFORTS`.
    refusal: what the compiler said, where it did not fit.
    unit: pictures of the least batch, which all others are multiples of.
    divisible: whether more microbatches leave the loss what it is.
  """

  batch_size: int
  chips: int
  chip: Chip
  trained: int
  frozen: int
  flops: float
  needs: Mapping[str, int]
  moved: int
  collectives: Mapping[str, Traffic]
  seconds: float
  effort: str = "least"
  refusal: str = ""
  unit: int = 1
  divisible: bool = True

  @property
  def fits(self) -> bool:
    return not self.refusal and self.needs["peak"] <= self.chip.memory

  @property
  def bounds(self) -> dict[str, float]:
    """Seconds that a step takes at least, by what would bind it."""
    wire = sum(found.wire for found in self.collectives.values())
    network = sum(found.network for found in self.collectives.values())
    bounds = {
      "arithmetic": self.flops / self.chips / self.chip.flops,
      "memory": self.moved / self.chip.memory_bandwidth,
      "links": wire / self.chip.link_bandwidth,
    }
    if network and self.chip.network_bandwidth:
      bounds["network"] = network / self.chip.network_bandwidth
    return bounds


@dataclasses.dataclass(frozen=True)
class Parts:
  """The system of a plan, and the frozen variables that its step computes with, as shapes."""

  system: System
  frozen: dict[str, dict[str, Any]]


def build(config: ConfigDict, names: Mapping[str, str], encode: bool) -> Parts:
  """The system of a config on published components.

  Args:
    config: of the run; `components` that it names are read from their exports.
    names: of `published`, by component.
    encode: whether text encoders and first stage are part of the step; else their features and
      latents come with the batch, as from `precompute`.

  Raises:
    UserError: for what makes no system.
  """
  dtype = assembly.compute_dtype(config)
  given = assembly.load_components(config)
  parts = dict(given.systems)
  shapes = jax.eval_shape(lambda: given.variables) if given.variables else {}
  frozen: dict[str, dict[str, Any]] = {kind: dict(groups) for kind, groups in shapes.items()}
  for name, what in names.items():
    if name in parts:
      continue
    parts[name] = published.component(what, config.model.resolution, dtype)
    for kind, groups in published.shapes_of(parts[name], 1).items():
      frozen.setdefault(kind, {})[name] = _as_stored(groups, config)
  if encode:
    return Parts(systems.build(config, parts, dtype), frozen)
  encoders = [
    name for name, part in parts.items()
    if isinstance(part, TextEncoder) and config.text.encoder == "component"
  ]  # fmt: skip
  cached: dict[str, Any] = {}
  if encoders:
    cached["cached_null"] = {name: published.features_of(parts[name]) for name in encoders}
  if isinstance(parts.get(FIRST_STAGE), FirstStage):
    cached["cached_latent"] = published.latents_of(parts[FIRST_STAGE], config.model.resolution)
  _, working = trees.split(frozen, (*encoders, *([FIRST_STAGE] if FIRST_STAGE in parts else [])))
  return Parts(systems.build(config, parts, dtype, **cached), working)


def _as_stored(groups: Any, config: ConfigDict) -> Any:
  dtype = config.precision.frozen
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), groups)


@contextlib.contextmanager
def _trying(effort: str):
  before = jax.config.jax_exec_time_optimization_effort
  jax.config.update("jax_exec_time_optimization_effort", EFFORTS[effort])
  try:
    yield
  finally:
    jax.config.update("jax_exec_time_optimization_effort", before)


def measure(
  config: ConfigDict, mesh: Mesh, chip: Chip, parts: Parts, effort: str = "least"
) -> Report:
  """Compiles the config's step for a mesh.

  Raises:
    UserError: for a batch that does not divide over the mesh, or into microbatches there.
  """
  batch_size, accumulate = config.train.batch_size, config.train.accumulate
  check_batch(batch_size, mesh, "train.batch_size")
  check_division(parts.system, batch_size, accumulate, batch_shards(mesh))

  def steps_of(value, key):
    return durations.steps_of(value, key, batch_size, batch_size * STEPS, STEPS)

  system = parts.system
  with jax.set_mesh(mesh):
    plan = Plan.make(config, mesh, system, parts.frozen, STEPS, steps_of)
    batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)),
      batch_spec.abstract_batch(system, batch_size),
    )
    options = StepOptions(
      config.seed, accumulate, config.ema.decay, config.ema.warmup
    )
    step = CompiledStep(make_step(system, plan.optimizers, options), plan.shardings)
    flops = step.flops(plan.abstract_state, batch)
    started, needs, found, refusal, moved = time.perf_counter(), {}, {}, "", 0
    try:
      with _trying(effort):
        program = step.program(plan.abstract_state, batch)
    except Exception as error:  # the compiler refuses what does not fit, among others
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      refusal = next(x for x in str(error).splitlines() if "RESOURCE_EXHAUSTED" in x)[:300]
    else:
      needs = bytes_a_chip(program)
      moved = needs["arguments"] + needs["outputs"] + 2 * needs["temporaries"]
      found = traffic(program.as_text(), mesh.size // mesh.shape["slice"])
    seconds = time.perf_counter() - started
  trained = {name for player in system.players for name in player.trains}
  sizes = {
    name: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
    for name, tree in plan.abstract_state.params.items()
  }
  return Report(
    batch_size, mesh.size, chip, sum(n for name, n in sizes.items() if name in trained),
    sum(n for name, n in sizes.items() if name not in trained), flops, needs, moved, found, seconds,
    effort, refusal, unit_of(system, accumulate, mesh),
    all(player.couples_examples != "exact" for player in system.players),
  )  # fmt: skip


def unit_of(system: System, accumulate: int, mesh: Mesh) -> int:
  """Pictures of the least batch that gives each part of the mesh one in every microbatch."""
  repeats = math.lcm(*(player.repeats for player in system.players))
  return repeats * accumulate * batch_shards(mesh)


def table(report: Report) -> str:
  """A report as text."""
  rows = [
    ("parameters trained", f"{report.trained:,}"),
    ("parameters frozen, in the step", f"{report.frozen:,}"),
    ("pictures a step", f"{report.batch_size:,} ({report.batch_size / report.chips:g} a chip)"),
    ("FLOPs a step", f"{report.flops:.4g}"),
  ]
  if report.refusal:
    rows.append(("does not fit", report.refusal))
    return _aligned(rows)
  rows += [(f"{name} a chip", _size(size)) for name, size in report.needs.items()]
  rows.append(("memory a chip", f"{_size(report.chip.memory)}, "
               + ("fits" if report.fits else "does not fit")))
  for kind, found in sorted(report.collectives.items()):
    rows.append((kind, f"{found.calls} calls, {_size(found.payload)} of arrays, "
                 f"{_size(found.wire + found.network)} sent by a chip"))
  bounds = report.bounds
  binding = max(bounds, key=bounds.get)
  rows += [(f"bound by {name}", f"{_time(seconds)} a step") for name, seconds in
           bounds.items()]
  best = bounds["arithmetic"] / max(bounds.values())
  rows += [
    ("at best", f"{_time(bounds[binding])} a step, bound by {binding}: "
     f"{report.batch_size / bounds[binding]:,.0f} pictures/s, {best:.0%} of the chips' arithmetic"),
    ("compiled in", f"{report.seconds:.0f} s, with {report.effort} effort"),
  ]
  return _aligned(rows)


def _size(size: float) -> str:
  return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
  return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _aligned(rows: list[tuple[str, str]]) -> str:
  width = max(len(name) for name, _ in rows)
  return "\n".join(f"  {name:{width}}  {value}" for name, value in rows)


def advice(report: Report, config: ConfigDict, mesh: Mesh) -> list[str]:
  """What makes a step that does not fit smaller, what saves most first."""
  lines = []
  spread = mesh.shape["fsdp"] * mesh.shape["tensor"]
  needs = report.needs
  state_dominates = bool(needs) and needs["arguments"] > needs["temporaries"]
  over = mesh.size // (mesh.shape["slice"] * mesh.shape["sequence"])
  if spread == 1 and over > 1:
    share = f"; {_size(needs['arguments'])} of each are held {mesh.size} times" if needs else ""
    each = " of each slice" if mesh.shape["slice"] > 1 else ""
    lines.append("--config.mesh.data=1 --config.mesh.fsdp=-1 spreads parameters, their average and "
                 f"the optimizer's state over {over} chips{each}{share}")
  remat = config.model.get("remat")
  if remat is False or remat in ("none", "dots"):
    value = "True" if remat is False else "full"
    lines.append(f"--config.model.remat={value} computes blocks again in the backward pass rather "
                 "than keep what is in them")
  in_a_part = report.batch_size // report.unit
  if in_a_part > 1:
    if report.divisible:
      accumulate = config.train.accumulate * in_a_part
      lines.append(f"--config.train.accumulate={accumulate} takes the batch in parts: the same "
                   "update, with less in memory at once")
    less = in_a_part // 2 * report.unit
    lines.append(f"--config.train.batch_size={less} is "
                 + ("half of it" if in_a_part % 2 == 0 else "less"))
  if config.precision.frozen == "float32" and report.frozen:
    lines.append("--config.precision.frozen=bfloat16 halves the frozen components")
  if mesh.shape["tensor"] == 1:
    lines.append("--config.mesh.tensor=2 splits each layer's matrices over two chips")
  lines.append("a larger slice" + (", over which the state is spread thinner"
                                   if state_dominates else ""))
  return lines
