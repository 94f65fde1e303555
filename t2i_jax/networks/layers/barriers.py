"""What keeps the CPU's compiler from computing a network's residual stream again and again."""

from typing import TypeVar

import jax

from t2i_jax.networks.layers.backends import platform

Tree = TypeVar("Tree")


def computed_once(x: Tree) -> Tree:
  """x, a tree of arrays, written to memory before it is read, in both passes.

  XLA for CPUs fuses sums and products into everything that reads them, however often that computes
  them again. Along a residual stream each block's fusions then hold those of all blocks before
  (after, in the backward pass): twelve blocks of a DiT took nearly three times as long as with the
  stream written down between them, and twice as long to compile. Compilers for other devices weigh
  that themselves, and get x as it is. The barrier lasts as `parallel.compiler_flags` has it.
  """
  return jax.lax.optimization_barrier(x) if platform() == "cpu" else x
