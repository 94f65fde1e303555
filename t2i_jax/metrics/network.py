"""Networks in whose features pictures are measured, run over a mesh.

What a network is, and what is done to pictures before it sees them, is part of every score of it.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t2i_jax.errors import UserError
from t2i_jax.parallel.compiler_flags import compiler_options
from t2i_jax.parallel.mesh import batch_sharding, batch_shards, replicated
from t2i_jax.parallel.sharding import place

Array = jax.Array
Variables = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Network:
  """A network with its numbers, and how pictures come to it.

  Attributes:
    kind: what sort of network it is, such as "inception".
    name: which one it is, such as "inception-2015-12-05".
    preprocessing: of pictures, in words.
    variables: arrays on the host.
    outputs: `(variables, pictures [B, H, W, 3]) -> {name: [B, ...]}`, traced; the pictures as
      `host` gives them. None where it compares pictures only.
    host: what is done to pictures uint8 [N, H, W, 3] on the host.
    distances: `(variables, a, b) -> [B]` of pictures uint8 [B, H, W, 3], traced; or None.
    texts: `(variables, tokens) -> [B, P]`, traced; or None where it reads no captions.
    tokens: captions to the arrays that `texts` takes, leading axis N.
    label: how scores that only this network gives are called, such as the data set that it was
      trained on.
    smallest: side of the pictures that it takes.
    remarks: what every score of it must say.
  """

  kind: str
  name: str
  preprocessing: str
  variables: Variables
  outputs: Callable[[Variables, Array], Mapping[str, Array]] | None = None
  host: Callable[[np.ndarray], np.ndarray] = lambda images: images
  distances: Callable[[Variables, Array, Array], Array] | None = None
  texts: Callable[[Variables, Any], Array] | None = None
  tokens: Callable[[Sequence[str]], Any] | None = None
  label: str = ""
  smallest: int = 1
  remarks: tuple[str, ...] = ()


def digest_of(variables: Variables) -> str:
  """First 16 hexadecimal digits of the SHA-256 of all names, shapes, types and numbers."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
    array = np.ascontiguousarray(leaf)
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    found.update(f"{name} {array.shape} {array.dtype}\n".encode())
    found.update(array.tobytes())
  return found.hexdigest()[:16]


class Features:
  """A network on a mesh: compiled once for a shape of pictures, the last batch padded.

  Computed in float32 throughout, whatever is fast on the platform: a bfloat16 feature would move
  every score. On several processes each passes the same pictures and captions, and gets all
  results.

  Attributes:
    network: what it is.
    digest: of its numbers.
    batch_size: pictures at a time, a multiple of the mesh's parts.
  """

  def __init__(self, network: Network, mesh: Mesh, batch_size: int = 64):
    if batch_size < 1:
      raise UserError(f"batch_size={batch_size}: measure at least 1 picture at a time")
    self.network, self.digest = network, digest_of(network.variables)
    shards = batch_shards(mesh)
    self.batch_size = -(-batch_size // shards) * shards
    self._sharding = batch_sharding(mesh)
    whole = replicated(mesh)
    self._variables = place(network.variables, jax.tree.map(lambda _: whole, network.variables))

    def compiled(function):
      def exact(*given):
        with jax.default_matmul_precision("highest"):
          return function(*given)

      return jax.jit(exact, out_shardings=whole,
                     compiler_options=compiler_options(mesh.devices.flat[0].platform))

    self._outputs, self._distances, self._texts = (
      compiled(f) if f else None for f in (network.outputs, network.distances, network.texts)
    )

  @property
  def name(self) -> str:
    """Which network it is."""
    return self.network.name

  @property
  def preprocessing(self) -> str:
    """What is done to pictures first, in words."""
    return self.network.preprocessing

  def described(self) -> dict[str, str]:
    """What a score of it depends on."""
    return {"network": self.name, "digest": self.digest, "preprocessing": self.preprocessing}

  def width(self, resolution: tuple[int, int]) -> int:
    """Features of a picture (height, width); nothing is computed."""
    images = self.network.host(np.zeros((1, *resolution, 3), np.uint8))
    shapes = jax.eval_shape(self.network.outputs, self.network.variables, images)
    return shapes["features"].shape[-1]

  def check(self, resolution: tuple[int, int]) -> None:
    """Raises UserError for pictures (height, width) that it does not take; computes nothing."""
    if min(resolution) < self.network.smallest:
      raise UserError(f"{self.name} takes pictures of at least {self.network.smallest} px, and "
                      f"these are {resolution[1]}x{resolution[0]}; leave its metrics out")
    images = np.zeros((1, *resolution, 3), np.uint8)
    if self.network.outputs is not None:
      self.width(resolution)
    if self.network.distances is not None:
      jax.eval_shape(self.network.distances, self.network.variables, images, images)

  def of(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs by name, float32 [N, ...], of pictures uint8 [N, H, W, 3]."""
    if self._outputs is None:
      raise UserError(f"{self.name} compares pictures and has no features to measure with")
    _check_pictures(images)
    return self._batched(self._outputs, self.network.host(images))

  def distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Float32 [N] of pictures uint8 [N, H, W, 3], twice."""
    if self._distances is None:
      raise UserError(f"{self.name} does not compare pictures; give a perceptual network")
    _check_pictures(a)
    if a.shape != b.shape:
      raise UserError(f"pictures {list(a.shape)} and {list(b.shape)} cannot be compared; give as "
                      "many of the same size")
    return self._batched(self._distances, a, b)

  def read(self, captions: Sequence[str]) -> np.ndarray:
    """Float32 [N, P] of N captions."""
    if self._texts is None:
      raise UserError(f"{self.name} reads no captions; give a network with a text tower")
    return self._batched(self._texts, self.network.tokens(list(captions)))

  def _batched(self, function: Callable, *given: Any) -> Any:
    """`function` of the trees `given`, `batch_size` rows at a time; results on the host."""
    count, size = len(jax.tree.leaves(given)[0]), self.batch_size
    found = []
    for start in range(0, max(count, 1), size):
      rows = jax.tree.map(lambda x, start=start: _padded(x[start : start + size], size), given)
      rows = place(rows, jax.tree.map(lambda _: self._sharding, rows))
      found.append(jax.tree.map(np.asarray, function(self._variables, *rows)))
    found = jax.tree.map(lambda *parts: np.concatenate(parts)[:count], *found)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(found)):
      raise UserError(f"{self.name} gives NaN or infinity for some of these; its file is damaged, "
                      "or of another network")
    return found


def _padded(rows: np.ndarray, size: int) -> np.ndarray:
  return np.pad(rows, [(0, size - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def _check_pictures(images: np.ndarray) -> None:
  if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
    raise UserError(f"pictures are {images.dtype} {list(images.shape)}; metrics take uint8 "
                    "[N, height, width, 3]")
