"""Compiler options as data: each with the versions it is for and its reason.

They are passed to one compilation, `jax.jit(f, compiler_options=...)`, never
through XLA_FLAGS: an option that a version does not know then fails that
compilation with its name, where an unknown flag aborts the process, and what
a user sets in XLA_FLAGS stays theirs.
"""

import dataclasses

import jaxlib


@dataclasses.dataclass(frozen=True)
class Option:
  """A compiler option that was measured to help.

  Attributes:
    platform: `cpu`, `gpu` or `tpu`.
    name: of the field in XLA's DebugOptions.
    value: what it is set to.
    versions: (major, minor) of the jaxlib releases that it is for.
    reason: what it does, and by how much it helped.
  """

  platform: str
  name: str
  value: str
  versions: tuple[tuple[int, int], ...]
  reason: str


OPTIONS = (
  Option(
    "cpu",
    "xla_cpu_experimental_ynn_fusion_type",
    "",
    ((0, 10),),
    "No operation goes to YNNPACK, whose convolutions are slower than XLA's own in jaxlib 0.10: "
    "four 3x3 convolutions of 64 channels on 32x32, batch 32, forward and backward, took 1.5 "
    "times as long with it; matrix products and attention are the same with and without. In "
    "0.11 its convolutions are the faster ones by about a tenth.",
  ),
)


def compiler_options(platform: str) -> dict[str, str]:
  """The `compiler_options` of a top-level `jax.jit` for the installed jaxlib.

  Args:
    platform: `device.platform` of the devices that will run the program.
  """
  version = tuple(int(part) for part in jaxlib.__version__.split(".")[:2])
  return {o.name: o.value for o in OPTIONS if o.platform == platform and version in o.versions}
