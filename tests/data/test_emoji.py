"""The emoji of a font: which drawing, which base, which split, and without TensorFlow."""

import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")
pytest.importorskip("fontTools", reason="needs fonttools")
pytest.importorskip("emoji", reason="needs emoji")

from t2i_jax.data import open_source
from t2i_jax.data.emoji import Emoji, prepared
from t2i_jax.data.emoji_font import base_of, drawings, find_font
from t2i_jax.data.memory import in_memory
from t2i_jax.errors import UserError

FIXTURE = os.path.join(os.path.dirname(__file__), "fixtures", "NotoColorEmojiSubset.ttf")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  directory = str(tmp_path_factory.mktemp("emoji"))
  prepared(FIXTURE, directory)
  return directory


def opened(data_dir, split="train", **options):
  return Emoji(split=split, resolution=32, data_dir=data_dir, font=FIXTURE, **options)


@pytest.mark.parametrize(
  "variants",
  [
    "🧑‍🍳 👨‍🍳 👩‍🍳 👨🏿‍🍳 👩🏻‍🍳",
    "🏃 🏃‍♂️ 🏃🏽‍♀️ 🏃‍➡️ 🏃🏿‍♂️‍➡️",
    "👪 👨‍👩‍👧 👩‍👩‍👦‍👦 👨‍👦 🧑‍🧑‍🧒",
    "👫 👭🏿 👬 🧑‍🤝‍🧑 👩🏻‍🤝‍👨🏿",
    "💏 👩‍❤️‍💋‍👨 🧑🏻‍❤️‍💋‍🧑🏿",
    "💑 👨‍❤️‍👨 💑🏽",
    "🧒 👦🏿 👧",
    "🤝 🤝🏽 🫱🏻‍🫲🏿",
    "🎅 🤶🏽 🧑‍🎄",
    "👍 👍🏿",
    "❤ ❤️",
  ],
)
def test_variants_have_one_base(variants):
  assert len({base_of(emoji) for emoji in variants.split()}) == 1


def test_what_differs_has_another_base():
  others = "🧑‍🍳 🧑‍🚀 🏃 🧑 👪 👫 💏 💑 🧒 👶 ❤️ ❤️‍🔥 🏴 🏴‍☠️ 🇩🇪 🇫🇷 🐻 🐻‍❄️ 🏿 🧑‍🦰 ♀️ 1️⃣ 2️⃣".split()
  assert len({base_of(emoji) for emoji in others}) == len(others)


def test_drawings_of_characters_and_sequences():
  wanted = ["😀", "⭐", "👍🏿", "👩🏽‍🚀", "🇫🇷", "🏴‍☠️", "🇫🇸", "x"]
  drawn = dict(drawings(FIXTURE, iter(wanted)))
  assert list(drawn) == wanted[:5] and len(set(drawn.values())) == 5
  assert all(png.startswith(b"\x89PNG") for png in drawn.values())


def test_splits_share_no_base_and_no_drawing(data_dir):
  train, test = opened(data_dir), opened(data_dir, "test")
  assert len(train) + len(test) == 96 and len(test) >= 3
  assert not set(train.bases) & set(test.bases)
  pictures = [{source.image(n).tobytes() for n in range(len(source))} for source in (train, test)]
  assert not pictures[0] & pictures[1]
  of = {e: base for s in (train, test) for e, base in zip(s.emoji, s.bases, strict=True)}
  assert of["🇳🇴"] == of["🇸🇯"] != of["🇸🇪"]  # Norway and Svalbard fly the same flag


def test_names_and_pictures_belong_together(data_dir):
  colours = {"🔴": ("red circle", 0), "🟢": ("green circle", 1), "🔵": ("blue circle", 2)}
  found = 0
  for split in ("train", "test"):
    source = opened(data_dir, split)
    for index in (n for n, emoji in enumerate(source.emoji) if emoji in colours):
      name, channel = colours[source.emoji[index]]
      picture = source.image(index)
      assert source.captions_of(index) == (name,)
      assert picture.shape == (32, 32, 3) and picture.dtype == np.uint8
      assert picture[16, 16].argmax() == channel
      assert (picture[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()  # corners are white
      columns = np.flatnonzero((picture.min(2) < 200).any(0))
      rows = np.flatnonzero((picture.min(2) < 200).any(1))
      assert abs(np.ptp(columns) - np.ptp(rows)) <= 1  # a circle stays round
      found += 1
  assert found == 3


def test_languages(data_dir):
  source = opened(data_dir, languages=("zh", "de", "en"))
  assert all(all(source.captions_of(n)) for n in range(len(source)))
  assert not any(set(":_") & set(name) for name in source.captions())
  captions = source.captions_of(source.emoji.index("🍕"))
  assert captions == ("披萨", "pizza", "pizza")
  with pytest.raises(UserError, match="unknown language of emoji names 'xx'"):
    opened(data_dir, languages=("xx",))
  with pytest.raises(UserError, match="'languages' .* is empty"):
    opened(data_dir, languages=())


def test_bases_are_balanced(data_dir):
  source = opened(data_dir)
  share = {}
  for base, weight in zip(source.bases, source.weights, strict=True):
    share[base] = share.get(base, 0) + weight
  np.testing.assert_allclose(list(share.values()), 1 / len(share))
  assert len(share) < len(source)
  assert in_memory(source).weights is not None
  assert opened(data_dir, balance=False).weights is None


def test_prepared_once(data_dir):
  def files():
    return {e.path: e.stat().st_mtime_ns for d in os.scandir(data_dir) for e in os.scandir(d)}

  before = files()
  opened(data_dir)
  assert files() == before and len(os.listdir(data_dir)) == 1


def test_default_directory(monkeypatch, tmp_path):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.setattr("t2i_jax.data.emoji._prepare", lambda font, directory: None)
  assert os.path.dirname(prepared(FIXTURE)) == str(tmp_path / "t2i_jax" / "emoji")


def test_wrong_fonts_and_directories(tmp_path, monkeypatch):
  text = tmp_path / "text.ttf"
  text.write_text("no font")
  with pytest.raises(UserError, match="is not a font.*fonts-noto-color-emoji"):
    prepared(str(text), str(tmp_path / "data"))
  assert not os.listdir(tmp_path / "data")
  with pytest.raises(UserError, match="cannot read the font '.*none.ttf': No such file"):
    prepared(str(tmp_path / "none.ttf"))
  with pytest.raises(UserError, match="cannot write the emoji to .*set option 'data_dir'"):
    prepared(FIXTURE, str(text))
  monkeypatch.setenv("PATH", "")
  monkeypatch.setattr("glob.glob", lambda *_, **__: [])
  with pytest.raises(UserError, match="fonts-noto-color-emoji, or give a path with option 'font'"):
    find_font()


def test_font_without_bitmaps(tmp_path):
  from fontTools.ttLib import TTFont

  font = TTFont(FIXTURE)
  del font["CBDT"], font["CBLC"]
  font.save(tmp_path / "plain.ttf")
  with pytest.raises(UserError, match="has no table 'CBDT'"):
    next(drawings(str(tmp_path / "plain.ttf"), iter("😀")))


def test_damaged_data(tmp_path):
  directory = prepared(FIXTURE, str(tmp_path))
  for name in os.listdir(directory):
    if "array_record" in name:
      os.truncate(os.path.join(directory, name), 1000)
  with pytest.raises(UserError, match="cannot read the emoji in .*; delete it") as raised:
    opened(str(tmp_path))
  assert "\n" not in str(raised.value)


def test_without_tensorflow(tmp_path):
  code = """
import sys
from t2i_jax.data import open_source
options = {"data_dir": sys.argv[1], "font": sys.argv[2]}
source = open_source("emoji", "train", 16, 0, options)
assert source.image(0).shape == (16, 16, 3)
print("tensorflow" in sys.modules, len(source))
"""
  command = [sys.executable, "-c", code, str(tmp_path), FIXTURE]
  out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  loaded, rows = out.split("\n")[-2].split()
  assert loaded == "False" and int(rows) > 80


def test_the_installed_font(tmp_path):
  try:
    find_font()
  except UserError as error:
    pytest.skip(str(error))
  from t2i_jax.data.emoji_builder import sequences

  drawn = dict(drawings(find_font(), sequences()))
  assert len(drawn) > 3500
  assert len({base_of(emoji) for emoji in drawn}) > 1500


def test_registered(data_dir):
  options = {"data_dir": data_dir, "font": FIXTURE, "balance": False}
  assert len(open_source("emoji", "test", 16, 0, options)) == len(opened(data_dir, "test"))
