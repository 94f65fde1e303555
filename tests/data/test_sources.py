"""What every data set says of its rows without their pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from t2i_jax.data import open_source
from t2i_jax.data.images import BadImage
from t2i_jax.data.memory import InMemory


def write_folder(path, captions=("a cat", "a dog", "a cow"), side=8):
  path.mkdir(exist_ok=True)
  lines = []
  for n, caption in enumerate(captions):
    Image.new("RGB", (side, side + n), (n * 40, 0, 0)).save(path / f"{n}.bmp")
    lines.append(json.dumps({"file": f"{n}.bmp", "caption": caption, "split": "train"}))
  (path / "captions.jsonl").write_text("\n".join(lines))
  return {"path": str(path)}


def folder(options, **more):
  return open_source("folder", "train", 8, 0, {**options, **more})


@pytest.fixture(params=["endless scenes", "listed scenes", "folder", "memory"])
def source(request, tmp_path):
  if request.param == "folder":
    return folder(write_folder(tmp_path / "photos"), sizes=True)
  if request.param == "memory":
    return InMemory(folder(write_folder(tmp_path / "photos"), sizes=True))
  split = "train" if request.param == "endless scenes" else "held_out_combinations"
  return open_source("scenes", split, 16, 3, {"labels": True})


def test_rows_are_described_as_they_are_fetched(source):
  indices, draws = np.array([2, 0, 1, 2]), np.array([5, 1, 2**63 + 1, 8], np.uint64)
  described, fetched = source.describe(indices, draws), source.fetch(indices, draws)
  assert described.image is None and fetched.image.dtype == np.uint8
  assert described.captions == fetched.captions
  assert described.extra.keys() == fetched.extra.keys() != set()
  for name, value in fetched.extra.items():
    np.testing.assert_array_equal(described.extra[name], value)


def test_describing_reads_no_picture(tmp_path, monkeypatch):
  opened = folder(write_folder(tmp_path / "photos"))
  monkeypatch.setattr(type(opened), "image", lambda self, index: 1 / 0)
  assert opened.describe(np.arange(3), np.zeros(3, np.uint64)).captions[1] == "a dog"
  assert opened.digest()
  monkeypatch.setattr("t2i_jax.data.scenes.source.render", lambda *given: 1 / 0)
  scenes = open_source("scenes", "train", 16, 3)
  assert len(scenes.describe(np.arange(3), np.zeros(3, np.uint64)).captions) == 3
  assert scenes.digest()


def test_a_folder_s_digest_is_of_its_pictures(tmp_path):
  before = folder(write_folder(tmp_path / "photos")).digest()
  again = write_folder(tmp_path / "moved", ("a tomcat", "a dog", "a cow"))
  assert folder(again).digest() == before == folder(again, sizes=True).digest()
  assert folder(write_folder(tmp_path / "larger", side=9)).digest() != before
  fewer = write_folder(tmp_path / "fewer")
  (tmp_path / "fewer" / "1.bmp").rename(tmp_path / "fewer" / "4.bmp")
  assert folder(fewer).digest() != before
  (tmp_path / "moved" / "1.bmp").write_bytes(b"short")
  assert folder(again).digest() != before
  with pytest.raises(BadImage):
    folder(again).image(1)


def test_a_digest_is_of_what_the_options_show(tmp_path, monkeypatch):
  monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
  photos = write_folder(tmp_path / "photos")
  plain = folder(photos).digest()
  # Which of the captions goes with a picture does not change it, unless that may mirror it.
  assert plain == folder(photos, captions="joined").digest()
  said = [{}, {"captions": "each"}, {"crop": "random"}, {"flips": True},
          {"flips": True, "captions": "joined"}, {"buckets": ("8x8", "8x16")},
          {"buckets": ("8x8", "8x24")}]  # fmt: skip
  digests = [folder(photos, **options).digest() for options in said]
  assert digests == [folder(photos, **options).digest() for options in said]
  assert digests[0] == plain and len(set(digests)) == len(said)
  # Only training pictures are cropped and mirrored by draws.
  lines = (tmp_path / "photos" / "captions.jsonl").read_text().replace("train", "test")
  (tmp_path / "photos" / "captions.jsonl").write_text(lines)
  held_out = [open_source("folder", "test", 8, 0, {**photos, **options}).digest()
              for options in ({}, {"crop": "random", "flips": True})]
  assert held_out[0] == held_out[1] == plain


def test_a_digest_is_the_same_in_memory(tmp_path):
  one, two = write_folder(tmp_path / "one"), write_folder(tmp_path / "two", side=9)
  assert InMemory(folder(one)).digest() == folder(one).digest()
  assert InMemory(folder(two)).digest() == folder(two).digest() != folder(one).digest()
  # What is found to be broken only when it is decoded is left out.
  broken = tmp_path / "one" / "1.bmp"
  broken.write_bytes(bytes(broken.stat().st_size))
  kept = InMemory(folder(one))
  assert len(kept) == 2 and kept.digest() != folder(one).digest()


def test_scenes_digest_is_of_the_scenes():
  def digest(split="train", resolution=16, seed=0, **options):
    return open_source("scenes", split, resolution, seed, options).digest()

  assert digest() == digest(resolution=32) == digest(labels=True)
  others = [digest(), digest(seed=1), digest(levels=("two",)), digest(levels=("one", "two")),
            digest("held_out_combinations"), digest("held_out_pairs")]  # fmt: skip
  assert len(set(others)) == len(others)
