"""Captions to token ids: byte-level BPE trained on a data set's captions, or a public tokenizer.

Either is kept in the export as the `tokenizers` library's JSON.
"""

import dataclasses
import html
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np
from etils import epath

from t2i_jax.errors import UserError

PAD, START, END = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<start>", "<end>")


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

  def to_json(self) -> str:
    """The tokenizer as text that `from_json` reads."""
    about = {name: getattr(self, name) for name in ("length", "start", "end", "pad", "clean")}
    return json.dumps({**about, "definition": json.loads(self.definition)})

  @classmethod
  def from_json(cls, text: str) -> "Tokenizer":
    """Reads what `to_json` wrote.

    Raises:
      ValueError: for anything else.
    """
    try:
      content = json.loads(text)
      definition = json.dumps(content.pop("definition"))
      tokenizer = cls(definition, **content)
      if not isinstance(tokenizer.length, int) or tokenizer.clean not in CLEANERS:
        raise TypeError("its length is no number, or its cleaning is unknown")
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError(f"it has no definition and length ({error})") from error
    try:
      tokenizer._backend  # noqa: B018
    except Exception as error:  # The library raises nothing narrower.
      raise ValueError(f"its definition cannot be read ({error})") from error
    return tokenizer

  @classmethod
  def load(cls, path: str | os.PathLike) -> "Tokenizer":
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


def train_tokenizer(captions: Iterable[str], vocab_size: int, length: int) -> Tokenizer:
  """Trains byte-level BPE (Sennrich et al. 2016; Radford et al. 2019, 2.2) on captions.

  Lower-cases, so that "A red circle" and "a red circle" are the same prompt.
  Every text can be encoded, whatever its script, as all 256 bytes have ids.

  Raises:
    UserError: when `vocab_size` cannot hold the bytes and the markers, or
      `length` no token beside the markers.
  """
  from tokenizers import Tokenizer as Backend
  from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

  smallest = 256 + len(SPECIAL_TOKENS)
  if vocab_size < smallest:
    raise UserError(f"text.vocab_size={vocab_size} is too small; use at least {smallest}")
  if length < 3:
    raise UserError(f"text.length={length} leaves no room for a caption; use at least 3")
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
  return Tokenizer(backend.to_str(), length)
