"""The tokenizer of a Hugging Face folder, as one of ours."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2i_jax.errors import UserError
from t2i_jax.text.tokenizer import Tokenizer

# Names of the tokens before and behind a caption, by model.
MARKERS = {
  "clip": ("bos_token", "eos_token"),
  "t5": (None, "eos_token"),
  "bert": ("cls_token", "sep_token"),
  "ldm": ("cls_token", "sep_token"),
}
# What transformers makes a tokenizer of.
FILES = (("vocab.json", "merges.txt"), ("spiece.model",), ("vocab.txt",))
DEFAULTS = {
  "clip": {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
           "pad_token": "<|endoftext|>"},
  "t5": {"eos_token": "</s>", "pad_token": "<pad>"},
  "bert": {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"},
}  # fmt: skip


def read_tokenizer(folder: str | Path, kind: str, length: int, pad: str = "") -> Tokenizer:
  """Reads `tokenizer.json`, or what transformers can make one of, such as SentencePiece's model.

  Nothing is downloaded.

  Args:
    folder: with the tokenizer's files.
    kind: of the model: a key of `MARKERS`.
    length: tokens that a caption takes.
    pad: the padding's token in place of the folder's: for CLIP "!", whose id is 0, where the model
      was trained with OpenAI's or OpenCLIP's own tokenizer.

  Raises:
    UserError: there is no tokenizer, or it lacks a token that the model needs.
  """
  folder = Path(folder)
  definition = _definition(folder)
  from tokenizers import Tokenizer as Backend

  backend = Backend.from_str(definition)
  named = {**DEFAULTS["bert" if kind == "ldm" else kind], **_special_tokens(folder)}
  if pad:
    named["pad_token"] = pad

  def number(name: str | None) -> int | None:
    if name is None:
      return None
    found = backend.token_to_id(named[name])
    if found is None:
      raise UserError(f"the tokenizer in {folder} has no '{named[name]}', its {name}; is it the "
                      f"tokenizer of a {kind} model?")
    return found

  start, end = (number(name) for name in MARKERS[kind])
  return Tokenizer(
    definition, length, start, end, number("pad_token"), "clip" if kind == "clip" else ""
  )


def _definition(folder: Path) -> str:
  if (folder / "tokenizer.json").is_file():
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
  else:
    # From a folder without any, transformers makes one that knows no word, and says nothing.
    if not any(all((folder / name).is_file() for name in names) for names in FILES):
      raise UserError(f"no tokenizer in '{folder}': it has neither tokenizer.json nor "
                      f"{' nor '.join(' with '.join(names) for names in FILES)}")
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
      found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
      text = found.backend_tokenizer.to_str()
    except Exception as error:  # of many kinds, for want of a file or a package
      why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
      raise UserError(f"no tokenizer in {folder} that can be read ({why}); copy tokenizer.json "
                      "there") from error
  try:
    definition = json.loads(text)
    # Cutting and padding are ours.
    definition.update(truncation=None, padding=None)
    definition["model"]  # noqa: B018
  except (ValueError, AttributeError, KeyError) as error:
    raise UserError(f"{folder / 'tokenizer.json'} is no tokenizer ({error}); copy it again"
                    ) from error
  return json.dumps(definition)


def _special_tokens(folder: Path) -> Mapping[str, Any]:
  named: dict[str, Any] = {}
  for name in ("special_tokens_map.json", "tokenizer_config.json"):
    if not (folder / name).is_file():
      continue
    try:
      given = json.loads((folder / name).read_text(encoding="utf-8"))
    except ValueError as error:
      raise UserError(f"{folder / name} is not JSON ({error}); copy it again") from error
    for key, value in given.items():
      if key.endswith("_token") and value:
        named[key] = value["content"] if isinstance(value, dict) else value
  return {key: value for key, value in named.items() if isinstance(value, str)}
