"""Real pictures through a first stage and back, in batches over all devices."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t2i_jax import data, export
from t2i_jax.data.base import Source
from t2i_jax.evaluation.points import Model
from t2i_jax.evaluation.prompt_sets import pictures_of
from t2i_jax.metrics.latents import sums_of
from t2i_jax.parallel.compiler_flags import compiler_options
from t2i_jax.parallel.mesh import batch_sharding, replicated
from t2i_jax.parallel.sharding import parse_rules, place, shardings
from t2i_jax.systems import capabilities


class Reconstructor:
  """A first stage with its variables, ready to encode and decode.

  Attributes:
    system, tokenizers, mesh, variables: of the export, as of a `Pipeline`.
  """

  def __init__(self, model: Model, mesh: Mesh):
    exported = export.read(model.path)
    self.system, self.tokenizers, self.mesh = model.system, exported.tokenizers, mesh
    rules = parse_rules(exported.config.sharding.rules)
    self.variables = place(exported.variables, shardings(exported.variables, rules, mesh))

    def reconstruct(variables, images):
      pictures, moments = capabilities.reconstruct(self.system, variables, images)
      return {"images": pictures, "latents": sums_of(moments)}

    self._reconstruct = jax.jit(
      reconstruct, out_shardings=replicated(mesh),
      compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )

  def batches(
    self, source: Source, rows: range, total: int, size: int
  ) -> Iterator[Mapping[str, np.ndarray]]:
    """What becomes of a split's pictures; the next ones are read while the devices are at some.

    Args:
      source: the split.
      rows: numbers of its pictures, of all that are taken.
      total: how many are taken, as of `prompt_sets.rows_of`.
      size: pictures at a time, which divides over the devices.

    Yields:
      `images`, uint8 [size, H, W, 3]: decoded from the mean latents; and `latents`, float32
      [size, 4, c], as of `latents.sums_of`. The last ones are filled up.
    """
    sharding, waiting = batch_sharding(self.mesh), None
    for start in range(rows.start, rows.stop, size):
      images = pictures_of(source, np.arange(start, min(start + size, rows.stop)), total)
      images = np.pad(images, [(0, size - len(images)), (0, 0), (0, 0), (0, 0)])
      given = jax.make_array_from_callback(images.shape, sharding, images.__getitem__)
      with jax.set_mesh(self.mesh):
        made = self._reconstruct(self.variables, given)
      if waiting is not None:
        yield jax.tree.map(np.asarray, waiting)
      waiting = made
    if waiting is not None:
      yield jax.tree.map(np.asarray, waiting)


def described(model: Model, config: Any, split: str) -> str:
  """Which pictures went through which autoencoder and how, for every score of them.

  Args:
    model: the autoencoder.
    config: whose data set it is.
    split: of that.
  """
  name, defaults = config.data.name, data.default_options(config.data.name)
  options = [f" {k}={v}" for k, v in config.data.options.items() if v != defaults[k]]
  side = model.system.batch_spec()["image"].shape[0]
  compute = jnp.dtype(getattr(model.system, "dtype", jnp.float32)).name
  return (f"{name}{''.join(options)}, split {split}, at {side} px, from mean latents in {compute}, "
          f"autoencoder {model.digest[:16]}")
