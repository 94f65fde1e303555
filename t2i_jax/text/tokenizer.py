"""Captions to token ids: a tokenizer trained on a data set's captions, or a public one.

Either is kept in the export as the `tokenizers` library's JSON, one for each text encoder.
"""

import collections
import dataclasses
import html
import io
import itertools
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from etils import epath

from t2i_jax.errors import UserError, unknown

PAD, START, END = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")
_LEAST_PIECES = 32


def clean_as_clip(caption: str) -> str:
  """As the captions of CLIP's training were cleaned: broken encodings, HTML entities, white space.

  (Its tokenizer takes lower case by itself.)
  """
  import ftfy

  # Entities of entities occur in what is scraped from the web.
  caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
  return " ".join(caption.split())


CLEANERS: dict[str, Callable[[str], str]] = {"": lambda caption: caption, "clip": clean_as_clip}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
  """Captions to ids: start, tokens, end and padding, or cut to fit.

  Attributes:
    definition: the `tokenizers` library's JSON.
    length: tokens a caption takes, the markers included.
    start, end: ids of the markers; None for no such marker.
    pad: id of the padding.
    clean: name of a `CLEANERS`, applied to captions first; "" for none.
  """

  definition: str
  length: int
  start: int | None = START
  end: int | None = END
  pad: int = PAD
  clean: str = ""

  @cached_property
  def _backend(self):
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(self.definition)
    backend.no_padding()
    backend.no_truncation()
    # "<end>" in a caption is five letters, not the marker.
    backend.encode_special_tokens = True
    return backend

  @property
  def vocab_size(self) -> int:
    """Ids that the tokenizer can give."""
    return self._backend.get_vocab_size()

  def encode(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """`ids` int32 [n, length] and `mask` bool [n, length] of n captions."""
    ids = np.full((len(captions), self.length), self.pad, np.int32)
    mask = np.zeros(ids.shape, bool)
    before, after = ([marker] * (marker is not None) for marker in (self.start, self.end))
    for row, encoding in enumerate(self._encoded(captions)):
      tokens = [*before, *encoding.ids[: self._room], *after]
      ids[row, : len(tokens)] = tokens
      mask[row, : len(tokens)] = True
    return {"ids": ids, "mask": mask}

  def null(self) -> dict[str, np.ndarray]:
    """`ids` and `mask` [length] of the empty caption."""
    return {name: value[0] for name, value in self.encode([""]).items()}

  @property
  def _room(self) -> int:
    """Tokens of a caption itself."""
    return self.length - (self.start is not None) - (self.end is not None)

  def _encoded(self, captions: Sequence[str]) -> list:
    captions = [CLEANERS[self.clean](caption) for caption in captions]
    return self._backend.encode_batch(captions, add_special_tokens=False)

  def lengths(self, captions: Sequence[str]) -> np.ndarray:
    """Tokens int [n] that n captions have, markers included, before any is cut."""
    markers = self.length - self._room
    return np.array([markers + len(e.ids) for e in self._encoded(captions)], int)

  def truncated(self, caption: str) -> str | None:
    """What is cut off the end of `caption`, or None when it fits."""
    (encoding,) = self._encoded([caption])
    if len(encoding.ids) <= self._room:
      return None
    return CLEANERS[self.clean](caption)[encoding.offsets[self._room][0] :].strip()

  def to_dict(self) -> dict[str, Any]:
    """What `from_dict` reads, for JSON."""
    about = {name: getattr(self, name) for name in ("length", "start", "end", "pad", "clean")}
    return {**about, "definition": json.loads(self.definition)}

  @classmethod
  def from_dict(cls, content: Mapping[str, Any]) -> "Tokenizer":
    """Reads what `to_dict` gave.

    Raises:
      ValueError: for anything else.
    """
    try:
      about = dict(content)
      tokenizer = cls(json.dumps(about.pop("definition")), **about)
      if not isinstance(tokenizer.length, int) or tokenizer.clean not in CLEANERS:
        raise TypeError("its length is no number, or its cleaning is unknown")
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(f"it has no definition and length ({error})") from error
    try:
      tokenizer._backend  # noqa: B018
    except Exception as error:  # The library raises nothing narrower.
      raise ValueError(f"its definition cannot be read ({error})") from error
    return tokenizer


@dataclasses.dataclass(frozen=True)
class Tokenizers:
  """The tokenizer of each text encoder of a model.

  Attributes:
    of: by the encoder's name.
  """

  of: Mapping[str, Tokenizer]

  def encode(self, captions: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """What a batch has as `text`: `ids` and `mask` [n, length] of n captions, by encoder."""
    return {name: tokenizer.encode(captions) for name, tokenizer in self.of.items()}

  def truncated(self, caption: str) -> str | None:
    """A line that says what of `caption` does not reach an encoder, or None when all does."""
    cut = []
    for name, tokenizer in self.of.items():
      lost = tokenizer.truncated(caption)
      if lost is not None:
        lost = lost if len(lost) <= 80 else f"{lost[:80]}..."
        which = f"'{name}'" if len(self.of) > 1 else "the encoder"
        cut.append(f"the {tokenizer.length} tokens that {which} takes: '{lost}' is cut off")
    return f"prompt '{caption[:40]}...' is longer than {'; and than '.join(cut)}" if cut else None

  def to_json(self) -> str:
    """The tokenizers as text that `from_json` reads."""
    return json.dumps({name: tokenizer.to_dict() for name, tokenizer in self.of.items()})

  @classmethod
  def from_json(cls, text: str) -> "Tokenizers":
    """Reads what `to_json` wrote.

    Raises:
      ValueError: for anything else.
    """
    content = json.loads(text)
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
      raise ValueError("it names no encoders")
    return cls({name: Tokenizer.from_dict(given) for name, given in content.items()})

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Tokenizers":
    """Reads a tokenizer file.

    Raises:
      UserError: where there is none, or another file's content.
    """
    try:
      return cls.from_json(epath.Path(path).read_text())
    except FileNotFoundError:
      raise UserError(f"no tokenizer at {path}; the folder is not whole") from None
    except OSError as error:
      raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
      raise UserError(f"{path} is not a tokenizer of this project: {error}") from None


def null_text(length: int) -> dict[str, np.ndarray]:
  """`ids` and `mask` [length] of the empty prompt, the same for every tokenizer trained here."""
  ids = np.full((length,), PAD, np.int32)
  ids[:2] = START, END
  return {"ids": ids, "mask": ids != PAD}


def train_tokenizer(
  captions: Iterable[str], vocab_size: int, length: int, kind: str = "bpe"
) -> Tokenizer:
  """Trains a tokenizer on captions.

  Lower-cases, so that "A red circle" and "a red circle" are the same prompt.
  Every text can be encoded, whatever its script, as all 256 bytes have ids.

  Args:
    captions: to learn from.
    vocab_size: ids, the markers and bytes included; fewer where the captions give no more.
    length: tokens a caption takes, the markers included.
    kind: a key of `TRAINERS`.

  Raises:
    UserError: when `vocab_size` cannot hold the bytes and the markers, or
      `length` no token beside the markers.
  """
  if kind not in TRAINERS:
    raise unknown("text tokenizer", kind, TRAINERS)
  smallest = 256 + len(SPECIAL_TOKENS)
  if vocab_size < smallest:
    raise UserError(f"text.vocab_size={vocab_size} is too small; use at least {smallest}")
  if length < 3:
    raise UserError(f"text.length={length} leaves no room for a caption; use at least 3")
  return Tokenizer(TRAINERS[kind](captions, vocab_size), length)


def _train_bpe(captions: Iterable[str], vocab_size: int) -> str:
  """Byte-level BPE: Sennrich et al. 2016; Radford et al. 2019, 2.2."""
  from tokenizers import Tokenizer as Backend
  from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

  backend = Backend(models.BPE())
  backend.normalizer = normalizers.Sequence(
    [normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()]
  )
  backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
  backend.decoder = decoders.ByteLevel()
  backend.train_from_iterator(
    captions,
    trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=list(SPECIAL_TOKENS),
      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  return backend.to_str()


def _train_sentencepiece(captions: Iterable[str], vocab_size: int) -> str:
  """SentencePiece's unigram model (Kudo 2018; Kudo and Richardson 2018), as the library's JSON.

  Characters that the captions do not have, or that are the rarest of many, fall back to their
  bytes.
  """
  import sentencepiece
  from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
  from tokenizers import Tokenizer as Backend

  octets, markers = 256, len(SPECIAL_TOKENS) + 1  # one of them for what no piece spells: unused
  room = vocab_size - octets - markers
  if room < _LEAST_PIECES:
    raise UserError(f"text.vocab_size={vocab_size} leaves SentencePiece no pieces beside the "
                    f"bytes; use at least {octets + markers + _LEAST_PIECES}")
  normalizer = normalizers.Sequence([
    normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " "),
    normalizers.Strip(),
  ])  # fmt: skip
  captions = [normalizer.normalize_str(caption) for caption in captions]
  if not any(captions):
    raise UserError("text.tokenizer=sentencepiece: the captions are all empty, so there is nothing "
                    "to learn from; use bpe")
  # Every character that the trainer sees takes an id of its own.
  counted = collections.Counter(itertools.chain.from_iterable(captions))
  rare = {ord(c): " " for c, _ in counted.most_common()[room // 2 :]}
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=(caption.translate(rare) for caption in captions), model_writer=model,
    vocab_size=vocab_size, hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True,
    normalization_rule_name="identity", num_threads=1, minloglevel=2, unk_id=markers - 1,
    **{f"{name}_id": i for i, name in enumerate(("pad", "bos", "eos"))},
    **{f"{name}_piece": token for name, token in zip(
      ("pad", "bos", "eos"), SPECIAL_TOKENS, strict=True
    )},
  )  # fmt: skip
  trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
  backend = Backend(models.Unigram(
    [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.get_piece_size())],
    unk_id=markers - 1, byte_fallback=True,
  ))  # fmt: skip
  backend.normalizer = normalizer
  # "<end>" in a caption is five letters, not the marker: no word goes on behind a "<".
  backend.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Metaspace(), pre_tokenizers.Split("<", "isolated")
  ])
  backend.decoder = decoders.Sequence([
    decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
    decoders.Strip(" ", 1, 0),
  ])
  backend.add_special_tokens(list(SPECIAL_TOKENS))
  return backend.to_str()


TRAINERS: dict[str, Callable[[Iterable[str], int], str]] = {
  "bpe": _train_bpe, "sentencepiece": _train_sentencepiece,
}
