"""What a run does every so often beside stepping: pictures of its state, and held-out loss."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from t2i_jax.data.base import Source
from t2i_jax.data.loader import evaluation_batches, fetch_rows
from t2i_jax.parallel.compiler_flags import compiler_options
from t2i_jax.parallel.distributed import is_primary
from t2i_jax.parallel.mesh import batch_sharding, batch_shards, host_rows, replicated
from t2i_jax.parallel.sharding import put
from t2i_jax.pipeline import Pipeline
from t2i_jax.systems.base import System
from t2i_jax.systems.capabilities import Evaluated, FirstStage, reconstruct, require
from t2i_jax.training.grids import prompt_grid, save_picture
from t2i_jax.training.state import State
from t2i_jax.training.writers import Writers


class DrawSamples:
  """Draws the same prompts from the same seed each time, as a grid in `samples/`."""

  name = "samples"

  def __init__(self, pipeline: Pipeline, prompts: Sequence[str], every: int, seed: int,
               options: dict[str, Any], workdir: epath.Path, writers: Writers):
    self.every = every
    self._pipeline, self._prompts, self._seed = pipeline, list(prompts), seed
    self._options, self._workdir, self._writers = options, workdir, writers

  def __call__(self, step: int, state: State) -> None:
    pictures = self._pipeline(
      self._prompts, self._seed, variables=state.variables(ema=True), **self._options
    )
    if not is_primary():
      return
    grid = prompt_grid(pictures, self._prompts)
    save_picture(self._workdir / "samples" / f"step_{step:08d}.png", grid)
    self._writers.images(step, "samples", np.asarray(grid))


class DrawReconstructions:
  """Pictures of a split, each beside what a first stage makes of its mean latents, in `samples/`.

  Always the same pictures.
  """

  name = "reconstructions"

  def __init__(self, system: System, source: Source, mesh: Mesh, count: int, every: int,
               workdir: epath.Path, writers: Writers):
    require(system, FirstStage, "drawing reconstructions")
    self.every = every
    self._source, self._mesh, self._count = source, mesh, count
    self._workdir, self._writers = workdir, writers

    self._reconstruct = jax.jit(
      lambda variables, images: reconstruct(system, variables, images)[0],
      out_shardings=replicated(mesh),
      compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )

  def __call__(self, step: int, state: State) -> None:
    shards = batch_shards(self._mesh)
    indices = np.arange(-(-self._count // shards) * shards) % len(self._source)
    rows = fetch_rows(self._source, indices, np.zeros(len(indices), np.uint64))[1]
    sharding = batch_sharding(self._mesh)
    images = jax.make_array_from_callback(
      rows.image.shape, sharding, lambda index: rows.image[index]
    )
    made = np.asarray(self._reconstruct(state.variables(ema=True), images))
    if not is_primary():
      return
    pairs = np.stack([rows.image, made], axis=1)[: self._count]
    texts = [text for caption in rows.captions[: self._count]
             for text in (caption, "as reconstructed")]
    columns = 2 * math.ceil(math.sqrt(self._count / 2))
    grid = prompt_grid(pairs.reshape(-1, *pairs.shape[2:]), texts, columns)
    save_picture(self._workdir / "samples" / f"step_{step:08d}.png", grid)
    self._writers.images(step, "reconstructions", np.asarray(grid))


class HeldOutLoss:
  """The mean of the system's evaluation loss over held-out rows, with the EMA parameters.

  Always the same rows, noise and times, so that steps can be compared.
  """

  def __init__(self, system: System, source: Source, read_text: Callable, mesh: Mesh,
               batch_size: int, batches: int, every: int, name: str, writers: Writers | None):
    require(system, Evaluated, "the held-out loss")
    self.every, self.name = every, f"held-out loss of {name}"
    self._source, self._read_text, self._mesh = source, read_text, mesh
    self._batch_size, self._batches, self._split = batch_size, batches, name
    self._writers = writers
    self._loss = jax.jit(
      system.evaluation_loss, out_shardings=replicated(mesh),
      compiler_options=compiler_options(mesh.devices.flat[0].platform),
    )
    self._whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))

  def __call__(self, step: int, state: State) -> None:
    self._writers.scalars(step, self.measure(state.variables(ema=True)))

  def measure(self, variables: Any) -> dict[str, float]:
    """Means over the valid rows, by `split/metric`."""
    sums: dict[str, float] = {}
    count = 0
    rows = host_rows(self._batch_size, self._mesh)
    batches = evaluation_batches(self._source, self._read_text, self._batch_size, rows)
    for i, batch in zip(range(self._batches), batches, strict=False):
      device_batch = put(batch, batch_sharding(self._mesh))
      losses = self._loss(variables, device_batch, jax.random.key(i))
      valid = np.asarray(self._whole(device_batch["valid"]))
      count += int(valid.sum())
      for key, values in losses.items():
        values = np.asarray(values, np.float64)
        sums[key] = sums.get(key, 0.0) + float(values[valid].sum())
    return {f"{self._split}/{key}": value / max(count, 1) for key, value in sums.items()}


def default_prompts(source: Source, count: int) -> list[str]:
  """The first captions of a split, for a run whose config names no prompts."""
  indices = np.arange(count) % len(source)
  return source.describe(indices, np.zeros(count, np.uint64)).captions
