"""The step as a compiled program, one for each batch shape that a data set has."""

import time
from collections.abc import Callable
from typing import Any

import jax

from t2i_jax.parallel import flops
from t2i_jax.parallel.compiler_flags import options_of, refused


class CompiledStep:
  """`(state, batch) -> (state, metrics)`, compiled ahead of its first call.

  The state is donated. A batch of a new shape compiles once more (aspect
  buckets); nothing else ever does, so a run's compilations can be counted.

  Attributes:
    compilations: programs compiled so far.
    compile_seconds: time that they took together.
  """

  def __init__(self, function: Callable, state_shardings: Any):
    """Args:
      function: the pure step.
      state_shardings: tree of NamedSharding; what comes back has the same.
    """
    device = next(iter(jax.tree.leaves(state_shardings)[0].device_set))
    self._function = function
    self._jitted = jax.jit(
      function,
      donate_argnums=0,
      out_shardings=(state_shardings, None),
      compiler_options=options_of(device),
    )
    self._programs: dict[Any, Any] = {}
    self.compilations = 0
    self.compile_seconds = 0.0

  def program(self, state: Any, batch: Any) -> Any:
    """The executable for a batch of this shape; `state` and `batch` may be abstract.

    Raises:
      UserError: the compiler does not know an option that the user asked for.
    """
    leaves, structure = jax.tree.flatten(batch)
    key = (structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    if key not in self._programs:
      start = time.monotonic()
      lowered = self._jitted.lower(state, batch)
      try:
        self._programs[key] = lowered.compile()
      except jax.errors.JaxRuntimeError as error:
        told = refused(error)
        if told is None:
          raise
        raise told from error
      self.compilations += 1
      self.compile_seconds += time.monotonic() - start
    return self._programs[key]

  def __call__(self, state: Any, batch: Any) -> tuple[Any, Any]:
    return self.program(state, batch)(state, batch)

  def flops(self, state: Any, batch: Any) -> float:
    """FLOPs of one step over the global batch, all players at their cadence."""
    return flops.count(self._function, state, batch)

  def memory(self, state: Any, batch: Any) -> dict[str, int]:
    """Bytes a device: `arguments`, `temporaries` and their `peak`, or {} if unknown."""
    analysis = self.program(state, batch).memory_analysis()
    if analysis is None:
      return {}
    arguments, temporaries = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return {
      "arguments": arguments, "temporaries": temporaries, "peak": arguments + temporaries + fresh
    }
