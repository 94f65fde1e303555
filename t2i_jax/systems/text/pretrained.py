"""A public text encoder (CLIP, T5, BERT, latent diffusion's), frozen, as a component.

`python -m t2i_jax.convert` makes an export of it, which is then another config's
`components.text_encoder`.
"""

import dataclasses
import json
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import UserError, unknown
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Batch, Conditioning
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.trees import NO_VARIABLES, Variables
from t2i_jax.text import bert, clip, t5

ENCODER = "encoder"
KINDS = ("clip", "t5", "bert", "ldm")


@dataclasses.dataclass(frozen=True, eq=False)
class PretrainedText(base.System):
  """One encoder; no player trains it.

  Attributes:
    text: of the config; of it only `length` is read.
    kind: one of `KINDS`.
    published: the model's own config.json, as transformers or diffusers write it.
    layer, final_norm, project: of `text.clip.CLIPText`.
    masked: whether padding is hidden from the encoder and from who reads its features. Stable
      Diffusion's models were trained with padding in sight; so was SD3's T5. Imagen's was not.
    null: ids of the empty caption, as many as `text.length`.
    null_tokens: how many of them are no padding.
    dtype: type of the computation.
  """

  text: TextConditioner
  kind: str = "clip"
  published: str = "{}"
  layer: int = -1
  final_norm: bool = True
  project: bool = False
  masked: bool = False
  null: tuple[int, ...] = ()
  null_tokens: int = 0
  dtype: Any = jnp.float32

  players = ()
  ema_groups = (ENCODER,)

  def __post_init__(self):
    if self.kind not in KINDS:
      raise unknown("model.kind", self.kind, KINDS)
    if len(self.null) != self.text.length:
      raise UserError(f"model.null has {len(self.null)} ids, text.length is {self.text.length}")
    self.network  # noqa: B018

  @cached_property
  def network(self):
    """The Flax module."""
    given = json.loads(self.published)
    if self.kind == "clip":
      config = clip.TextConfig.from_transformers(given)
      network = clip.CLIPText(
        config, self.layer, self.final_norm, project=self.project, dtype=self.dtype
      )
    elif self.kind == "t5":
      return t5.T5Encoder(t5.Config.from_transformers(given), self.dtype)
    elif self.kind == "bert":
      config = bert.Config.from_transformers(given)
      network = bert.BERT(config, dtype=self.dtype)
    else:
      config = bert.LDMConfig.from_diffusers(given)
      network = bert.LDMTransformer(config, self.dtype)
    if self.text.length > config.length:
      raise UserError(f"text.length={self.text.length} is more than the {config.length} positions "
                      f"that this {self.kind} has")
    return network

  def batch_spec(self) -> dict[str, base.Field]:
    return {}

  def init(self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES):
    ids = jnp.zeros((1, self.text.length), jnp.int32)
    return trees.as_group(ENCODER, self.network.init(rng, ids))

  def encode(self, variables: Variables, text: dict[str, Array]) -> Conditioning:
    """Features [B, L, D], and [B, P] of those that have a vector for the whole caption."""
    mask = text["mask"] if self.masked else None
    found = self.network.apply(trees.group(variables, ENCODER), text["ids"], mask)
    sequence, pooled = found if isinstance(found, tuple) else (found, None)
    return Conditioning(sequence=sequence, mask=mask, pooled=pooled)

  def null_text(self) -> dict[str, Any]:
    """`ids` and `mask` [L] of the empty caption."""
    at = np.arange(self.text.length)
    return {"ids": np.array(self.null, np.int32), "mask": at < self.null_tokens}

