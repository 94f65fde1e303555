"""How every text-conditioned system turns a batch into conditioning.

The encoder is a network trained with the system (its variables are the group
`text_encoder`), or one or several components with frozen variables. Where a
batch brings the features that the components would give (`data/text_cache.py`),
those are taken in their place.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import UserError, unknown
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Batch, Conditioning
from t2i_jax.systems.checks import check_positive
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables
from t2i_jax.text.tokenizer import TRAINERS, null_text

GROUP = "text_encoder"
NULL_GROUP = "null_text"
TRAINED = ("transformer", "lstm", "bilstm")
ENCODERS = (*TRAINED, "component", "none")
POOLS = ("mean", "flatten")
NULLS = ("empty", "zeros", "learned")
# Of a null that is learned; small beside features of about one.
_NULL_SCALE = 0.02


def encoder_names(rows: tuple[str, ...]) -> tuple[str, ...]:
  """The names in `text.encoders`."""
  return tuple(name.strip() for row in rows for name in row.split("+"))


@dataclasses.dataclass(frozen=True, eq=False)
class TextConditioner:
  """Text to conditioning, with caption dropout for classifier-free guidance.

  Attributes:
    encoder: "transformer", "lstm" or "bilstm", trained with the system; "component", the frozen
      systems of `config.components` that `encoders` names; or "none" for no text.
    tokenizer: of a trained encoder, trained on the captions: "bpe" or "sentencepiece".
    length, vocab_size, width, layers, heads, pool: of a trained encoder.
    encoders: components, "a+b" where the features of two are put side by side, and one entry
      behind the other in the sequence; narrower entries are filled up with zeros. So SDXL has
      ("text_encoder+text_encoder_2",) and Stable Diffusion 3
      ("text_encoder+text_encoder_2", "text_encoder_3").
    pooled: components whose vectors are put side by side; empty for all that have one.
    drop: probability of training on the null condition in place of the caption
      (Ho and Salimans 2022, algorithm 1).
    drop_each: probability of doing so for each component by itself, besides (Esser et al. 2024,
      section 5.3: 0.464).
    null: the null condition: "empty", features of the empty caption; "zeros"; or "learned".
    cache: folder of `precompute text`, whose features are trained on.
    components: the frozen encoders by name.
    cached_null: features of the empty caption [1, ...] by encoder and field, where
      batches bring features.
    dtype: type of the computation.
  """

  encoder: str = "transformer"
  tokenizer: str = "bpe"
  length: int = 32
  vocab_size: int = 512
  width: int = 128
  layers: int = 2
  heads: int = 4
  pool: str = "mean"
  encoders: tuple[str, ...] = (GROUP,)
  pooled: tuple[str, ...] = ()
  drop: float = 0.1
  drop_each: float = 0.0
  null: str = "empty"
  cache: str = ""
  components: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  cached_null: Mapping[str, Mapping[str, np.ndarray]] | None = None
  dtype: Any = jnp.float32

  def __post_init__(self):
    for kind, value, valid in (
      ("encoder", self.encoder, ENCODERS), ("tokenizer", self.tokenizer, TRAINERS),
      ("pool", self.pool, POOLS), ("null", self.null, NULLS),
    ):
      if value not in valid:
        raise unknown(f"text {kind}", value, valid)
    check_positive("text", self, "length", "width", "layers", "heads")
    for name in ("drop", "drop_each"):
      if not 0.0 <= getattr(self, name) <= 1.0:
        raise UserError(f"text.{name}={getattr(self, name)} is no probability; use 0 to 1")
    if self.encoder == "transformer" and self.width % self.heads:
      raise UserError(
        f"text.heads={self.heads} does not divide text.width={self.width}; change one of them"
      )
    if self.encoder == "bilstm" and self.width < 2:
      raise UserError(f"text.width={self.width} cannot be shared by two directions; use 2 or more")
    self._check_encoders()

  def _check_encoders(self):
    if self.encoder != "component":
      for name, default in (("encoders", (GROUP,)), ("cache", "")):
        value = getattr(self, name)
        if value != default:
          raise UserError(f"text.{name}={value} is of frozen encoders, and text.encoder="
                          f"{self.encoder} is trained; set text.encoder=component")
    if self.encoder == "none":
      if self.null != "empty":
        raise UserError(f"text.null={self.null} is of a text, and text.encoder=none has none; set "
                        "text.null=empty")
      return
    if not all(self.names) or not self.names or len(set(self.names)) != len(self.names):
      raise UserError(f"text.encoders={self.encoders}: name each encoder once")
    for name in self.pooled:
      if name not in self.names:
        raise unknown("encoder in text.pooled", name, self.names)

  @property
  def names(self) -> tuple[str, ...]:
    """The encoders, in order."""
    return () if self.encoder == "none" else encoder_names(self.encoders)

  @property
  def groups(self) -> tuple[str, ...]:
    """The groups that a player must train."""
    trained = (GROUP,) if self.encoder in TRAINED else ()
    return trained + ((NULL_GROUP,) if self.null == "learned" else ())

  @property
  def frozen_groups(self) -> tuple[str, ...]:
    """The groups that an export must hold besides."""
    return self.names if self.encoder == "component" else ()

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

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    """Variables of a trained encoder and of a learned null; nothing for the other kinds."""
    variables: dict[str, dict[str, Any]] = {}
    if self.encoder in TRAINED:
      text = batch["text"][GROUP]
      variables = trees.as_group(GROUP, self.network.init(rng, text["ids"], text["mask"]))
    if self.null != "learned":
      return variables
    parts = jax.eval_shape(
      lambda frozen, batch: self.each(trees.merge(variables, frozen), batch), dict(frozen), batch
    )
    null = {
      name: {
        field: _NULL_SCALE * jax.random.normal(
          fold_name(rng, f"{name}/{field}"), getattr(part, field).shape[1:]
        )
        for field in ("sequence", "pooled") if getattr(part, field) is not None
      }
      for name, part in parts.items()
    }  # fmt: skip
    return trees.merge(variables, {"params": {NULL_GROUP: null}})

  def batch_spec(self) -> dict[str, base.Field]:
    """What the encoders read of a batch."""
    if self.cached_null is not None:
      return {
        f"text_embedding/{name}/{field}": base.Field(tuple(value.shape[1:]), str(value.dtype))
        for name, fields in self.cached_null.items() for field, value in fields.items()
      }  # fmt: skip
    return {
      f"text/{name}/{field}": base.Field(self.null_text(name)["ids"].shape[1:], dtype)
      for name in self.names for field, dtype in (("ids", "int32"), ("mask", "bool"))
    }  # fmt: skip

  def __call__(self, variables: Variables, batch: Batch, rng: Array | None = None) -> Conditioning:
    """Conditioning of a batch; with `rng`, captions are dropped as in training."""
    return self._combined(self.each(variables, batch, rng))

  def with_null(self, variables: Variables, batch: Batch) -> Conditioning:
    """Conditioning that carries its own null, for guidance when sampling; none without a text."""
    if not self.names:
      return Conditioning()
    parts = self.each(variables, batch)
    rows = _rows(batch)
    null = self._combined({
      name: self._null(name, variables, part, _is_cached(batch)) for name, part in parts.items()
    })
    null = jax.tree.map(lambda x: jnp.repeat(x, rows, axis=0), null)
    return self._combined(parts).replace(null=null)

  def each(
    self, variables: Variables, batch: Batch, rng: Array | None = None
  ) -> dict[str, Conditioning]:
    """What each encoder by itself makes of a batch."""
    parts = {}
    for name in self.names:
      dropped = self._dropped(rng, name, _rows(batch))
      if _is_cached(batch):
        given = _features(batch["text_embedding"][name])
      else:
        text = batch["text"][name]
        if dropped is not None and self.null == "empty":
          null = self.null_text(name)
          text = {k: _where(dropped, null[k], text[k]) for k in ("ids", "mask")}
          dropped = None
        given = self._encode(name, variables, text)
      if dropped is not None:
        null = self._null(name, variables, given, _is_cached(batch))
        given = jax.tree.map(lambda yes, no: _where(dropped, yes, no), null, given)  # noqa: B023
      parts[name] = given
    return parts

  def null_text(self, name: str = GROUP) -> dict[str, Array]:
    """`ids` and `mask` [1, L] of the empty caption."""
    if self.encoder == "component":
      text = self.components[name].null_text()
    else:
      text = null_text(self.length)
    return {k: np.reshape(np.asarray(text[k]), (1, -1)) for k in ("ids", "mask")}

  def _dropped(self, rng: Array | None, name: str, rows: int) -> Array | None:
    """bool [B], the rows whose caption this encoder is not shown; None for none."""
    if rng is None:
      return None
    draws = [
      jax.random.bernoulli(fold_name(rng, draw), probability, (rows,))
      for draw, probability in (
        ("caption_dropout", self.drop), (f"caption_dropout/{name}", self.drop_each)
      )
      if probability > 0
    ]  # fmt: skip
    return jnp.any(jnp.stack(draws), axis=0) if draws else None

  def _encode(self, name: str, variables: Variables, text: Mapping[str, Array]) -> Conditioning:
    if self.encoder == "component":
      return self.components[name].encode(trees.group(variables, name), text)
    sequence, pooled = self.network.apply(
      trees.group(variables, GROUP), text["ids"], text["mask"]
    )
    return Conditioning(sequence=sequence, mask=text["mask"], pooled=pooled)

  def _null(
    self, name: str, variables: Variables, like: Conditioning, cached: bool
  ) -> Conditioning:
    """One encoder's null condition, one row, with the fields of `like`."""
    if self.null == "empty":
      if cached:
        return _features({k: jnp.asarray(v) for k, v in self.cached_null[name].items()})
      return self._encode(name, variables, self.null_text(name))
    if self.null == "learned":
      null = variables["params"][NULL_GROUP][name]
      null = Conditioning(**{field: value[None] for field, value in null.items()})
    else:
      null = jax.tree.map(lambda x: jnp.zeros_like(x[:1]), like.replace(mask=None))
    # All its tokens count: with none, attention would have nowhere to look.
    return null.replace(mask=None if like.mask is None else jnp.ones_like(like.mask[:1]))

  def _combined(self, parts: Mapping[str, Conditioning]) -> Conditioning:
    """The parts put together as `encoders` and `pooled` say."""
    if not parts:
      return Conditioning()
    if len(parts) == 1:
      (part,) = parts.values()
      return part
    rows = [[parts[name] for name in encoder_names((row,))] for row in self.encoders]
    rows = [_side_by_side(row, entry) for row, entry in zip(rows, self.encoders, strict=True)]
    masks = None
    if any(row.mask is not None for row in rows):
      masks = jnp.concatenate(
        [jnp.ones(row.sequence.shape[:2], bool) if row.mask is None else row.mask for row in rows],
        axis=1,
      )
    width = max(row.sequence.shape[-1] for row in rows)
    sequences = [
      jnp.pad(row.sequence, ((0, 0), (0, 0), (0, width - row.sequence.shape[-1]))) for row in rows
    ]
    names = self.pooled or [name for name in self.names if parts[name].pooled is not None]
    for name in names:
      if parts[name].pooled is None:
        raise UserError(f"text.pooled names '{name}', which has no vector for the whole caption")
    pooled = jnp.concatenate([parts[name].pooled for name in names], axis=-1) if names else None
    return Conditioning(jnp.concatenate(sequences, axis=1), masks, pooled)


def _side_by_side(parts: list[Conditioning], entry: str) -> Conditioning:
  """Features of several encoders for the same tokens; a token counts where it does for any."""
  lengths = [part.sequence.shape[1] for part in parts]
  if len(set(lengths)) > 1:
    raise UserError(f"text.encoders: {entry} have {lengths} tokens, and only equally many can be "
                    "put side by side; convert them with the same --length")
  masks = [part.mask for part in parts]
  mask = None
  if all(given is not None for given in masks):
    mask = jnp.any(jnp.stack(masks), axis=0)
  return Conditioning(jnp.concatenate([part.sequence for part in parts], axis=-1), mask)


def _is_cached(batch: Batch) -> bool:
  return "text_embedding" in batch


def _rows(batch: Batch) -> int:
  return jax.tree.leaves(batch["text_embedding" if _is_cached(batch) else "text"])[0].shape[0]


def _features(given: Mapping[str, Array]) -> Conditioning:
  """Stored features, which may be bfloat16, as they come from an encoder."""
  return Conditioning(**{
    name: value if value.dtype == bool else value.astype(jnp.float32)
    for name, value in given.items()
  })


def _where(rows: Array, yes: Array, no: Array) -> Array:
  """`yes` [1, ...] in the rows that are marked, `no` [B, ...] in the others."""
  return jnp.where(rows.reshape(-1, *(1,) * (no.ndim - 1)), yes, no)
