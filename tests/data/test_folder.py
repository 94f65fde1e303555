"""A user's folder: what it reads, and one line for everything that may be wrong."""

import csv
import json
import logging

import numpy as np
import pytest
from PIL import Image

from t2i_jax.data.folder import TEST_SHARE, Folder
from t2i_jax.data.held_out import held_out
from t2i_jax.data.loader import Loader
from t2i_jax.data.memory import in_memory
from t2i_jax.errors import UserError

NAMES = [f"{n:02d}.png" for n in range(40)]


def picture(path, colour):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (20, 16), (colour, colour, colour)).save(path)


def jsonl(path, rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


@pytest.fixture
def folder(tmp_path):
  """40 pictures, number n of grey level 5 n, captioned "number n"."""
  for n, name in enumerate(NAMES):
    picture(tmp_path / "photos" / name, 5 * n)
  rows = [{"file": name, "caption": f"number {n}"} for n, name in enumerate(NAMES)]
  jsonl(tmp_path / "photos" / "captions.jsonl", rows)
  return tmp_path / "photos"


def opened(folder, split="train", **options):
  return Folder(split=split, resolution=8, path=str(folder), **options)


def fails(folder, match, split="train", **options):
  with pytest.raises(UserError, match=match) as raised:
    opened(folder, split, **options)
  assert "\n" not in str(raised.value)


def test_rows(folder):
  source = opened(folder)
  rows = source.fetch(np.arange(len(source)), np.zeros(len(source), np.uint64))
  assert rows.image.shape == (len(source), 8, 8, 3)
  numbers = [int(caption.split()[1]) for caption in rows.captions]
  np.testing.assert_array_equal(rows.image[:, 4, 4, 0], 5 * np.array(numbers))


def test_split_follows_from_the_names(folder):
  train, test = (list(opened(folder, s).captions()) for s in ("train", "test"))
  assert not set(train) & set(test) and len(train) + len(test) == 40 and 1 <= len(test) <= 6
  lines = (folder / "captions.jsonl").read_text().splitlines()
  (folder / "captions.jsonl").write_text("\n".join(reversed(lines[:39])))
  assert set(opened(folder, "test").captions()) == set(test) - {"number 39"}


def test_split_column(folder):
  jsonl(
    folder / "captions.jsonl",
    [{"file": n, "caption": n, "split": "test" if n < "10" else "train"} for n in NAMES],
  )
  assert list(opened(folder, "test").captions()) == NAMES[:10]
  assert list(opened(folder).captions()) == NAMES[10:]


def test_captions_in_every_form(folder):
  rows = [
    {"file": "00.png", "captions": ["a", " b\n c "], "split": "train", "width": 3},
    {"file": "01.png", "caption": "猫", "caption_2": "chat", "split": "train"},
    {"file": "00.png", "caption": "d", "split": "train"},
  ]
  jsonl(folder / "captions.jsonl", rows)
  source = opened(folder)
  assert [source.captions_of(n) for n in range(2)] == [("a", "b c", "d"), ("猫", "chat")]
  assert {source.caption(0, d) for d in range(3)} == {"a", "b c", "d"}


def test_csv(folder):
  (folder / "captions.jsonl").unlink()
  with open(folder / "captions.csv", "w", newline="", encoding="utf-8-sig") as file:
    writer = csv.writer(file)
    writer.writerow(["file", "caption", "caption_b", "width", "split"])
    writer.writerow(["00.png", 'a "big", dog', "", "9", "train"])
    writer.writerow(["01.png", "two\nlines", "b", "9", "train"])
    writer.writerow(["00.png", "again", "", "9", "train"])
  source = opened(folder)
  assert list(source.captions()) == ['a "big", dog', "again", "two lines", "b"]


def test_captions_option_chooses_the_file(folder):
  jsonl(folder / "short.jsonl", [{"file": "03.png", "caption": "x", "split": "train"}])
  assert list(opened(folder, captions_file="short.jsonl").captions()) == ["x"]
  (folder / "captions.csv").write_text("file,caption\n")
  fails(folder, "has both captions.jsonl and captions.csv: choose")
  fails(folder, "no captions file .*none.csv", captions_file="none.csv")
  fails(folder, "neither .jsonl nor .csv", captions_file="00.png")


def test_wrong_directories(folder, tmp_path):
  fails("", "needs --config.data.options.path")
  fails(tmp_path / "nowhere", "no directory '.*nowhere': No such file")
  fails(folder / "00.png", "no directory .*Not a directory")
  (tmp_path / "empty").mkdir()
  fails(tmp_path / "empty", "is empty")
  (folder / "captions.jsonl").unlink()
  fails(folder, "has no captions.jsonl or captions.csv")


@pytest.mark.parametrize(
  "line, message",
  [
    ('{"file": "01.png", "caption"', "line 2: not JSON"),
    ("[1, 2]", "line 2: not an object"),
    ('{"caption": "a"}', "line 2: no 'file'"),
    ('{"file": 7, "caption": "a"}', "line 2: no 'file'"),
    ('{"file": "01.png"}', "line 2: no caption"),
    ('{"file": "01.png", "caption": " "}', "line 2: no caption"),
    ('{"file": "01.png", "captions": []}', "line 2: no caption"),
    ('{"file": "01.png", "caption": 3}', "line 2: a caption is not text"),
    ('{"file": "01.png", "caption": "\\ud83d"}', "line 2: a caption is not text"),
    ('{"file": "01.png", "captoin": "a"}', "unknown column 'captoin'; did you mean 'caption'"),
    ('{"file": "01.png", "caption": "a", "Split": "test"}', "unknown column 'Split'; did you"),
    ('{"file": "01.png", "caption": "a", "split": "tets"}', "line 2: 'tets'; did you mean 'test'"),
    ('{"file": "01.png", "caption": "a", "split": ["test"]}', "unknown split in .*line 2"),
    ('{"file": "01.png", "caption": "a", "split": "test"}', "'00.png' has no split, but other"),
    ('{"file": "00.png", "caption": "a", "split": "test"}', "line 2: '00.png' is in two splits"),
  ],
)
def test_wrong_lines(folder, line, message):
  (folder / "captions.jsonl").write_text('{"file": "00.png", "caption": "a"}\n' + line + "\n")
  fails(folder, message)


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "the first line names no column 'file', only \\[\\]"),
    ("file,caption\n", "has no lines"),
    ("filename,caption\n00.png,a\n", "names no column 'file', only \\['filename', 'caption'\\]"),
    ("file,caption\n00.png,a\n01.png,a, b\n", "line 3: not 2 fields"),
    ("file,caption\n00.png\n", "line 2: not 2 fields"),
    ('file,caption\n00.png,a\n01.png,"b\n02.png,c\n', "line 3: unexpected end of data"),
    ("file,captiom\n00.png,a\n", "unknown column 'captiom'; did you mean 'caption'"),
    ("file,text\n00.png,a\n", "line 2: no caption"),
    (b"file,caption\n00.png,caf\xe9\n", "not UTF-8"),
  ],
)
def test_wrong_csv(folder, text, message):
  (folder / "captions.jsonl").unlink()
  (folder / "captions.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
  fails(folder, message)


def test_missing_pictures_are_counted_and_named(folder, tmp_path, caplog):
  for name in NAMES[:4]:
    (folder / name).unlink()
  with caplog.at_level(logging.WARNING):
    source = opened(folder, log_dir=str(tmp_path / "logs"))
  assert "4 of 40 pictures" in caplog.text and "00.png, 01.png, 02.png, ..." in caplog.text
  assert not {f"number {n}" for n in range(4)} & set(source.captions())
  named = (tmp_path / "logs" / "skipped_train.txt").read_text().splitlines()
  train = [name for name in NAMES[:4] if name not in held_out(NAMES, TEST_SHARE)]
  assert named == [f"{name}\tno such file" for name in train]
  for name in NAMES[4:]:
    (folder / name).unlink()
  fails(folder, "none of the 40 pictures in .* exists: 00.png, 01.png, 02.png, ...")


def test_a_split_without_pictures(folder):
  rows = [{"file": name, "caption": "a", "split": "train"} for name in NAMES]
  jsonl(folder / "captions.jsonl", rows)
  fails(folder, "no pictures in split 'test'.*give lines a 'split'", "test")
  jsonl(folder / "captions.jsonl", [*rows, {"file": "x.png", "caption": "a", "split": "test"}])
  fails(folder, "no pictures in split 'test'.*all 1 are missing", "test")


def break_some(folder):
  """Damages five training pictures; only the last one's header is still good."""
  names = [name for name in NAMES if name not in held_out(NAMES, TEST_SHARE)][:5]
  whole = (folder / names[4]).read_bytes()
  (folder / names[0]).write_bytes(b"")
  (folder / names[1]).write_bytes(b"<html>not found</html>")
  (folder / names[2]).write_bytes(b"GIF89a")
  (folder / names[3]).unlink()
  (folder / names[3]).mkdir()
  (folder / names[4]).write_bytes(whole[:60])
  return names


def tokenize(captions):
  ids = np.array([[int(caption.split()[1])] for caption in captions], np.int32)
  return {"text": {"number": {"ids": ids, "mask": np.ones(ids.shape, bool)}}}


@pytest.mark.parametrize("memory_limit", [1 << 20, 0])
def test_broken_pictures_are_skipped_and_named(folder, tmp_path, memory_limit):
  before = sorted(path.name for path in folder.iterdir())
  names = break_some(folder)
  source = opened(folder, log_dir=str(tmp_path / "logs"))
  source = in_memory(source, memory_limit=memory_limit)
  loader = Loader(source, tokenize, 10, seed=0)
  batches = [next(loader) for _ in range(12)]
  loader.close()
  seen = np.concatenate([batch["text"]["number"]["ids"][:, 0] for batch in batches])
  colours = np.concatenate([batch["image"][:, 4, 4, 0] for batch in batches])
  np.testing.assert_array_equal(colours, 5 * seen)
  test = held_out(NAMES, TEST_SHARE)
  good = {n for n, name in enumerate(NAMES) if name not in test and name not in names}
  assert set(seen) == good
  log = (tmp_path / "logs" / "skipped_train.txt").read_text().splitlines()
  assert sorted(line.split("\t")[0] for line in log) == names
  assert sorted(path.name for path in folder.iterdir()) == before


def test_all_broken(folder):
  for name in NAMES:
    (folder / name).write_bytes(b"oops")
  with pytest.raises(UserError, match="not one of .* can be read, .*00.png: not a pict"):
    in_memory(opened(folder))
  with pytest.raises(UserError, match="none of .* can be read: 00.png, 01.png"):
    in_memory(opened(folder), memory_limit=0)
