"""How every text-conditioned system turns a batch into conditioning.

The encoder is a network trained with the system (its variables are the group
`text_encoder`), or a component with frozen variables, or none at all where
the batch brings features that were computed before.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import UserError, unknown
from t2i_jax.systems import base
from t2i_jax.systems.base import Array, Batch, Conditioning, Variables
from t2i_jax.text.tokenizer import null_text

GROUP = "text_encoder"
TRAINED = ("transformer", "lstm", "bilstm")
ENCODERS = (*TRAINED, "component", "precomputed")
POOLS = ("mean", "flatten")


@dataclasses.dataclass(frozen=True, eq=False)
class TextConditioner:
  """Text to conditioning, with caption dropout for classifier-free guidance.

  Attributes:
    encoder: "transformer", "lstm" or "bilstm", trained with the system; "component", the
      frozen system of `config.components.text_encoder`; "precomputed", features
      that the data set brings as `text_embedding`.
    length, vocab_size: of the tokenizer.
    width, layers, heads, pool: of a trained encoder.
    drop: probability of training on the null condition in place of the caption
      (Ho and Salimans 2022, algorithm 1).
    null_embedding: `sequence`, `mask` and `pooled` of the null condition, [1, ...]
      each, for precomputed features.
    component: the frozen encoder.
    dtype: type of the computation.
  """

  encoder: str = "transformer"
  length: int = 32
  vocab_size: int = 512
  width: int = 128
  layers: int = 2
  heads: int = 4
  pool: str = "mean"
  drop: float = 0.1
  null_embedding: dict[str, np.ndarray] | None = None
  component: Any = None
  dtype: Any = jnp.float32

  def __post_init__(self):
    for kind, value, valid in (("encoder", self.encoder, ENCODERS), ("pool", self.pool, POOLS)):
      if value not in valid:
        raise unknown(f"text {kind}", value, valid)
    base.check_positive("text", self, "length", "width", "layers", "heads")
    if not 0.0 <= self.drop <= 1.0:
      raise UserError(f"text.drop={self.drop} is no probability; use 0 to 1")
    if self.encoder == "transformer" and self.width % self.heads:
      raise UserError(
        f"text.heads={self.heads} does not divide text.width={self.width}; change one of them"
      )
    if self.encoder == "bilstm" and self.width < 2:
      raise UserError(f"text.width={self.width} cannot be shared by two directions; use 2 or more")
    if self.encoder == "precomputed" and self.null_embedding is None:
      raise UserError("text.encoder=precomputed needs the features of the empty caption too")

  @property
  def groups(self) -> tuple[str, ...]:
    """The group that a player must train, if the encoder is trained."""
    return (GROUP,) if self.encoder in TRAINED else ()

  @property
  def frozen_groups(self) -> tuple[str, ...]:
    """The group that an export must hold, if the encoder is a component."""
    return (GROUP,) if self.encoder == "component" else ()

  @property
  def network(self) -> nn.Module:
    """The trained encoder's network: ids, mask -> features [B, L, D], pooled [B, P]."""
    if self.encoder in ("lstm", "bilstm"):
      from t2i_jax.text.lstm import LSTMEncoder

      return LSTMEncoder(
        self.vocab_size, self.width, self.encoder == "bilstm", self.dtype
      )
    from t2i_jax.text.transformer import TransformerEncoder

    return TransformerEncoder(
      self.vocab_size, self.length, self.width, self.layers, self.heads, self.pool, self.dtype
    )

  def init(self, rng: Array, batch: Batch) -> dict[str, dict[str, Any]]:
    """Variables of the trained encoder; nothing for the other kinds."""
    if not self.groups:
      return {}
    text = batch["text"][GROUP]
    return base.as_group(GROUP, self.network.init(rng, text["ids"], text["mask"]))

  def batch_spec(self) -> dict[str, base.Field]:
    """What the encoder reads of a batch."""
    if self.encoder == "precomputed":
      return {
        f"text_embedding/{name}": base.Field(tuple(value.shape[1:]), str(value.dtype))
        for name, value in self.null_embedding.items()
      }
    return {
      f"text/{GROUP}/ids": base.Field((self.length,), "int32"),
      f"text/{GROUP}/mask": base.Field((self.length,), "bool"),
    }

  def __call__(self, variables: Variables, batch: Batch, rng: Array | None = None) -> Conditioning:
    """Conditioning of a batch; with `rng`, captions are dropped as in training."""
    rows = jax.tree.leaves(batch.get("text", batch.get("text_embedding")))[0].shape[0]
    dropped = None
    if rng is not None and self.drop > 0:
      dropped = jax.random.bernoulli(base.fold_name(rng, "caption_dropout"), self.drop, (rows,))
    if self.encoder == "precomputed":
      given = batch["text_embedding"]
      if dropped is not None:
        given = {k: _where(dropped, self.null_embedding[k], v) for k, v in given.items()}
      return Conditioning(given.get("sequence"), given.get("mask"), given.get("pooled"))
    text = batch["text"][GROUP]
    if dropped is not None:
      null = self.null_text(1)
      text = {k: _where(dropped, null[k], text[k]) for k in ("ids", "mask")}
    return self._encode(variables, text)

  def with_null(self, variables: Variables, batch: Batch) -> Conditioning:
    """Conditioning that carries its own null, for guidance when sampling."""
    conditioning = self(variables, batch)
    rows = jax.tree.leaves(conditioning)[0].shape[0]
    if self.encoder == "precomputed":
      null = {k: jnp.repeat(jnp.asarray(v), rows, 0) for k, v in self.null_embedding.items()}
      null = Conditioning(null.get("sequence"), null.get("mask"), null.get("pooled"))
    else:
      null = self._encode(variables, self.null_text(1))
      null = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), null)
    return conditioning.replace(null=null)

  def null_text(self, rows: int) -> dict[str, Array]:
    """`ids` and `mask` [rows, L] of the empty prompt."""
    if self.encoder == "component":
      text = self.component.null_text()
    else:
      text = null_text(self.length)
    return {name: jnp.tile(jnp.asarray(text[name]), (rows, 1)) for name in ("ids", "mask")}

  def _encode(self, variables: Variables, text: dict[str, Array]) -> Conditioning:
    if self.encoder == "component":
      return self.component.encode(base.group(variables, GROUP), text)
    sequence, pooled = self.network.apply(
      base.group(variables, GROUP), text["ids"], text["mask"]
    )
    return Conditioning(sequence=sequence, mask=text["mask"], pooled=pooled)


def _where(rows: Array, yes: Array, no: Array) -> Array:
  """`yes` [1, ...] in the rows that are marked, `no` [B, ...] in the others."""
  return jnp.where(rows.reshape(-1, *(1,) * (no.ndim - 1)), yes, no)
