"""Statistics of real pictures, which scores are distances to: measured once and kept in a file."""

import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from etils import epath

from t2i_jax.errors import UserError
from t2i_jax.files import write_whole
from t2i_jax.metrics.frechet import Moments
from t2i_jax.metrics.network import Features

FORMAT = 1
# What a reference and pictures must have in common.
_SHARED = ("network", "digest", "preprocessing", "resolution")


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """Features of a set of real pictures.

  Attributes:
    n: pictures; 0 where the file does not say.
    mean, covariance: of their features, float64 [F] and [F, F].
    rows: the features, float32 [n, F]; or None.
    about: `network`, `digest` and `preprocessing` of what made the features, the `resolution`
      [height, width] of the pictures, and their `source`; empty for a file of mean and covariance
      alone.
  """

  n: int
  mean: np.ndarray
  covariance: np.ndarray
  rows: np.ndarray | None
  about: Mapping[str, Any]

  @classmethod
  def measure(
    cls, features: Features, batches: Iterable[np.ndarray], source: str, rows: bool = False,
    progress: Callable[[int], None] = lambda done: None,
  ) -> "Reference":
    """Runs real pictures through a network.

    Args:
      features: the network.
      batches: uint8 [N, H, W, 3] each, all of one size.
      source: what they are, such as "coco, split val, 30000 pictures, seed 0".
      rows: keep each picture's features, for the scores that need them: N times F numbers.
      progress: told how many pictures are done.

    Raises:
      UserError: fewer than two pictures, or of several sizes.
    """
    moments, kept, size = Moments(), [], None
    for images in batches:
      size = size or images.shape[1:3]
      if images.shape[1:3] != size:
        raise UserError(f"the pictures of a reference are {size[1]}x{size[0]} and "
                        f"{images.shape[2]}x{images.shape[1]}; give pictures of one size")
      found = features.of(images)["features"]
      moments.update(found)
      if rows:
        kept.append(found)
      progress(moments.n)
    if moments.n < 2:
      raise UserError(f"a reference of {moments.n} pictures has no covariance; give more, such as "
                      "all of a split")
    about = {**features.described(), "resolution": list(size), "source": source}
    return cls(
      moments.n, moments.mean, moments.covariance, np.concatenate(kept) if rows else None, about
    )

  @property
  def digest(self) -> str:
    """16 hexadecimal digits of all that it holds."""
    found = hashlib.sha256(json.dumps([self.n, self.about], sort_keys=True).encode())
    for array in (self.mean, self.covariance, self.rows):
      if array is not None:
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()[:16]

  @property
  def remarks(self) -> tuple[str, ...]:
    """What a distance to it must say."""
    if self.about:
      return ()
    return ("the reference is a file of mean and covariance alone, so its network, preprocessing, "
            "resolution and number of pictures are not known",)

  def described(self) -> dict[str, Any]:
    """For results: how many pictures of what, and the digest."""
    about = {"reference_pictures": self.n or None, "reference": self.about.get("source"),
             "reference_digest": self.digest}  # fmt: skip
    return {**about, "reference_rows": self.rows is not None}

  def save(self, path: str | os.PathLike) -> None:
    """Writes an npz file beside `path`, then puts it there; pytorch-fid reads it, too."""
    arrays = {"mu": self.mean, "sigma": self.covariance}
    if self.rows is not None:
      arrays["rows"] = self.rows
    meta = {"format": FORMAT, "n": self.n, "about": dict(self.about), "digest": self.digest}
    write_arrays(path, meta, arrays)

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Reference":
    """Reads what `save` wrote, or an npz file of pytorch-fid, with `mu` and `sigma` alone.

    Raises:
      UserError: there is no such file, or it holds something else or not what was written.
    """
    meta, arrays = read_arrays(path, required=("mu", "sigma"))
    mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
      raise UserError(f"{path}: mu {list(mean.shape)} and sigma {list(covariance.shape)} are no "
                      "mean and covariance; measure the reference again")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
      raise UserError(f"{path} holds NaN or infinity; measure the reference again")
    if not meta:
      return cls(0, mean, covariance, None, {})
    if meta.get("format") != FORMAT:
      raise UserError(f"{path} has format {meta.get('format')}, and this version reads {FORMAT}; "
                      "measure the reference again")
    found = cls(int(meta["n"]), mean, covariance, arrays.get("rows"), meta["about"])
    if found.digest != meta["digest"]:
      raise UserError(f"{path} does not hold what was written to it; copy it again, or measure the "
                      "reference again")
    return found

  def check(self, features: Features, resolution: tuple[int, int], rows: bool = False) -> None:
    """Raises UserError unless pictures of a size, in these features, may be compared with it.

    Args:
      features: the network, as it prepares pictures.
      resolution: (height, width) of the pictures.
      rows: whether the score needs every real picture's features.
    """
    width = features.width(resolution)
    if len(self.mean) != width:
      raise UserError(f"the reference is of {len(self.mean)} features and {features.name} has "
                      f"{width}; measure it with this network")
    if rows and self.rows is None:
      raise UserError("the reference has mean and covariance only, and this score needs every "
                      "picture's features, which are kept where such a score is asked for with "
                      "--reference-only; measure it again so")
    ours = {**features.described(), "resolution": list(resolution)}
    for name in _SHARED if self.about else ():
      if self.about.get(name) != ours[name]:
        raise UserError(f"the reference has {name} {self.about.get(name)} and the pictures have "
                        f"{ours[name]}; measure the reference with the pictures' own")


def write_arrays(
  path: str | os.PathLike, meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> None:
  """An npz file of arrays and of settings, written beside `path` and then put there."""
  content = io.BytesIO()  # stores have no files that one can seek in
  np.savez(content, meta=np.frombuffer(json.dumps(meta).encode(), np.uint8), **arrays)
  write_whole(path, content.getvalue())


def read_arrays(
  path: str | os.PathLike, required: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
  """What `write_arrays` wrote: settings, empty for another program's npz file, and arrays."""
  path = epath.Path(path).expanduser()
  if not path.is_file():
    raise UserError(f"no file at '{path}'; measure and save it first")
  try:
    # Nothing pickled is read.
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
    meta = json.loads(bytes(arrays.pop("meta"))) if "meta" in arrays else {}
  except Exception as error:  # what a damaged archive raises is not bounded
    raise UserError(f"{path} is no whole npz file of arrays ({type(error).__name__}: {error}); "
                    "copy or measure it again") from error
  missing = [name for name in required if name not in arrays]
  if missing:
    raise UserError(f"{path} has no {' and no '.join(missing)}; its arrays are "
                    f"{', '.join(sorted(arrays)) or 'none'}")
  return meta, arrays
