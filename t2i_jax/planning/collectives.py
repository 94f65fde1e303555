"""What the chips send each other in a compiled program, read from its text (HLO).

A collective in a loop's body counts as often as the loop runs. Bytes are of one chip: `payload`,
the array that is gathered, reduced or exchanged, and `wire`, what a ring makes each chip send of
it (Patarasuk and Yuan 2009, Bandwidth optimal all-reduce algorithms): of n chips, (n - 1)/n of the
array for a gather or a scattered reduction, and twice that for a reduction that all get.

A program for several slices is one slice's, in which the compiler has split what crosses between
slices into stages: collectives inside the slice, as above, and a `send` and a `recv` of each chip's
part that the host exchanges with the chips of the same place in the other slices, over the data
centre's network. Those are kinds of their own, `all-reduce between slices` and so on, and what a
chip sends of them is `network`, by the same formulas with slices in place of chips.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

KINDS = (
  "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
  "collective-broadcast", "ragged-all-to-all",
)  # fmt: skip
# Bits of an element, by the type's name in HLO.
BITS = {
  "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
  "s64": 64, "u64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip
_BETWEEN = "_xla_megascale_transfer_type="  # of what a host exchanges with other slices
_SCATTERED = "all-reduce-scatter"  # what the TPU's compiler calls its fusions that do it


@dataclasses.dataclass
class Traffic:
  """Of all collectives of a kind in one step, of one chip.

  Attributes:
    calls: how many there are.
    payload, wire, network: bytes; see the module's docstring.
  """

  calls: int = 0
  payload: int = 0
  wire: int = 0
  network: int = 0


def traffic(text: str, devices: int) -> dict[str, Traffic]:
  """The collectives of a program by kind.

  Args:
    text: `compiled.as_text()`.
    devices: of a slice, for collectives that name no groups.
  """
  entry, computations = _computations(text)
  found: dict[str, Traffic] = {}
  for line, times, scattered in _walked(computations, entry, 1, False):
    kind = _kind(line)
    if kind is None:
      _add_between_slices(found, line, times)
      continue
    group = _group_size(line, devices)
    size = _bytes(line, kind, group)
    if kind == "all-reduce" and scattered:
      kind = "reduce-scatter"
    share = {"collective-permute": 1.0}.get(kind, (group - 1) / group)
    passes = 2 if kind == "all-reduce" else 1
    total = found.setdefault(kind, Traffic())
    total.calls += times
    total.payload += times * size
    total.wire += round(times * passes * share * size)
  return found


def _add_between_slices(found: dict[str, Traffic], line: str, times: int) -> None:
  """Adds what is sent to other slices, which a host is given by a `send`."""
  sent = re.search(r" = \(([a-z]+\d*)\[([\d,]*)\].* send\(", line)
  exchange = re.search(_BETWEEN + r'"(\w+)"', line)
  if not sent or not exchange:
    return  # the `recv` that belongs to it, or the end of either
  slices = _members(re.search(r'_xla_megascale_target="\{([\d,:]+)\}', line))
  kind = exchange[1].lower().replace("_", "-")
  size = _size_of(sent[1], sent[2])
  # A gather's part goes to each other slice; of what is reduced or exchanged, a slice's share.
  share = slices - 1 if kind == "all-gather" else (slices - 1) / slices
  passes = 2 if kind == "all-reduce" else 1
  total = found.setdefault(f"{kind} between slices", Traffic())
  total.calls += times
  total.payload += times * size * (slices if kind == "all-gather" else 1)
  total.network += round(times * passes * share * size)


def _members(listed: re.Match | None) -> int:
  """Of a list of numbers and ranges such as `1,2` or `1:4`; two of what names none."""
  if listed is None:
    return 2
  ends = [[int(n) for n in part.split(":")] for part in listed[1].split(",")]
  return sum(end[-1] - end[0] + 1 for end in ends)


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
  """The entry's name, and the instructions of each computation."""
  entry, name, computations = "", "", {}
  for line in text.splitlines():
    if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{\s*$", line):
      name = found[2]
      entry = name if found[1] else entry
      computations[name] = []
    elif " = " in line and name:
      computations[name].append(line.strip())
  return entry, computations


def _walked(
  computations: dict[str, list[str]], name: str, times: int, scattered: bool
) -> Iterator[tuple[str, int, bool]]:
  """Instructions that may be collectives, how often each runs, whether in a scattering fusion."""
  for line in computations.get(name, ()):
    if " while(" in line:
      body = re.search(r"body=%?([\w.\-]+)", line)
      if body:
        yield from _walked(computations, body[1], times * _trips(computations, line), scattered)
      continue
    if _kind(line) or _BETWEEN in line:
      yield line, times, scattered
      continue
    for called in re.findall(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)",
                             line):
      yield from _walked(
        computations, called, times, scattered or _SCATTERED in called or _SCATTERED in line[:80]
      )
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
      for called in re.findall(r"%?([\w.\-]+)", branches[1]):
        yield from _walked(computations, called, times, scattered)


def _trips(computations: dict[str, list[str]], loop: str) -> int:
  """How often a loop runs: as it says, or as its condition has it; 1 where that tells nothing.

  The loops of `jax.lax.scan` count from 0 while they are below a constant.
  """
  if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop):
    return int(known[1])
  name = re.search(r"condition=%?([\w.\-]+)", loop)[1]
  return _limit(computations, name, []) or 1


def _limit(
  computations: dict[str, list[str]], name: str, given: Sequence[int | None]
) -> int | None:
  """The constant below which a condition has its counter; None unless it compares once.

  The comparison may be in a fusion that the condition calls, whose parameters are the condition's.

  Args:
    computations: of the program.
    name: of the condition, or of what it calls.
    given: values of its parameters that are constants, None for others.
  """
  values: dict[str, int | None] = {}
  limits: list[int | None] = []
  for line in computations.get(name, ()):
    own, _, what = line.removeprefix("ROOT ").partition(" = ")
    what = re.sub(r"\{[^{}]*\}", "", what)  # layouts, which have brackets in them
    kind = re.search(r"(?:^|[\s\])])([a-z][\w\-]*)\(([^()]*)\)", what)
    if kind is None:
      continue
    operands = re.findall(r"%?([\w.\-]+)(?:,|$)", re.sub(r"\[[\d,]*\]", "", kind[2]))
    known = [values.get(operand) for operand in operands]
    if kind[1] == "constant" and operands[0].isdigit():
      values[own.lstrip("%")] = int(operands[0])
    elif kind[1] == "parameter":
      values[own.lstrip("%")] = dict(enumerate(given)).get(int(operands[0]))
    elif kind[1] in ("copy", "bitcast", "convert"):
      values[own.lstrip("%")] = known[0]
    elif kind[1] == "compare":
      side = {"LT": 1, "GT": 0}.get(re.search(r"direction=(\w+)", what)[1])
      limits.append(None if side is None else known[side])
    elif called := re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", what):
      limits.append(_limit(computations, called[1], known))
  return limits[0] if len(limits) == 1 else None


def _kind(line: str) -> str | None:
  """The collective that an instruction is; the end of one that was begun is none."""
  found = re.search(rf"[\])}}] ({'|'.join(KINDS)})(-start)?\(", line)
  return found[1] if found else None


def _group_size(line: str, devices: int) -> int:
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(listed[1].split(","))
  if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
    return int(counted[2])
  return devices


def _bytes(line: str, kind: str, group: int) -> int:
  """Of the whole array: what a gather gives, what a scattered reduction takes."""
  shapes = line.split(" = ", 1)[1]
  shapes = shapes[: re.search(rf"[\])}}] {kind}", shapes).start() + 1]
  sizes = [
    _size_of(kind_, dims)
    for kind_, dims in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes) if kind_ in BITS
  ]  # fmt: skip
  if f"{kind}-start(" in line and len(sizes) > 1:
    # What goes in and what comes out, and counters of a few bytes.
    if kind == "all-gather":
      return max(sizes)
    sizes = [size for size in sizes if size > 8]
    return sum(sizes) // 2
  return sum(sizes) * (group if kind == "reduce-scatter" else 1)


def _size_of(kind: str, dims: str) -> int:
  """Bytes of an array `kind[dims]`."""
  return math.ceil(math.prod(int(n) for n in dims.split(",") if n) * BITS[kind] / 8)
