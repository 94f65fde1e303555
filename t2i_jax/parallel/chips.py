"""What a TPU chip can do, by generation.

Source: https://cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), system architecture.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    memory: bytes.
    flops: dense bfloat16 FLOP/s.
    memory_bandwidth: bytes/s.
    link_bandwidth: bytes/s between chips of a slice, all links and both directions together.
  """

  memory: int
  flops: float
  memory_bandwidth: float
  link_bandwidth: float


CHIPS = {
  "v4": Chip(32 << 30, 275e12, 1228e9, 300e9),
  "v5e": Chip(16 << 30, 197e12, 819e9, 200e9),
  "v5p": Chip(95 << 30, 459e12, 2765e9, 600e9),
  "v6e": Chip(32 << 30, 918e12, 1640e9, 448e9),
}
