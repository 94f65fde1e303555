"""Compiler options as data: each with the versions and chips it is for and its reason.

They are passed to one compilation, `jax.jit(f, compiler_options=...)`, never
through XLA_FLAGS or LIBTPU_INIT_ARGS: an option that a version does not know
then fails that compilation with its name, where an unknown flag aborts the
process, and what a user sets in those variables stays theirs.

What is always on is small and was used by others for years on the same chips.
The rest is asked for in the variable T2I_COMPILER, with commas between: names of
sets (`vmem`), single options (`xla_tpu_scoped_vmem_limit_kib=65536`), or `none`
for nothing of what is always on. All processes of a run need the same.
"""

import dataclasses
import os
from collections.abc import Sequence

import jax
import jaxlib

from t2i_jax.errors import UserError, unknown

VARIABLE = "T2I_COMPILER"
NONE = "none"


@dataclasses.dataclass(frozen=True)
class Option:
  """A compiler option that was measured to help, here or where `reason` says.

  Attributes:
    platform: `cpu`, `gpu` or `tpu`.
    name: of the field in XLA's DebugOptions, or of the TPU compiler's flag.
    value: what it is set to.
    versions: (major, minor) of the jaxlib releases that it is for.
    reason: what it does, and by how much it helped.
    kinds: `device_kind` of the chips that it is for; () for all of the platform.
    set: name by which it is asked for; "" for what is always on.
  """

  platform: str
  name: str
  value: str
  versions: tuple[tuple[int, int], ...]
  reason: str
  kinds: tuple[str, ...] = ()
  set: str = ""


_TPU_VERSIONS = ((0, 10), (0, 11))
_ASYNC = (
  "Fuses the gathering of sharded parameters with the computation beside it, so that the links "
  "and the matrix units work at once; among MaxText's and MaxDiffusion's settings for TPUs."
)
_VMEM = (
  "More of the chip's fast memory for one fusion, so that larger tiles stay in it; axlearn's value "
  "for this chip. Less is left to prefetch into, and some programs do not compile with it: ask for "
  "it, and measure."
)

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
  Option(
    "cpu", "xla_disable_hlo_passes", "cse_barrier_expander", ((0, 10), (0, 11)),
    "Optimization barriers last until programs are fused, as on other devices; see "
    "`networks.layers.barriers`.",
  ),
  Option("tpu", "xla_tpu_enable_async_collective_fusion", "true", _TPU_VERSIONS, _ASYNC),
  Option(
    "tpu", "xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", _TPU_VERSIONS, _ASYNC
  ),
  Option(
    "tpu", "xla_tpu_enable_async_collective_fusion_multiple_steps", "true", _TPU_VERSIONS, _ASYNC
  ),
  Option("tpu", "xla_enable_async_all_gather", "true", _TPU_VERSIONS, _ASYNC),
  Option("tpu", "xla_tpu_overlap_compute_collective_tc", "true", _TPU_VERSIONS, _ASYNC),
  Option(
    "tpu", "xla_tpu_scoped_vmem_limit_kib", "65472", _TPU_VERSIONS, _VMEM, ("TPU v5", "TPU v5p"),
    set="vmem",
  ),
  Option(
    "tpu", "xla_tpu_scoped_vmem_limit_kib", "98304", _TPU_VERSIONS, _VMEM,
    ("TPU v6 lite", "TPU v6e"), set="vmem",
  ),
  Option(
    "tpu", "xla_tpu_enable_data_parallel_all_reduce_opt", "true", _TPU_VERSIONS,
    "Sums gradients between slices, over the data centre's network, while the backward pass goes "
    "on; in MaxText's settings for several slices. It changes the order of sums, and takes memory "
    "for the gradients under way.",
    set="slices",
  ),
  Option(
    "tpu", "xla_tpu_data_parallel_opt_different_sized_ops", "true", _TPU_VERSIONS,
    "Lets the option before it take gradients of different sizes together, as real networks have.",
    set="slices",
  ),
  Option(
    "tpu", "xla_tpu_enable_ag_backward_pipelining", "true", _TPU_VERSIONS,
    "Gathers the next layer's sharded parameters during the backward pass of this one, in networks "
    "whose layers are scanned; holds one more layer's parameters.",
    set="fsdp",
  ),
)  # fmt: skip
SETS = tuple(dict.fromkeys(option.set for option in OPTIONS if option.set))


def compiler_options(platform: str, kind: str = "") -> dict[str, str]:
  """The `compiler_options` of a top-level `jax.jit` for the installed jaxlib.

  Args:
    platform: `device.platform` of the devices that will run the program.
    kind: their `device.device_kind`, for options of single generations.

  Raises:
    UserError: what T2I_COMPILER asks for is no set and no option.
  """
  sets, single = _asked(os.environ.get(VARIABLE, ""))
  version = tuple(int(part) for part in jaxlib.__version__.split(".")[:2])
  found = {
    o.name: o.value for o in OPTIONS
    if o.platform == platform and version in o.versions and (not o.kinds or kind in o.kinds)
    and (o.set in sets if o.set else NONE not in sets)
  }  # fmt: skip
  return found | single


def options_of(device: jax.Device) -> dict[str, str]:
  """`compiler_options` for a device, which may be one that is only compiled for."""
  return compiler_options(device.platform, device.device_kind)


def refused(error: jax.errors.JaxRuntimeError) -> UserError | None:
  """What to tell the user where a compilation failed for an option that they asked for."""
  _, single = _asked(os.environ.get(VARIABLE, ""))
  line = str(error).splitlines()[0]
  guilty = [name for name in single if name in line]
  return UserError(f"{VARIABLE}: {line}; leave out {guilty[0]}") if guilty else None


def _asked(text: str) -> tuple[Sequence[str], dict[str, str]]:
  """The sets and the single options of T2I_COMPILER."""
  sets, single = [], {}
  for word in filter(None, (part.strip() for part in text.split(","))):
    name, equals, value = word.partition("=")
    if equals:
      single[name] = value
    elif name in (*SETS, NONE):
      sets.append(name)
    else:
      raise unknown(f"set in {VARIABLE}", name, (*SETS, NONE, "NAME=VALUE"))
  return sets, single
