"""A text encoder as a system of its own: a table of the tokens, for runs that take it frozen."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import config, data, export, recipe, systems, tokenizing
from t2i_jax.systems import base
from t2i_jax.systems.base import Conditioning
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.trees import NO_VARIABLES
from t2i_jax.text.tokenizer import null_text

VOCAB, LENGTH, WIDTH = 300, 40, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder(base.System):
  """Rows of a table, and their mean."""

  text: TextConditioner
  dtype: Any = jnp.float32
  players = ()
  ema_groups = ("table",)

  def batch_spec(self):
    return {}

  def init(self, rng, batch, frozen=NO_VARIABLES):
    return {"params": {"table": {"rows": jax.random.normal(rng, (VOCAB, WIDTH))}}}

  def encode(self, variables, text):
    rows = variables["params"]["table"]["rows"][text["ids"]]
    return Conditioning(rows, text["mask"], jnp.mean(rows, axis=1))

  def null_text(self):
    return null_text(LENGTH)


systems.SYSTEMS["encoder"] = "encoder:Encoder"


def make(path, scale):
  """Exports an encoder with entries of this size."""
  given = recipe.base("encoder", "scenes")
  given.text.update(length=LENGTH, vocab_size=VOCAB)
  given = config.from_json(config.to_json(given))
  source = data.open_source("scenes", "train", 16, 0, {"levels": ("one",)})
  rows = scale * np.random.default_rng(0).normal(size=(VOCAB, WIDTH)).astype(np.float32)
  tokenizers = tokenizing.make_tokenizer(given, source)
  return export.write(path, given, 1, {"params": {"table": {"rows": rows}}}, tokenizers)
