"""The held-out loss of an export."""

from t2i_jax import caches
from t2i_jax.data.base import Source
from t2i_jax.hooks import HeldOutLoss
from t2i_jax.parallel.mesh import batch_shards
from t2i_jax.pipeline import Pipeline

BATCHES = 64  # at most


def held_out_loss(pipeline: Pipeline, source: Source, split: str, batch_size: int
                  ) -> dict[str, float]:
  """Means of the system's evaluation loss over a whole split (at most 64 batches), by name."""
  shards = batch_shards(pipeline.mesh)
  size = -(-batch_size // shards) * shards
  measure = HeldOutLoss(
    pipeline.system, source, caches.ReadText(pipeline.tokenizers), pipeline.mesh, size, BATCHES,
    0, split, None,
  )
  losses = measure.measure(pipeline.variables)
  return {name.removeprefix(f"{split}/"): value for name, value in losses.items()}
