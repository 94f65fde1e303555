"""What was computed before a run, opened for it: features of captions, latents of pictures."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from t2i_jax import assembly, batch_spec, data, run_data
from t2i_jax.data.base import Source
from t2i_jax.data.latent_cache import LatentCache, LatentSource
from t2i_jax.data.text_cache import TextCache
from t2i_jax.errors import UserError, unknown
from t2i_jax.systems import base
from t2i_jax.systems.capabilities import FirstStage, require
from t2i_jax.systems.conditioning import encoder_names
from t2i_jax.text.tokenizer import Tokenizers

FIRST_STAGE = "first_stage"


def open_text_cache(config: ConfigDict, components: assembly.Components) -> TextCache | None:
  """The cache of `config.text.cache`, if it names one; its encoders then rest.

  Raises:
    UserError: for one that is not whole, or that other encoders made.
  """
  if not config.text.cache:
    return None
  names = encoder_names(config.text.encoders)
  cache = TextCache(config.text.cache, names)
  for name in names:
    if name not in components.about:
      raise UserError(f"text.cache={config.text.cache} is trained on, and pictures of prompts are "
                      f"drawn with the encoder: set components.{name}=PATH of its export")
  cache.check({name: components.about[name]["fingerprint"] for name in names})
  components.resting = (*components.resting, *names)
  return cache


@dataclasses.dataclass(frozen=True)
class ReadText:
  """Turns captions into a batch's `text`, or, with a cache, its `text_embedding`."""

  tokenizers: Tokenizers
  cache: TextCache | None = None

  def __call__(self, captions: list[str]) -> dict[str, Any]:
    if self.cache is not None:
      return {"text_embedding": self.cache.lookup(captions)}
    return {"text": self.tokenizers.encode(captions)}

  def check(self, source: Source, name: str) -> None:
    """Raises UserError where the cache lacks a caption of the data set of that name."""
    if self.cache is not None:
      self.cache.check_captions(source.every_caption(), name)


class Latents:
  """The cache of `config.data.latents`, whose splits take the place of the data set's.

  The data set is opened with the seed that it had when the cache was made, so that runs of other
  seeds train on the same pictures, in another order.

  Attributes:
    field: what a batch brings of each picture.
    statistics: mean and standard deviation of the training split's latents.

  Raises:
    UserError: for a cache that is not whole, or that another first stage made.
  """

  def __init__(self, config: ConfigDict, fingerprint: str):
    self._config, self._fingerprint = config, fingerprint
    cache = self._open(run_data.training_split(config))
    self.field = base.Field(cache.shape, str(cache.dtype))
    self.statistics = (cache.statistics["mean"], cache.statistics["std"])

  def _open(self, split: str) -> LatentCache:
    cache = LatentCache(self._config.data.latents, split)
    cache.check(self._fingerprint)
    return cache

  def source(self, split: str, resolution: int, log_dir: str | None = None) -> LatentSource:
    """A split with latents, by row.

    Raises:
      UserError: the cache does not hold it, or holds other pictures' latents.
    """
    given, cache = self._config.data, self._open(split)
    if base.Field(cache.shape, str(cache.dtype)) != self.field:
      raise UserError(f"data.latents={given.latents}: its split '{split}' is "
                      f"{cache.dtype}{list(cache.shape)}, the training split "
                      f"{self.field.dtype}{list(self.field.shape)}; make it again with the same "
                      "--dtype")
    options = given.options.to_dict()
    source = data.open_source(given.name, split, resolution, cache.data["seed"], options, log_dir)
    if source.buckets is not None:
      raise UserError(f"data.latents={given.latents}: latents are of squares; leave it or "
                      f"data.options.{data.BUCKETS} out")
    cache.check_data(source, given.name, options)
    return LatentSource(source, cache)


def open_latents(config: ConfigDict, components: assembly.Components) -> Latents | None:
  """The latents of `config.data.latents`, if it names a cache; the first stage then rests.

  Raises:
    UserError: for a cache that is not whole, or that another first stage made.
  """
  if not config.data.latents:
    return None
  if FIRST_STAGE not in components.about:
    raise UserError(f"data.latents={config.data.latents} is trained on, and pictures are drawn "
                    f"with its first stage: set components.{FIRST_STAGE}=PATH of its export")
  require(components.systems[FIRST_STAGE], FirstStage, f"components.{FIRST_STAGE}")
  latents = Latents(config, components.about[FIRST_STAGE]["fingerprint"])
  components.resting = (*components.resting, FIRST_STAGE)
  return latents


def open_split(config: ConfigDict, split: str, system: base.System, latents: Latents | None,
               log_dir: str | None = None) -> Source:
  """A split of the config's data set, with latents in place of pictures where they are cached."""
  side = batch_spec.resolution_of(system)
  if latents is not None:
    return latents.source(split, side, log_dir)
  return run_data.open_data(config, split, side, log_dir)


def to_compute(config: ConfigDict, names: tuple[str, ...]) -> ConfigDict:
  """A copy of a config for what computes a cache: with these of its components, and no run's."""
  config = config.copy_and_resolve_references()
  config.resume = ""  # whose copy of the components is for training to take
  with config.unlocked():
    config.components = ConfigDict({
      name: path for name, path in config.components.items() if name in names
    })
  return config


def chosen_splits(config: ConfigDict, names: tuple[str, ...]) -> tuple[str, ...]:
  """The splits of the config's data set that are named, or all; UserError for an unknown one."""
  there = data.splits(config.data.name)
  for name in names:
    if name not in there:
      raise unknown(f"split of data set '{config.data.name}'", name, there)
  return tuple(dict.fromkeys(names)) or there
