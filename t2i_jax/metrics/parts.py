"""What is kept of a stream of pictures, for scores to be computed of it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.metrics.frechet import Moments
from t2i_jax.metrics.network import Features


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
  """Pictures to be measured, and what is known of them.

  Attributes:
    images: uint8 [N, H, W, 3].
    captions: N texts, or None.
    originals: what the pictures are reconstructions of, as `images`; or None.
    codes: int [N, ...] of a tokenizer, or None.
    latents: float32 [N, 4, c] of an autoencoder, as of `latents.sums_of`; or None.
  """

  images: np.ndarray
  captions: tuple[str, ...] | None = None
  originals: np.ndarray | None = None
  codes: np.ndarray | None = None
  latents: np.ndarray | None = None

  def __post_init__(self):
    object.__setattr__(self, "_found", {})

  def of(self, features: Features, which: str = "images") -> dict[str, np.ndarray]:
    """Features of the images, or the originals, computed once for all scores that ask."""
    key = id(features), which
    if key not in self._found:
      self._found[key] = features.of(getattr(self, which))
    return self._found[key]


class Part(Protocol):
  """What is kept of the pictures for some scores."""

  def measure(self, batch: Batch) -> Any:
    """What `add` takes of pictures; may fail, and changes nothing."""

  def add(self, measured: Any) -> None:
    """Keeps what was measured."""

  def state(self) -> dict[str, np.ndarray]:
    """All that is kept."""

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    """Takes what `state` gave in place of what is kept."""

  def merge(self, other: "Part") -> None:
    """Adds what another one keeps of other pictures."""


class Collected:
  """One row a picture, in the order in which they came.

  Attributes:
    measure: `batch -> array [N, ...]`.
  """

  def __init__(self, measure: Callable[[Batch], np.ndarray]):
    self.measure, self._rows = measure, []

  def add(self, measured: np.ndarray) -> None:
    self._rows.append(np.asarray(measured))

  def array(self) -> np.ndarray:
    """[N, ...] of all pictures."""
    if len(self._rows) > 1:
      self._rows = [np.concatenate(self._rows)]
    return self._rows[0]

  def state(self) -> dict[str, np.ndarray]:
    return {"rows": self.array()} if self._rows else {}

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    self._rows = [state["rows"]] if "rows" in state else []

  def merge(self, other: "Collected") -> None:
    self._rows += other._rows


class Fitted:
  """Mean and covariance of features.

  Attributes:
    features: the network.
    which: of the pictures, "images" or "originals".
    moments: sums of their features.
  """

  def __init__(self, features: Features, which: str = "images"):
    self.features, self.which, self.moments = features, which, Moments()

  def measure(self, batch: Batch) -> np.ndarray:
    return batch.of(self.features, self.which)["features"]

  def add(self, measured: np.ndarray) -> None:
    self.moments.update(measured)

  def state(self) -> dict[str, np.ndarray]:
    moments = self.moments
    if not moments.n:
      return {}
    return {"n": np.array(moments.n), "total": moments.total, "outer": moments.outer}

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    self.moments = Moments()
    if state:
      self.moments.n = int(state["n"])
      self.moments.total, self.moments.outer = state["total"], state["outer"]

  def merge(self, other: "Fitted") -> None:
    self.moments.merge(other.moments)


class Counted:
  """How often each code of a vocabulary occurs.

  Attributes:
    counts: int64 [vocabulary].
  """

  def __init__(self, vocabulary: int):
    self.counts = np.zeros(vocabulary, np.int64)

  def measure(self, batch: Batch) -> np.ndarray:
    codes, size = np.asarray(batch.codes).reshape(-1), len(self.counts)
    if codes.dtype.kind not in "iu" or codes.min() < 0 or codes.max() >= size:
      raise UserError(f"codes are {codes.dtype} from {codes.min()} to {codes.max()}, and the "
                      f"vocabulary has {size}; set the option vocabulary to the tokenizer's own")
    return np.bincount(codes, minlength=size)

  def add(self, measured: np.ndarray) -> None:
    self.counts += measured

  def state(self) -> dict[str, np.ndarray]:
    return {"counts": self.counts}

  def restore(self, state: Mapping[str, np.ndarray]) -> None:
    self.counts = np.array(state["counts"])

  def merge(self, other: "Counted") -> None:
    self.counts += other.counts
