"""Where config files begin: a system's sections on a data set, with what suits its captions."""

from typing import Any

from ml_collections import ConfigDict

from t2i_jax import data, systems
from t2i_jax.config import choose, shared_sections

DATASETS = {
  # Options of the data set, and settings of the text that suit its captions.
  "scenes": ({"levels": ("one",)}, {"length": 16, "vocab_size": 512}),
  "scenes_two": ({"levels": ("two",)}, {"length": 16, "vocab_size": 512}),
  "scenes_all": ({"levels": ("one", "two", "counts")}, {"length": 40, "vocab_size": 512}),
  "emoji": ({}, {"length": 24, "vocab_size": 2048}),
  "folder": ({}, {"length": 64, "vocab_size": 8192}),
  # Prepared by `python -m t2i_jax.data.prepare`.
  "coco": ({}, {"length": 32, "vocab_size": 8192}),
  "coco_2017": ({}, {"length": 32, "vocab_size": 8192}),
  "coco_karpathy": ({}, {"length": 32, "vocab_size": 8192}),
  "cub": ({}, {"length": 40, "vocab_size": 4096}),
  "flowers": ({}, {"length": 40, "vocab_size": 4096}),
  "flickr30k": ({}, {"length": 40, "vocab_size": 8192}),
  "visual_genome": ({}, {"length": 24, "vocab_size": 8192}),
  "cc3m": ({}, {"length": 40, "vocab_size": 16384}),
  "cc12m": ({}, {"length": 64, "vocab_size": 16384}),
  "webdataset": ({}, {"length": 64, "vocab_size": 16384}),
  "mixture": ({}, {"length": 64, "vocab_size": 16384}),
}

# For `optimizer.multipliers`, beside a rate of 3e-3: which of two objects is where is learned from
# the text at 1e-3 and not at all at 3e-3, which the denoiser needs for shapes (docs/learning.md).
SLOW_TEXT = ((r"^(text_encoder|draft)/", 0.33),)

# Of transformers, for `sharding.rules`: heads and units of the MLPs over `mesh.tensor`, where there
# is more than one (Shoeybi et al. 2019, section 3), all else over `mesh.fsdp`.
TRANSFORMER_RULES = (
  (r"((attention|mlp)(_\d+)?/out|(image|text|second)_out|mlp_out_\d+)/kernel$",
   "tensor(-2)+fsdp"),
  (r"(query|key|value|mlp/in|mlp_in_\d+)/(kernel|bias)$", "tensor(-1)+fsdp"),
  (".*", "fsdp"),
)


def base(system: str, dataset: str) -> ConfigDict:
  """All sections of a system's config on a data set, locked; values may be changed."""
  config = shared_sections()
  config.system = system
  sections = systems.default_sections(system)
  config.model = sections["model"]
  config.text = sections["text"]
  config.sample.options = sections["options"]
  config.data.name, config.data.options = dataset_of("dataset", dataset)
  config.text.update(DATASETS[dataset][1])
  return config.lock()


def dataset_of(what: str, dataset: str) -> tuple[str, ConfigDict]:
  """The name and the options of a data set, one of `DATASETS`; UserError, with `what`, if none."""
  options, _ = choose(what, dataset, DATASETS)
  # "scenes_two" are the scenes with other options.
  name = dataset if dataset in data.DATASETS else dataset.partition("_")[0]
  return name, ConfigDict({**data.default_options(name), **options})


def label(config: ConfigDict) -> tuple[tuple[str, int], ...]:
  """Has the data set give labels, if it has any; returns (attribute, number of classes) pairs."""
  labels = data.labels(config.data.name)
  if not labels:
    return ()
  config.data.options.labels = True
  if "captions" in config.data.options:
    config.data.options.captions = "class"  # what people say of a bird does not say its species
  return tuple(labels.items())


def text_or_labels(config: ConfigDict, encoder: str, labels: bool) -> None:
  """Sets what a transformer is conditioned on.

  Args:
    config: to be changed.
    encoder: `text.encoder`; if "", one that is trained with it on scenes and emoji, else a
      component.
    labels: whether the data set's labels are told in place of a text, where it has some.
  """
  default = "transformer" if config.data.name in ("scenes", "emoji") else "component"
  config.text.encoder = encoder or default
  known = data.labels(config.data.name)
  if labels and known:
    config.data.options.labels = True
    config.model.update(classes=tuple(known.items()), label_drop=0.1)
    config.text.encoder = "none"


def small(config: ConfigDict, **text: Any) -> None:
  """Makes a diffusion config's run one of an hour on two CPU cores.

  Args:
    config: to be changed.
    **text: of an encoder that is trained with it, beside its size.
  """
  if config.text.encoder == "transformer":
    config.text.update(width=64, heads=2, **text)
  config.train.update(duration="6000 steps", batch_size=16)
  config.optimizer.update(
    name="muon", learning_rate=3e-3, b2=0.99, weight_decay=0.01, schedule="cosine",
    warmup="50 steps", multipliers=SLOW_TEXT,
  )
  config.ema.decay = 0.999
  config.sample.options.steps = 25


def tiny(config: ConfigDict, text: bool = False) -> None:
  """Makes a config's run one of a few steps, of which tests and first tries see every part.

  Args:
    config: to be changed.
    text: whether a text encoder that is trained with it is made tiny too.
  """
  if text and config.text.encoder == "transformer":
    config.text.update(width=32, layers=1, heads=2, vocab_size=300, length=40)
  config.train.update(duration="4 steps", batch_size=8)
  config.optimizer.warmup = "2 steps"
  config.sample.count = 4
  if "steps" in config.sample.options:
    config.sample.options.steps = 4
  config.log.every = "1 steps"
