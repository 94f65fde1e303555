"""The data set of a run: which of its splits are trained on, which are held out, and one opened."""

from ml_collections import ConfigDict

from t2i_jax import data
from t2i_jax.data.base import Source
from t2i_jax.errors import unknown
from t2i_jax.parallel.distributed import is_primary


def training_split(config: ConfigDict) -> str:
  """The split that is trained on."""
  return data.splits(config.data.name)[0]


def held_out_splits(config: ConfigDict) -> tuple[str, ...]:
  """The splits to evaluate on: those that the config names, else all that are not trained on."""
  there = data.splits(config.data.name)
  for name in config.evaluate.splits:
    if name not in there:
      raise unknown(f"split of data set '{config.data.name}'", name, there)
  return tuple(config.evaluate.splits) or there[1:]


def open_data(config: ConfigDict, split: str, resolution: int, log_dir: str | None = None,
              progress=None) -> Source:
  """A split of the config's data set, decoded into memory where it fits."""
  from t2i_jax.data.memory import in_memory

  source = data.open_source(
    config.data.name, split, resolution, config.seed, config.data.options.to_dict(),
    log_dir if is_primary() else None,
  )
  return in_memory(source, progress, memory_limit=config.data.memory_limit_mb << 20)
