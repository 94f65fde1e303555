"""A score together with all that it depends on."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Result:
  """A score with all that it depends on.

  Attributes:
    name, value: of the score.
    n: pictures that it was measured on.
    about: what it depends on besides.
    deviation, over: standard deviation of the value over what, such as "10 splits"; or None and "".
    remarks: what must be said with it.
  """

  name: str
  value: float
  n: int
  about: Mapping[str, Any]
  deviation: float | None = None
  over: str = ""
  remarks: tuple[str, ...] = ()

  def described(self) -> dict[str, Any]:
    """All of it, for JSON; a value that is no number there is a text."""
    plain = lambda x: x if x is None or math.isfinite(x) else str(x)  # noqa: E731
    found = {"value": plain(self.value), "n": self.n}
    if self.deviation is not None:
      found |= {"deviation": plain(self.deviation), "deviation_over": self.over}
    return {**found, **self.about, "remarks": list(self.remarks)}

  def line(self) -> str:
    """For people: never without the number of pictures, what made it, and the remarks."""
    spread = "" if self.deviation is None else f" +- {self.deviation:.3g} over {self.over}"
    made = [f"{self.n} pictures"]
    if "network" in self.about:
      made.append(f"{self.about['network']} {self.about['digest']}")
      made.append(self.about["preprocessing"])
    if self.about.get("reference_digest"):
      count, source = self.about["reference_pictures"], self.about["reference"]
      made.append(f"against {count or 'an unknown number of'} pictures of {source or 'a file'}")
    if "reconstruction" in self.about:
      made.append(self.about["reconstruction"])
    text = f"{self.name} {self.value:.5g}{spread} ({'; '.join(made)})"
    return "".join([text, *(f"; note: {remark}" for remark in self.remarks)])
