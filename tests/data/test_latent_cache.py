"""Moments computed before: stored, found again by row, refused when they are not the right ones."""

import dataclasses
import json
import os
import pickle

import ml_dtypes
import numpy as np
import pytest

from t2i_jax.data import shards
from t2i_jax.data.base import FileSource, Rows, Source
from t2i_jax.data.images import BadImage
from t2i_jax.data.latent_cache import LatentCache, LatentSource, Writer, about, check_folder
from t2i_jax.data.loader import Loader, draws_at, evaluation_batches
from t2i_jax.data.memory import InMemory
from t2i_jax.data.shards import DTYPES
from t2i_jax.errors import UserError

ROWS, SHAPE = 7, (2, 2, 6)
STAGE = {"fingerprint": "f1"}


class Pictures(FileSource):
  """Row i is a picture of colour i with two captions; pictures count how often they are read."""

  def __init__(self, length=ROWS, bad=(), weights=None):
    self.resolution, self.length, self.bad, self.weights = 4, length, bad, weights
    self.read = 0

  def __len__(self):
    return self.length

  def image(self, index):
    self.read += 1
    if index in self.bad:
      raise BadImage(f"{index}.png", "damaged")
    return np.full((4, 4, 3), index, np.uint8)

  def captions_of(self, index):
    return (f"{index} a", f"{index} b")

  def extra_of(self, index):
    return {"label": np.int32(index * 10)}


class Endless(Source):
  resolution, infinite = 4, True

  def __len__(self):
    return 1000

  def fetch(self, indices, draws):
    raise AssertionError("no picture is to be made")

  def describe(self, indices, draws):
    return Rows(None, [f"{i}" for i in indices])

  def captions(self):
    return iter(("0", "1"))

  def every_caption(self):
    return iter(("0", "1", "2"))


def moments(rows, variants=1):
  """Row r has means r + k/8 by channel, those of the second variant negated; variance 1/4."""
  mean = np.asarray(rows, np.float32)[:, None, None, None, None] + np.arange(3) / np.float32(8)
  mean = np.broadcast_to(mean, (len(rows), 1, 2, 2, 3))
  mean = np.concatenate([mean, -mean][:variants], axis=1)
  return np.concatenate([mean, np.full_like(mean, np.log(0.25))], axis=-1).astype(np.float32)


def write(path, source=None, split="train", dtype="float32", hosts=1, only=None, variants=1,
          stage=STAGE, rows=ROWS, size=2, options=None, finish=True, bad=()):
  source = source or Pictures(rows)
  data = about(source, "mine", options or {"path": "there"}, split, 0, rows)
  for host in range(hosts):
    writer = Writer(path, data, stage, SHAPE, dtype, variants, size, host, hosts)
    for shard in writer.missing()[:only]:
      here = writer.layout.rows_of(shard)
      writer.write(shard, moments(here, variants), ~np.isin(here, bad))
    writer.close()
  if finish:
    writer.finish()
  return writer


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_is_found_again_as_it_was_stored(tmp_path, dtype):
  writer = write(tmp_path, dtype=dtype)
  assert writer.missing() == [] and writer.is_finished()
  cache = LatentCache(tmp_path, "train")
  rows = np.array([5, 0, 3, 3, 6])
  found = cache.lookup(rows)
  assert found.dtype == cache.dtype == DTYPES[dtype] and found.shape == (5, *SHAPE)
  np.testing.assert_array_equal(found, moments(rows)[:, 0].astype(DTYPES[dtype]))
  expected = 24 * DTYPES[dtype].itemsize + 1 + 6 * 8
  assert writer.layout.bytes_a_row == expected


def test_variants_are_told_apart(tmp_path):
  write(tmp_path, variants=2)
  cache = LatentCache(tmp_path, "train")
  rows, variants = np.array([1, 4, 1]), np.array([1, 0, 0])
  found = cache.lookup(rows, variants)
  np.testing.assert_array_equal(found, moments(rows, 2)[np.arange(3), variants])


def test_the_statistics_are_those_of_draws(tmp_path):
  """Of row means r + k/8 and variance 1/4: mean 3 + k/8, variance of the means 4 and 1/4."""
  rows, size = 4000, 512
  source = Pictures(rows)
  data = about(source, "mine", {}, "train", 0, rows)
  writer = Writer(tmp_path, data, STAGE, SHAPE, "float32", 1, size)
  for shard in writer.missing():
    here = np.asarray(writer.layout.rows_of(shard))
    writer.write(shard, moments(here % 7), np.ones(len(here), bool))
  writer.finish()
  cache = LatentCache(tmp_path, "train")
  statistics = cache.statistics
  np.testing.assert_allclose(statistics["channels"]["mean"], 3 + np.arange(3) / 8, atol=2e-3)
  np.testing.assert_allclose(statistics["channels"]["std"], np.sqrt(4.25), atol=2e-3)
  assert statistics["mean"] == pytest.approx(3.125, abs=2e-3)
  assert statistics["std"] == pytest.approx(np.sqrt(4.25 + 1 / 96), abs=2e-3)
  found = cache.lookup(np.arange(rows)).astype(np.float64)
  drawn = found[..., :3] + np.exp(found[..., 3:] / 2) * np.random.default_rng(0).normal(
    size=(rows, 2, 2, 3)
  )
  np.testing.assert_allclose(statistics["mean"], drawn.mean(), atol=0.03)
  np.testing.assert_allclose(statistics["std"], drawn.std(), atol=0.03)


def test_large_means_lose_no_variance(tmp_path):
  """Accumulated in float32, a standard deviation of 0.5 beside a mean of 1000 would be lost."""
  data = about(Pictures(500), "mine", {}, "train", 0, 500)
  writer = Writer(tmp_path, data, STAGE, SHAPE, "float32", 1, 100)
  far = np.full((100, 1, 2, 2, 6), 1000.0)
  far[..., 3:] = np.log(0.25)
  for shard in writer.missing():
    writer.write(shard, far, np.ones(100, bool))
  writer.finish()
  assert LatentCache(tmp_path, "train").statistics["std"] == pytest.approx(0.5, rel=1e-4)


def test_hosts_write_different_shards_of_one_cache(tmp_path):
  write(tmp_path / "whole")
  write(tmp_path / "parts", hosts=3)
  for path in (tmp_path / "whole").rglob("*"):
    if path.is_file() and not path.name.startswith("."):
      other = tmp_path / "parts" / path.relative_to(tmp_path / "whole")
      assert other.read_bytes() == path.read_bytes()


def test_it_goes_on_where_it_was_stopped(tmp_path):
  write(tmp_path, only=2, finish=False)
  with pytest.raises(UserError, match="not whole: 2 of 4 shards are missing or damaged"):
    LatentCache(tmp_path, "train")
  (tmp_path / "train" / ".00002").mkdir()  # by a process that was killed
  (tmp_path / "train" / ".00002" / "half.npy").write_bytes(b"half")
  before = (tmp_path / "train" / "00000" / "moments.npy").stat().st_mtime_ns
  write(tmp_path, finish=False)
  with pytest.raises(UserError, match="not whole: it has no summary.json; give the same"):
    LatentCache(tmp_path, "train")
  write(tmp_path)
  assert (tmp_path / "train" / "00000" / "moments.npy").stat().st_mtime_ns == before
  np.testing.assert_array_equal(
    LatentCache(tmp_path, "train").lookup(np.arange(ROWS)), moments(range(ROWS))[:, 0]
  )


def test_one_folder_holds_several_splits(tmp_path):
  write(tmp_path)
  write(tmp_path, split="test", rows=3)
  check_folder(tmp_path, ("train", "test"))
  assert len(LatentCache(tmp_path, "test").rows) == 3
  assert len(LatentCache(tmp_path, "train").rows) == ROWS
  with pytest.raises(UserError, match="has no split 'val', only test, train; add it with .*=val"):
    LatentCache(tmp_path, "val")
  with pytest.raises(UserError, match="no cache of latents in 'nowhere'"):
    LatentCache("nowhere", "train")


def test_a_folder_that_is_no_cache_is_left_alone(tmp_path):
  (tmp_path / "train").mkdir()
  (tmp_path / "train" / "mine.png").write_text("mine")
  with pytest.raises(UserError, match="is there and is no cache"):
    write(tmp_path)
  (tmp_path / "index.json").write_text("{}")
  with pytest.raises(UserError, match="is there and is no cache of latents"):
    check_folder(tmp_path, ("train",))
  assert [p.name for p in (tmp_path / "train").iterdir()] == ["mine.png"]


def test_moments_that_do_not_fit_the_type_are_refused(tmp_path):
  data = about(Pictures(), "mine", {}, "train", 0, ROWS)
  writer = Writer(tmp_path, data, STAGE, SHAPE, "float16", 1, 4)
  large = moments(range(4, 7))
  large[1, 0, 0, 0, 0] = 1e6
  with pytest.raises(UserError, match="row 5 that are not finite as float16; use --dtype=float32"):
    writer.write(1, large, np.ones(3, bool))
  writer.write(1, large, np.array([True, False, True]))  # nor does it count if there is no picture
  assert writer.missing() == [0]


def test_another_first_stage_s_or_data_set_s_cache_is_refused(tmp_path):
  write(tmp_path)
  cache = LatentCache(tmp_path, "train")
  cache.check("f1")
  with pytest.raises(UserError, match="is stale: its split 'train' is of another first stage"):
    cache.check("f2")
  cache.check_data(Pictures(), "mine", {"path": "elsewhere"})  # where pictures lie does not matter
  for source, name, message in (
    (Pictures(), "yours", "is of data set mine, this run's is of yours"),
    (Pictures(8), "mine", "others now, 8 in place of 7 .its data.options.path is there"),
    (Changed(), "mine", "the pictures of split 'train' are others now .its data.options.path"),
    (Larger(), "mine", "is of resolution 4, this run's is of 8"),
  ):
    with pytest.raises(UserError, match=f"is stale: .*{message}"):
      cache.check_data(source, name, {"path": "elsewhere"})
  for other in (dict(dtype="float16"), dict(stage={"fingerprint": "f2"}), dict(size=3),
                dict(variants=2), dict(source=Changed())):
    with pytest.raises(UserError, match="holds another cache: its .* this one's is"):
      write(tmp_path, **other)
  LatentCache(tmp_path, "train")  # and nothing happened to it


class Changed(Pictures):
  def digest(self):
    return "another"


class Larger(Pictures):
  def __init__(self):
    super().__init__()
    self.resolution = 8


def change(path, **values):
  index = json.loads((path / "index.json").read_text())
  (path / "index.json").write_text(json.dumps(index | values))


@pytest.mark.parametrize(
  "damage, message",
  [
    (lambda p: (p / "index.json").write_text("{"), "is no cache's index"),
    (lambda p: (p / "index.json").write_text('{"format": 9}'), "format 9"),
    (lambda p: change(p, shard_size=0), "is of another version or kind"),
    (lambda p: change(p, data=3), "is no cache's index"),
    (lambda p: change(p, first_stage={}), "is of another version or kind"),
    (lambda p: (p / "summary.json").write_text("{"), "summary.json is damaged; delete it"),
    (lambda p: (p / "summary.json").write_text('{"statistics": 3}'), "summary.json is damaged"),
  ],
)
def test_damage_is_one_line(tmp_path, damage, message):
  write(tmp_path)
  damage(tmp_path / "train")
  with pytest.raises(UserError, match=message) as error:
    LatentCache(tmp_path, "train")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["moments", "readable", "sums"])
@pytest.mark.parametrize("damage", ["cut", "gone", "other"])
def test_a_damaged_shard_is_found_at_once_and_written_again(tmp_path, name, damage):
  write(tmp_path)
  path = tmp_path / "train" / "00002" / f"{name}.npy"
  if damage == "cut":
    path.write_bytes(path.read_bytes()[:-1])
  elif damage == "gone":
    path.unlink()
  else:
    np.save(path, np.zeros((2, 5), np.float16))
  with pytest.raises(UserError, match="1 of 4 shards are missing or damaged"):
    LatentCache(tmp_path, "train")
  write(tmp_path)
  np.testing.assert_array_equal(
    LatentCache(tmp_path, "train").lookup(np.arange(ROWS)), moments(range(ROWS))[:, 0]
  )


def test_all_caches_together_keep_few_files_open(tmp_path, monkeypatch):
  for split in ("train", "test"):
    write(tmp_path, split=split, rows=120, source=Pictures(120))
  monkeypatch.setattr(shards, "files_allowed", lambda: 10)
  monkeypatch.setattr(shards.ShardReader, "_all", type(shards.ShardReader._all)())
  caches = [LatentCache(tmp_path, split) for split in ("train", "test")]
  before = len(os.listdir("/proc/self/fd"))
  for cache in caches * 2:
    np.testing.assert_array_equal(cache.lookup(np.arange(120)), moments(range(120))[:, 0])
    assert len(os.listdir("/proc/self/fd")) <= before + 10


def text(captions):
  return {"text": {"words": {"ids": np.array([[int(c.split()[0])] for c in captions], np.int32)}}}


def test_batches_are_those_of_the_pictures_with_latents_in_their_place(tmp_path):
  """Order, captions, weights and further arrays; two pictures are damaged, and none is read."""
  bad, weights = (2, 5), np.arange(1, ROWS + 1) / 28
  there = InMemory(Pictures(bad=bad, weights=weights))
  write(tmp_path, source=Pictures(bad=bad), bad=bad, dtype="bfloat16")
  source = Pictures(bad=bad, weights=weights)
  here = LatentSource(source, LatentCache(tmp_path, "train"))
  assert len(here) == len(there) == 5 and list(here.captions()) == list(there.captions())
  said = []

  def read(captions):
    said.append(captions)
    return text(captions)

  for ours, theirs in zip(Loader(here, read, 4, 3), Loader(there, read, 4, 3), strict=False):
    assert said[-1] == said[-2]
    image = theirs.pop("image")
    latent = ours.pop("latent")
    assert latent.dtype == ml_dtypes.bfloat16 and latent.shape == (4, *SHAPE)
    np.testing.assert_array_equal(latent[:, 0, 0, 0].astype(int), image[:, 0, 0, 0])
    assert ours.keys() == theirs.keys() and "image" not in ours
    for key in ("index", "label"):
      np.testing.assert_array_equal(ours[key], theirs[key])
    if len(said) > 10:
      break
  for ours, theirs in zip(
    evaluation_batches(here, text, 4), evaluation_batches(there, text, 4), strict=True
  ):
    np.testing.assert_array_equal(ours["valid"], theirs["valid"])
    np.testing.assert_array_equal(
      ours["latent"][:, 0, 0, 0].astype(int), theirs["image"][:, 0, 0, 0]
    )
  assert source.read == 0


def test_the_variant_follows_from_the_draw_and_not_from_the_caption_s(tmp_path):
  write(tmp_path, variants=2)
  source = LatentSource(Pictures(), LatentCache(tmp_path, "train"))
  draws = draws_at(0, np.arange(4000))
  rows = source.fetch(np.full(4000, 3), draws)
  mirrored = rows.extra["latent"][:, 0, 0, 0] < 0
  np.testing.assert_array_equal(mirrored, draws >> np.uint64(63) == 1)
  second = np.array([caption == "3 b" for caption in rows.captions])
  for here in (second, ~second):
    assert 0.45 < mirrored[here].mean() < 0.55


def test_an_endless_data_set_becomes_the_rows_that_are_stored(tmp_path):
  write(tmp_path, source=Endless())
  cache = LatentCache(tmp_path, "train")
  cache.check_data(Endless(), "mine", {})
  source = LatentSource(Endless(), cache)
  assert len(source) == ROWS and not source.infinite
  batches = Loader(source, text, ROWS, 0)
  for _ in range(3):
    batch = next(batches)
    assert sorted(batch["index"]) == list(range(ROWS))
    np.testing.assert_array_equal(batch["latent"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["text"]["words"]["ids"][:, 0], batch["index"])


def test_another_process_opens_files_of_its_own(tmp_path):
  write(tmp_path)
  source = LatentSource(Pictures(), LatentCache(tmp_path, "train"))
  indices, draws = np.arange(ROWS), np.zeros(ROWS, np.uint64)
  before = source.fetch(indices, draws)
  sent = pickle.dumps(source)
  assert len(sent) < 4000
  after = pickle.loads(sent).fetch(indices, draws)
  np.testing.assert_array_equal(after.extra["latent"], before.extra["latent"])
  assert dataclasses.replace(after, extra={}) == dataclasses.replace(before, extra={})
