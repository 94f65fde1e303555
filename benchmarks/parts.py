"""Timing in turns, and where a training step's time goes; of the benchmarks beside it."""

import collections
import dataclasses
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from t2i_jax.parallel import flops
from t2i_jax.parallel.compiler_flags import compiler_options

PRODUCTS = ("dot_general", "conv_general_dilated")


def in_turns(*sides: Callable[[], Any], rounds: int) -> list[list[float]]:
  """Seconds of each side's calls, one of each a round, after one of each to warm up."""
  for side in sides:
    side()
  times: list[list[float]] = [[] for _ in sides]
  for _ in range(rounds):
    for side, found in zip(sides, times, strict=True):
      started = time.perf_counter()
      side()
      found.append(time.perf_counter() - started)
  return times


@dataclasses.dataclass(frozen=True)
class Part:
  """Something that a step does.

  Attributes:
    name: of it.
    function, arguments: what is compiled and called; arguments are kept.
    times: how often a step does it.
  """

  name: str
  function: Callable
  arguments: tuple
  times: int = 1


def profile(parts: Sequence[Part], step: Callable, arguments: tuple, rounds: int) -> str:
  """Times of a step's parts and of each of its products alone, as text.

  A product is a matrix product or a convolution of the step's program, forward or backward,
  compiled by itself and run on arrays of its shapes. What products do not explain is the rest:
  softmax, norms, activations, the optimizer, the average, and copies. A product alone finds its
  arguments less often in a cache and has nothing fused into it, so that the rest is about right.

  Args:
    parts: of the step.
    step: all of it, a pure function; it is timed too, without donation.
    arguments: of the step.
    rounds: of which medians are taken.
  """
  alone = [*parts, Part("step", step, arguments)]
  rows = [_row(part, rounds) for part in alone]
  whole = rows[-1][3]
  products = [_row(part, rounds) for part in products_of(step, *arguments)]
  products.sort(key=lambda row: -row[3])
  total = sum(row[3] for row in products)
  rows += [("of which, alone:", None, None, None), *products]
  times, count = (sum(row[i] for row in products) for i in (1, 2))
  rows += [("all products", times, count, total), ("the rest", None, 0.0, whole - total)]
  width = max(len(row[0]) for row in rows)
  lines = [f"{'':{width}} {'times':>6} {'GFLOP':>8} {'ms':>8} {'GFLOP/s':>8} {'share':>6}"]
  for name, times, operations, seconds in rows:
    if seconds is None:
      lines.append(name)
      continue
    speed = f"{operations / seconds / 1e9:8.1f}" if operations and seconds > 0 else " " * 8
    lines.append(f"{name:{width}} {'' if times is None else times:>6} {operations / 1e9:8.2f} "
                 f"{1e3 * seconds:8.2f} {speed} {seconds / whole:6.1%}")
  return "\n".join(lines)


def _row(part: Part, rounds: int) -> tuple[str, int, float, float]:
  """(name, times, FLOPs, seconds) of all times together."""
  options = compiler_options(jax.default_backend())
  compiled = jax.jit(part.function, compiler_options=options).lower(*part.arguments).compile()
  run = lambda: jax.block_until_ready(compiled(*part.arguments))  # noqa: E731
  once = statistics.median(in_turns(run, rounds=3)[0])
  # What is shorter than the clock's noise is done several times a round.
  repeats = max(1, math.ceil(0.01 / once))
  found = in_turns(lambda: [run() for _ in range(repeats)], rounds=rounds)[0]
  count = flops.count(part.function, *part.arguments)
  return (part.name, part.times, part.times * count,
          part.times * statistics.median(found) / repeats)


def products_of(function: Callable, *arguments: Any) -> list[Part]:
  """Each different product of a function's program, with how often it is computed.

  Loops count as often as they run (`jax.lax.while_loop`: once), of branches the last.
  """
  found: collections.Counter = collections.Counter()
  first = {}
  for equation, times in _equations(jax.make_jaxpr(function)(*arguments).jaxpr, 1):
    if equation.primitive.name in PRODUCTS:
      shapes = [v.aval.str_short() for v in equation.invars]
      key = (equation.primitive.name, *shapes, re.sub(r"0x\w+", "", str(equation.params)))
      found[key] += times
      first.setdefault(key, equation)
  return [_product(first[key], times) for key, times in found.items()]


def _product(equation: Any, times: int) -> Part:
  random = np.random.default_rng(0)
  arrays = tuple(
    jax.numpy.asarray(random.normal(size=v.aval.shape), v.aval.dtype) for v in equation.invars
  )
  function = lambda *given: equation.primitive.bind(*given, **equation.params)  # noqa: E731
  kind = "convolution" if equation.primitive.name.startswith("conv") else "product"
  shapes = [str(list(v.aval.shape)).replace(" ", "") for v in (*equation.invars, *equation.outvars)]
  return Part(f"  {kind} {shapes[0]} {shapes[1]} -> {shapes[2]}", function, arrays, times)


def _equations(jaxpr: Any, times: int) -> Iterator[tuple[Any, int]]:
  for equation in jaxpr.eqns:
    yield equation, times
    name, params = equation.primitive.name, equation.params
    inner = [value for value in params.values() if hasattr(value, "eqns")]
    if name == "cond":
      inner = [params["branches"][-1]]
    for one in inner:
      length = params["length"] if name == "scan" else 1
      yield from _equations(getattr(one, "jaxpr", one), times * length)


def reference_profile(run: Callable[[], Any], rows: int = 12) -> str:
  """PyTorch's own profile of a call, by operation."""
  import torch

  run()
  with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
    run()
  return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=rows,
                                    max_name_column_width=40)
