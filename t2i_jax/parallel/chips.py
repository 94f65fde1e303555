"""What a TPU chip can do, by generation.

Source: https://cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), system architecture. The data
centre's network is given there for a chip of v5p, 50 Gbit/s, and for a pod of 256 chips of v5e and
v6e, 6.4 and 25.6 Tbit/s; of v4 it is not given.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    memory: bytes.
    flops: dense bfloat16 FLOP/s.
    memory_bandwidth: bytes/s.
    link_bandwidth: bytes/s that it can send to chips of its slice, over all its links: half of
      the bandwidth that is given for both directions together.
    axes: of a slice's shape.
    largest: chips of the largest slice.
    network_bandwidth: bytes/s from a chip to other slices; None where it is not published.
  """

  memory: int
  flops: float
  memory_bandwidth: float
  link_bandwidth: float
  axes: int
  largest: int
  network_bandwidth: float | None = None


CHIPS = {
  "v4": Chip(32 << 30, 275e12, 1228e9, 300e9, 3, 4096),
  "v5e": Chip(16 << 30, 197e12, 819e9, 200e9, 2, 256, 3.125e9),
  "v5p": Chip(95 << 30, 459e12, 2765e9, 600e9, 3, 6144, 6.25e9),
  "v6e": Chip(32 << 30, 918e12, 1638e9, 400e9, 2, 256, 12.5e9),
}
