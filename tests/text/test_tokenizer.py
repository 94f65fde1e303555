import json
import unicodedata

import numpy as np
import pytest
import tokenizers

from t2i_jax.errors import UserError
from t2i_jax.text.tokenizer import (
  END,
  PAD,
  START,
  Tokenizer,
  Tokenizers,
  null_text,
  train_tokenizer,
)

CAPTIONS = ["a large red circle", "a small blue square at the top", "a red circle at the left"]
# One of each kind: Latin with accents, Cyrillic, Han, Arabic, joined emoji, NUL, markup.
SCRIPTS = [
  "un château à l'île d'œuvres", "красный круг", "一个红色的圆圈", "دائرة حمراء", "👩‍👩‍👧 and 🟥",
  "tab\there\nand a \x00 byte", "<pad> is not <end>", "100% of 'quotes' \\ and \"slashes\"",
]


@pytest.fixture(scope="module")
def tokenizer():
  return train_tokenizer(CAPTIONS * 5, vocab_size=300, length=16)


def with_length(tokenizer, length):
  return Tokenizer(tokenizer.definition, length)


def text_of(tokenizer, ids, mask):
  """The caption that ids stand for, decoded by the library."""
  tokens = [int(i) for i in ids[mask] if i not in (START, END)]
  return tokenizers.Tokenizer.from_str(tokenizer.definition).decode(tokens).removeprefix(" ")


@pytest.mark.parametrize("caption", [*CAPTIONS, *SCRIPTS])
def test_any_script_round_trips(tokenizer, caption):
  encoded = with_length(tokenizer, 200).encode([caption])
  assert text_of(tokenizer, encoded["ids"][0], encoded["mask"][0]) == caption


def test_every_byte_has_an_id(tokenizer):
  # No character is unknown: all of Unicode's encodings are made of these.
  codes = [*range(0x21, 0x250), 0x4E00, 0x1F600, 0x10FFFD]
  captions = [chr(code) for code in codes if chr(code).strip()]
  encoded = with_length(tokenizer, 16).encode(captions)
  assert encoded["ids"].max() < tokenizer.vocab_size <= 300
  assert np.all(encoded["mask"].sum(axis=1) > 2)


def test_encoding_is_start_tokens_end_and_padding(tokenizer):
  encoded = tokenizer.encode(["a red circle", "", "a " * 40])
  ids, mask = encoded["ids"], encoded["mask"]
  assert ids.shape == mask.shape == (3, 16) and ids.dtype == np.int32 and mask.dtype == bool
  for row in range(3):
    kept = mask[row].sum()
    assert mask[row, :kept].all() and ids[row, 0] == START and ids[row, kept - 1] == END
    assert np.all(ids[row, kept:] == PAD) and np.all(ids[row, 1 : kept - 1] > END)
  assert mask[2].all()


def test_a_batch_encodes_as_its_rows(tokenizer):
  together = tokenizer.encode(CAPTIONS)
  for row, caption in enumerate(CAPTIONS):
    np.testing.assert_array_equal(together["ids"][row], tokenizer.encode([caption])["ids"][0])


def test_the_empty_caption_is_the_null_text(tokenizer):
  encoded = tokenizer.encode(["", "   "])
  for row in range(2):
    for name, value in null_text(16).items():
      np.testing.assert_array_equal(encoded[name][row], value)
      assert encoded[name].dtype == value.dtype


@pytest.mark.parametrize("same", ["A Red CIRCLE", "  a red circle ", "a red circle\n"])
def test_case_and_outer_space_do_not_matter(tokenizer, same):
  ids = tokenizer.encode(["a red circle", same])["ids"]
  np.testing.assert_array_equal(ids[0], ids[1])


def test_composed_and_decomposed_accents_are_one(tokenizer):
  ids = tokenizer.encode(["caf\u00e9", "cafe\u0301"])["ids"]
  np.testing.assert_array_equal(ids[0], ids[1])


def test_markers_in_a_caption_are_ordinary_text(tokenizer):
  ids = tokenizer.encode(["a <end> of <pad> and <start>"])["ids"][0]
  assert np.sum(ids == END) == 1 and np.sum(ids == START) == 1


@pytest.mark.parametrize("caption", [*CAPTIONS, *SCRIPTS])
def test_truncation_reports_exactly_what_is_cut(tokenizer, caption):
  whole = len(tokenizer.encode([caption])["ids"][0])
  for length in range(3, whole):
    short = with_length(tokenizer, length)
    encoded = short.encode([caption])
    kept = text_of(short, encoded["ids"][0], encoded["mask"][0])
    cut = short.truncated(caption)
    if cut is None:
      assert kept == caption
    else:
      # A character of which a byte is lost is lost; where the cut falls, spaces are.
      assert "".join((kept.rstrip("\ufffd") + cut).split()) == "".join(caption.split())
      assert cut and caption.endswith(cut)


def test_what_fits_exactly_is_not_truncated(tokenizer):
  tokens = int(with_length(tokenizer, 99).encode(["a red circle"])["mask"].sum())
  assert with_length(tokenizer, tokens).truncated("a red circle") is None
  assert with_length(tokenizer, tokens - 1).truncated("a red circle") == "circle"


def test_json_round_trip(tokenizer, tmp_path):
  path = tmp_path / "tokenizer.json"
  both = Tokenizers({"long": tokenizer, "short": with_length(tokenizer, 5)})
  path.write_text(both.to_json(), encoding="utf-8")
  again = Tokenizers.load(path)
  assert again.to_json() == both.to_json()
  assert [t.length for t in again.of.values()] == [tokenizer.length, 5]
  for encoder, given in both.encode(SCRIPTS).items():
    for name, value in given.items():
      np.testing.assert_array_equal(again.encode(SCRIPTS)[encoder][name], value)
  assert again.encode(SCRIPTS)["short"]["ids"].shape == (len(SCRIPTS), 5)


def test_what_does_not_reach_one_of_several_encoders_is_said(tokenizer):
  one = Tokenizers({"encoder": with_length(tokenizer, 3)})
  assert one.truncated("a red circle") == (
    "prompt 'a red circle...' is longer than the 3 tokens that the encoder takes: 'red circle' is "
    "cut off"
  )
  several = Tokenizers({"long": with_length(tokenizer, 99), **one.of})
  assert "'encoder' takes" in several.truncated("a red circle")
  assert "'long'" not in several.truncated("a red circle")
  assert several.truncated("a") is None


def test_training_is_deterministic(tokenizer):
  assert train_tokenizer(CAPTIONS * 5, 300, 16) == tokenizer


def test_training_merges_what_is_frequent(tokenizer):
  # Six words: a token each, where bytes would take 24.
  assert tokenizer.encode(["a red circle at the left"])["mask"].sum() <= 2 + 8


@pytest.mark.parametrize(
  "content",
  [
    b"", b"not json", b"[]", b"null", b'{"a": {}}', b'{"a": {"length": 8}}', b"\xff\xfe\x00",
    b'{"length": 8}', b'{"a": {"length": 8, "definition": {"model": "none"}}}',
    b'{"a": {"length": "many", "definition": {}}}', b'{"a": [8]}',
  ],
)
def test_another_files_content_is_one_line(tmp_path, content):
  path = tmp_path / "tokenizer.json"
  path.write_bytes(content)
  with pytest.raises(UserError, match="is not a tokenizer of this project") as caught:
    Tokenizers.load(path)
  assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
  with pytest.raises(UserError, match="no tokenizer at"):
    Tokenizers.load(tmp_path / "tokenizer.json")
  with pytest.raises(UserError, match="cannot be read"):
    Tokenizers.load(tmp_path)


@pytest.mark.parametrize(
  "size, length, message", [(258, 16, "at least 259"), (300, 2, "at least 3")]
)
def test_sizes_that_make_no_tokenizer_are_one_line(size, length, message):
  with pytest.raises(UserError, match=message):
    train_tokenizer(CAPTIONS, size, length)


def test_the_smallest_vocabulary_is_bytes(tokenizer):
  smallest = train_tokenizer(CAPTIONS, 259, 32)
  assert smallest.vocab_size == 259
  assert smallest.encode(["red"])["mask"].sum() == 2 + len(" red")


def test_the_file_is_the_librarys_definition_and_a_length(tokenizer):
  content = json.loads(json.dumps(tokenizer.to_dict()))
  assert set(content) == {"definition", "length", "start", "end", "pad", "clean"}
  library = tokenizers.Tokenizer.from_str(json.dumps(content["definition"]))
  assert library.get_vocab_size() == tokenizer.vocab_size


@pytest.fixture(scope="module")
def pieces():
  return train_tokenizer(CAPTIONS * 5, 400, 24, "sentencepiece")


def test_sentencepiece_learns_words(pieces):
  ids = pieces.encode(["a red circle at the left"])["ids"][0]
  names = [pieces._backend.id_to_token(int(i)) for i in ids]
  assert names[0] == "<start>" and "<end>" in names and names[-1] == "<pad>"
  inside = names[1 : names.index("<end>")]
  # The space before a word is part of its piece.
  assert "".join(inside) == "▁a▁red▁circle▁at▁the▁left" and len(inside) < len("a red circle at")


def test_sentencepiece_spells_what_it_never_saw(pieces):
  for caption in SCRIPTS:
    given = with_length(pieces, 300).encode([caption])
    ids = given["ids"][0][given["mask"][0]][1:-1]
    assert 3 not in ids  # <unk>
    assert pieces._backend.decode([int(i) for i in ids], skip_special_tokens=False).strip() == (
      " ".join(unicodedata.normalize("NFKC", caption).lower().split())
    )


def test_sentencepiece_is_stored_as_any_other(pieces, tmp_path):
  (tmp_path / "tokenizer.json").write_text(Tokenizers({"a": pieces}).to_json(), encoding="utf-8")
  again = Tokenizers.load(tmp_path / "tokenizer.json")
  for name, value in pieces.encode(SCRIPTS).items():
    np.testing.assert_array_equal(again.encode(SCRIPTS)["a"][name], value)
  assert pieces.encode([""])["ids"][0].tolist() == [START, END] + [PAD] * 22
  assert pieces.vocab_size <= 400
  with pytest.raises(UserError, match="text.vocab_size=280 .* use at least 292"):
    train_tokenizer(CAPTIONS, 280, 24, "sentencepiece")


def test_sentencepiece_of_more_characters_than_ids():
  captions = [chr(0x4E00 + n) * 2 + " red" for n in range(500)]
  made = train_tokenizer(captions, 300, 24, "sentencepiece")
  assert made.vocab_size <= 300
  assert 3 not in made.encode(captions)["ids"]


def test_an_unknown_kind_of_tokenizer_is_one_line():
  with pytest.raises(UserError, match="unknown text tokenizer 'wordpiece'"):
    train_tokenizer(CAPTIONS, 300, 16, "wordpiece")
