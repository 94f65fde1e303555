"""TPU slices to compile for on a machine that has none.

Needs `pip install "jax[tpu]"`, which brings the compiler. Nothing can be run on such devices.
"""

import math
import os
import re
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from t2i_jax.errors import UserError
from t2i_jax.parallel.chips import CHIPS, Chip
from t2i_jax.parallel.mesh import make_mesh


def chip_of(topology: str) -> Chip:
  """The chips of a slice; UserError for an unknown generation or what is none of its shapes."""
  generation, _, shape = topology.partition(":")
  if generation not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
    raise UserError(f"topology '{topology}' is unknown; write {', '.join(CHIPS)} and a shape,"
                    " such as v5e:2x4")
  chip, sides = CHIPS[generation], [int(side) for side in shape.split("x")]
  if len(sides) != chip.axes or not 0 < math.prod(sides) <= chip.largest:
    raise UserError(f"there is no slice {topology}: those of {generation} have {chip.axes} sides, "
                    f"such as {generation}:{'x'.join(['4'] * chip.axes)}, and up to "
                    f"{chip.largest} chips; several slices are --slices=N")
  return chip


def slice_mesh(topology: str, sizes: Mapping[str, int], slices: int = 1) -> Mesh:
  """The mesh of TPU slices that are only compiled for.

  Args:
    topology: generation and shape of a slice, such as "v5e:2x4" or "v5p:4x4x4".
    sizes: devices along the mesh's axes; one may be -1.
    slices: how many there are, joined by the data centre's network.

  Raises:
    UserError: an unknown generation or shape, no TPU compiler, or sizes that do not fit.
  """
  chip_of(topology)
  generation = topology.partition(":")[0]
  # Without a TPU the compiler's library would wait for answers about one.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{generation}-8")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  # Nothing is run, so several processes may compile at once.
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  from jax.experimental import topologies

  # A machine has four chips, unless it is asked for with one.
  alone = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, num_slices=slices, **alone
    )
  except Exception as error:  # jax and the library raise many kinds
    why = str(error).strip().splitlines()[0]
    raise UserError(f"cannot compile for {topology} ({why}); install the compiler with "
                    "pip install 'jax[tpu]', or give a shape that exists") from error
  try:
    return make_mesh(sizes, list(found.devices))
  except AssertionError as error:
    # jax lists some v4 shapes as one device a core, and then places none of them.
    raise UserError(f"jax {jax.__version__} places no mesh on {topology} (it lists "
                    f"{len(found.devices)} devices); give another shape or generation") from error


def bytes_a_chip(compiled: jax.stages.Compiled) -> dict[str, int]:
  """What a compiled program needs of a chip: `arguments`, `outputs`, `temporaries` and `peak`."""
  stats = compiled.memory_analysis()
  arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
  temporaries = stats.temp_size_in_bytes
  return {
    "arguments": arguments, "outputs": outputs, "temporaries": temporaries,
    "peak": arguments + outputs + temporaries - stats.alias_size_in_bytes,
  }  # fmt: skip
