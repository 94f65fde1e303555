"""t2i_jax: every family of text-to-image model, trained by one loop, in JAX."""

__version__ = "0.1.0"


def load(path, **kwargs):
  """Loads an export for sampling; see `t2i_jax.pipeline.Pipeline.load`."""
  from t2i_jax.pipeline import Pipeline

  return Pipeline.load(path, **kwargs)
