"""A run's tokenizers: trained on its captions, or those of what it goes on from or is built on."""

import itertools
from collections.abc import Iterable, Mapping

from etils import epath
from ml_collections import ConfigDict

from t2i_jax import config as configs
from t2i_jax import export, systems
from t2i_jax.assembly import naming_differences
from t2i_jax.data.base import Source
from t2i_jax.errors import UserError
from t2i_jax.parallel.distributed import broadcast_bytes, is_primary
from t2i_jax.systems.conditioning import GROUP, encoder_names
from t2i_jax.text.tokenizer import Tokenizers, train_tokenizer
from t2i_jax.workdirs import CONFIG, TOKENIZER


def make_tokenizer(config: ConfigDict, source: Source) -> Tokenizers:
  """Trains the run's tokenizer on the training captions; the same on every host."""
  made = None
  if is_primary():
    text = config.text
    trained = train_tokenizer(source.captions(), text.vocab_size, text.length, text.tokenizer)
    made = Tokenizers({GROUP: trained}).to_json().encode()
  return Tokenizers.from_json(broadcast_bytes(made).decode())


def run_tokenizers(
  config: ConfigDict, workdir: epath.Path, source: Source, given: Mapping[str, Tokenizers]
) -> Tokenizers:
  """The run's tokenizers: its own, those of `resume`, of frozen text encoders or of `init_from`.

  A model keeps the ids that it knows; where none does, a tokenizer is trained. There are none for
  a system that reads no text.

  Args:
    config, workdir: of the run.
    source: whose captions a new one is trained on.
    given: the components'.

  Raises:
    UserError: for a tokenizer that cannot be read, or of another length than the config's.
  """
  if not systems.load(config.system).reads_text:
    return Tokenizers({})
  if (workdir / CONFIG).exists():
    return Tokenizers.load(workdir / TOKENIZER)
  text_of = systems.load(config.system).text_of
  if text_of or config.text.encoder in ("component", "none"):
    if config.resume:
      return Tokenizers.load(epath.Path(config.resume) / TOKENIZER)
    if text_of:
      return given[text_of]
    if config.text.encoder == "none":
      return Tokenizers({})
    return component_tokenizers(config, given)
  if config.resume:
    key, tokenizers = "resume", Tokenizers.load(epath.Path(config.resume) / TOKENIZER)
  elif config.init_from:
    exported = export.read(config.init_from)
    key, tokenizers = "init_from", exported.tokenizers
    if set(tokenizers.of) != {GROUP}:
      raise UserError(f"init_from={config.init_from} reads text with the frozen "
                      f"{', '.join(tokenizers.of)}; set text.encoder=component and its components")
    if tokenizers.of[GROUP].length != config.text.length:
      with naming_differences(config, exported.config):
        raise UserError(f"init_from={config.init_from} takes prompts of "
                        f"{tokenizers.of[GROUP].length} tokens")
  else:
    return make_tokenizer(config, source)
  lengths = [tokenizer.length for tokenizer in tokenizers.of.values()]
  if lengths != [config.text.length]:
    value = configs.flatten(config).get(key)
    raise UserError(f"{key}={value} takes prompts of {lengths[0]} tokens, the config "
                    f"has text.length={config.text.length}; set it to the same")
  return tokenizers


def component_tokenizers(config: ConfigDict, given: Mapping[str, Tokenizers]) -> Tokenizers:
  """The tokenizers of `text.encoders`, out of those that components have."""
  return Tokenizers({name: given[name].of[GROUP] for name in encoder_names(config.text.encoders)})


def truncated_captions(
  config: ConfigDict, tokenizers: Tokenizers, captions: Iterable[str]
) -> list[str]:
  """A line for each encoder that does not take captions whole, judged by the first 2,000."""
  key = "--length of its conversion" if config.text.encoder == "component" else "text.length"
  captions, lines = list(itertools.islice(captions, 2000)), []
  for name, tokenizer in tokenizers.of.items():
    lengths = tokenizer.lengths(captions)
    share = float((lengths > tokenizer.length).mean())
    if share:
      lines.append(f"{share:.0%} of the captions are longer than the {tokenizer.length} tokens "
                   f"that {name} takes ({key}), and are cut; the longest has {lengths.max()}")
  return lines
