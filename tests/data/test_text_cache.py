"""Features computed before: stored, found again, refused when they are not the right ones."""

import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest

from t2i_jax.data import shards, text_cache
from t2i_jax.data.text_cache import TextCache, Writer, digests
from t2i_jax.errors import UserError

CAPTIONS = [f"a {colour} ring" for colour in ("red", "green", "blue", "black", "white", "grey")]
ABOUT = {"words": {"fingerprint": "f1"}, "letters": {"fingerprint": "f2"}}
FIELDS = {
  "words": {"sequence": ((4, 3), "float"), "mask": ((4,), "bool")},
  "letters": {"pooled": ((2,), "float")},
}


def features(captions):
  """What two encoders would say: a function of each caption's digest."""
  numbers = (digests(captions) % np.uint64(1000)).astype(np.float32)
  sequence = numbers[:, None, None] + np.arange(12, dtype=np.float32).reshape(4, 3) / 16
  return {
    "words": {"sequence": sequence, "mask": np.arange(4) < (numbers % 4 + 1)[:, None]},
    "letters": {"pooled": np.stack([numbers, -numbers], axis=1)},
  }


def write(path, dtype="float32", hosts=1, captions=CAPTIONS, only=None, about=ABOUT):
  for host in range(hosts):
    writer = Writer(path, captions, about, FIELDS, dtype, 2, host, hosts)
    for shard in writer.missing()[:only]:
      writer.write(shard, features(writer.captions(shard)))
    writer.close()
  return writer


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_caption_is_found_again(tmp_path, dtype):
  writer = write(tmp_path / "cache", dtype)
  assert len(writer) == 7 and writer.missing() == []  # the empty caption besides
  cache = TextCache(tmp_path / "cache")
  wanted = [CAPTIONS[n] for n in (5, 0, 3, 3, 1)]
  for name, fields in features(wanted).items():
    for field, value in fields.items():
      found = cache.lookup(wanted)[name][field]
      expected = value if value.dtype == bool else value.astype(text_cache.DTYPES[dtype])
      assert found.dtype == expected.dtype
      np.testing.assert_array_equal(found, expected)
  null = cache.null()["words"]["sequence"]
  np.testing.assert_array_equal(
    null, features([""])["words"]["sequence"].astype(text_cache.DTYPES[dtype])
  )


def test_bfloat16_takes_half_the_room(tmp_path):
  sizes = {}
  for dtype in text_cache.DTYPES:
    writer = write(tmp_path / dtype, dtype)
    stored = np.load(tmp_path / dtype / "00000" / "words.sequence.npy")
    sizes[dtype] = stored.nbytes
  assert sizes["float32"] == 2 * sizes["bfloat16"] and writer.captions(3) != []
  assert TextCache(tmp_path / "bfloat16").null()["letters"]["pooled"].dtype == ml_dtypes.bfloat16


def test_hosts_write_different_shards_of_one_cache(tmp_path):
  whole, parts = tmp_path / "whole", tmp_path / "parts"
  write(whole)
  write(parts, hosts=3)
  for path in whole.rglob("*"):
    if path.is_file() and not path.name.startswith("."):
      assert (parts / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_it_goes_on_where_it_was_stopped(tmp_path):
  path = tmp_path / "cache"
  write(path, only=2)
  with pytest.raises(UserError, match="not whole: 2 of 4 shards are missing or damaged"):
    TextCache(path)
  before = (path / "00000" / "words.sequence.npy").stat().st_mtime_ns
  write(path)
  assert (path / "00000" / "words.sequence.npy").stat().st_mtime_ns == before
  TextCache(path).check_captions(CAPTIONS, "these")


def test_what_a_killed_process_left_is_cleared_and_a_living_one_is_left_alone(tmp_path):
  path = tmp_path / "cache"
  write(path, only=0)
  (path / ".00001").mkdir()
  (path / ".00001" / "half.npy").write_bytes(b"half")
  writer = Writer(path, CAPTIONS, ABOUT, FIELDS, "float32", 2)
  with pytest.raises(UserError, match="another process is writing the cache"):
    Writer(path, CAPTIONS, ABOUT, FIELDS, "float32", 2)
  Writer(path, CAPTIONS, ABOUT, FIELDS, "float32", 2, host=1, hosts=2).close()
  writer.write(1, features(writer.captions(1)))
  writer.close()
  names = sorted(p.name for p in (path / "00001").iterdir())
  assert names == ["letters.pooled.npy", "words.mask.npy", "words.sequence.npy"]
  assert not (path / ".00001").exists()


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
  writer = Writer(tmp_path / "cache", CAPTIONS, ABOUT, FIELDS, "float32", 2)
  save, calls = np.save, []

  def full(path, value):
    calls.append(path)
    if len(calls) == 2:
      raise OSError(28, "No space left on device")
    save(path, value)

  monkeypatch.setattr(np, "save", full)
  with pytest.raises(OSError, match="No space left"):
    writer.write(0, features(writer.captions(0)))
  left = sorted(p.name for p in (tmp_path / "cache").iterdir())
  assert left == [".lock.0", "captions.npy", "index.json"]
  assert 0 in writer.missing()


def test_features_that_are_not_finite_are_refused(tmp_path):
  writer = Writer(tmp_path / "cache", CAPTIONS, ABOUT, FIELDS, "float32", 2)
  broken = features(writer.captions(0))
  broken["letters"]["pooled"][1, 0] = np.nan
  with pytest.raises(UserError, match="letters gives features that are not finite"):
    writer.write(0, broken)
  assert 0 in writer.missing()


def test_another_encoder_s_or_data_set_s_cache_is_refused(tmp_path):
  path = tmp_path / "cache"
  write(path)
  cache = TextCache(path)
  cache.check({"words": "f1", "letters": "f2"})
  with pytest.raises(UserError, match="cache is stale: its features are of another words"):
    cache.check({"words": "other"})
  with pytest.raises(UserError, match="no features of 'clip', only of letters, words"):
    TextCache(path, ["clip"])
  assert set(TextCache(path, ["words"]).lookup(CAPTIONS)) == {"words"}
  with pytest.raises(UserError, match="lacks 1 of the 7 captions of mine, such as 'a cat'"):
    cache.check_captions([*CAPTIONS, "a cat"], "mine")
  with pytest.raises(UserError, match="lacks 1 of the 2 captions"):
    cache.lookup([CAPTIONS[0], "a cat"])
  for other in (
    dict(captions=CAPTIONS[1:]), dict(dtype="bfloat16"),
    dict(about={**ABOUT, "words": {"fingerprint": "f3"}}),
  ):
    with pytest.raises(UserError, match="holds another cache: its .* this one's is"):
      write(path, **other)
  TextCache(path)  # and nothing happened to it


def change(path, **values):
  index = json.loads((path / "index.json").read_text())
  (path / "index.json").write_text(json.dumps(index | values))


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda p: (p / "index.json").unlink(), "it has no index.json"),
    (lambda p: (p / "index.json").write_text("{"), "is no cache's index"),
    (lambda p: (p / "index.json").write_text("{}"), "is no cache's index"),
    (lambda p: (p / "index.json").write_text('{"format": 9, "dtype": "float32"}'), "format 9"),
    (lambda p: change(p, shard_size=0), "is of another version"),
    (lambda p: change(p, shard_size="x"), "is no cache's index"),
    (lambda p: change(p, encoders={"a": 3}), "is of another version"),
    (lambda p: (p / "captions.npy").write_bytes(b""), "captions.npy cannot be read"),
    (lambda p: np.save(p / "captions.npy", np.arange(7, dtype=np.uint64)), "is damaged"),
  ],
)
def test_damage_is_one_line(tmp_path, damage, message):
  write(tmp_path / "cache")
  damage(tmp_path / "cache")
  with pytest.raises(UserError, match=message) as error:
    TextCache(tmp_path / "cache")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "gone", "longer", "other", "narrow", "empty"])
def test_a_damaged_shard_is_found_at_once_and_written_again(tmp_path, damage):
  write(tmp_path / "cache")
  good = TextCache(tmp_path / "cache").lookup(CAPTIONS)
  path = tmp_path / "cache" / "00002" / "words.sequence.npy"
  if damage == "cut":
    path.write_bytes(path.read_bytes()[:-8])
  elif damage == "gone":
    path.unlink()
  elif damage == "longer":
    path.write_bytes(path.read_bytes() + b"x")
  elif damage == "empty":
    path.write_bytes(b"")
  else:
    shape, dtype = ((2, 4, 3), np.float64) if damage == "other" else ((2, 4, 1), np.float32)
    np.save(path, np.zeros(shape, dtype))
  with pytest.raises(UserError, match="1 of 4 shards are missing or damaged"):
    TextCache(tmp_path / "cache")
  write(tmp_path / "cache")
  again = TextCache(tmp_path / "cache").lookup(CAPTIONS)
  np.testing.assert_array_equal(again["words"]["sequence"], good["words"]["sequence"])


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
  captions = [f"a {n}" for n in range(120)]
  write(tmp_path / "cache", captions=captions)
  monkeypatch.setattr(shards, "files_allowed", lambda: 12)
  cache = TextCache(tmp_path / "cache")
  before = len(os.listdir("/proc/self/fd"))
  for _ in range(2):
    found = cache.lookup(captions)
    expected = features(captions)["letters"]["pooled"]
    np.testing.assert_array_equal(found["letters"]["pooled"], expected)
    assert len(os.listdir("/proc/self/fd")) <= before + 12


def test_a_list_without_an_index_is_an_attempt(tmp_path):
  write(tmp_path / "cache")
  for path in (tmp_path / "cache").iterdir():
    if path.name not in ("captions.npy", ".lock.0"):
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  write(tmp_path / "cache")
  TextCache(tmp_path / "cache")


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path):
  (tmp_path / "mine.txt").write_text("mine")
  with pytest.raises(UserError, match="is there and is no cache"):
    write(tmp_path)
  assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
