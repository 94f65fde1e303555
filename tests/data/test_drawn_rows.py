"""Which caption, crop and side a row's draw gives; synthetic captions; mixtures."""

import json

import numpy as np
import pytest
from PIL import Image

from t2i_jax.data import open_source
from t2i_jax.data.images import decode
from t2i_jax.data.loader import draws_at
from t2i_jax.data.memory import InMemory, in_memory
from t2i_jax.data.mirror import may_be_mirrored
from t2i_jax.data.sets import table
from t2i_jax.data.sets.pictures import Pictures, around, joined
from t2i_jax.errors import UserError

DRAWS = draws_at(0, np.arange(2000))
WIDE = np.repeat(np.arange(0, 240, 4, np.uint8)[None, :, None], 20, 0).repeat(3, 2)  # [20, 60, 3]


class Wide(Pictures):
  """Three pictures of 60 x 20 px, each brighter to the right."""

  def content(self, picture):
    return (self.folder / f"{picture}.png").read_bytes()


@pytest.fixture
def wide(tmp_path):
  captions = [["a dog", "a dog on the left", "a dog"], ["a cat."], ["two", "one two"]]
  for n in range(3):
    Image.fromarray(WIDE).save(tmp_path / f"{n}.png")
  columns = table.columns([f"a/{n}.png" for n in range(3)], captions,
                          size=np.array([[20, 60]] * 3, np.int32))
  table.write(tmp_path / "train", [table.take(columns, np.array([0])),
                                   table.take(columns, np.array([1, 2]))])

  def make(split="train", resolution=10, **options):
    source = Wide(table.Table(tmp_path / "train"), split, resolution, **options)
    source.folder = tmp_path
    return source

  make.folder = tmp_path
  return make


def test_tables_behind_each_other_are_one(wide):
  rows = wide().table
  assert list(rows.captions()) == ["a dog", "a dog on the left", "a dog", "a cat.", "two",
                                   "one two"]
  assert [rows.name(n) for n in range(3)] == ["a/0.png", "a/1.png", "a/2.png"]
  assert [rows.captions_of(n) for n in range(3)] == [(0, 3), (3, 4), (4, 6)]


def test_one_caption_each_of_them_or_all(wide):
  drawn = {wide().caption(2, int(d)) for d in DRAWS[:20]}
  assert drawn == {"two", "one two"}
  each = wide(captions="each")
  assert len(each) == 6 and each.captions_of(4) == ("two",) and each.picture_of(3) == 1
  assert wide(captions="joined").captions_of(0) == ("a dog. a dog on the left.",)
  assert joined(["Yes. ", "no", " "]) == "Yes. no."
  for option, value in (("captions", "all"), ("crop", "center")):
    with pytest.raises(UserError, match=f"unknown value of option '{option}'"):
      wide(**{option: value})


def test_random_crops_are_recorded(wide):
  source = wide(crop="random", sizes=True)
  assert source.varies and in_memory(source) is source
  seen = set()
  for draw in map(int, DRAWS[:300]):
    extra, image = source.extra(0, draw), source.drawn(0, draw)
    assert extra["size"].tolist() == [20, 60] and extra["crop"][0] == 0
    across = int(extra["crop"][1])
    # The picture is resized to 10 x 30; a column there is 8 levels brighter than the one before.
    assert abs(int(image[5, 5, 0]) - 8 * (across + 5)) <= 8
    seen.add(across)
  assert seen == set(range(21))
  held_out = wide("test", crop="random", sizes=True)
  assert not held_out.varies and held_out.extra(0, 5)["crop"].tolist() == [0, 10]


def test_the_centre_is_cropped_as_in_a_folder(wide):
  path, source = wide.folder / "0.png", wide(sizes=True)
  np.testing.assert_array_equal(source.drawn(0, 7), decode(path, 10))
  assert source.extra(0, 7)["size"].tolist() == [20, 60]
  assert source.extra(0, 7)["crop"].tolist() == [0, 10]


def test_pictures_are_mirrored_where_captions_allow(wide):
  source = wide(flips=True)
  kept = in_memory(source)
  assert isinstance(kept, InMemory)
  rows = kept.fetch(np.zeros(len(DRAWS), np.int64), DRAWS)
  mirrored = rows.image[:, 5, 0, 0] > rows.image[:, 5, 9, 0]
  sided = np.array([text == "a dog on the left" for text in rows.captions])
  assert not mirrored[sided].any() and 0.45 < mirrored[~sided].mean() < 0.55
  direct = source.fetch(np.zeros(50, np.int64), DRAWS[:50])
  np.testing.assert_array_equal(direct.image, rows.image[:50])
  assert direct.captions == rows.captions[:50]
  assert not wide("test", flips=True).mirrors


@pytest.mark.parametrize("caption, may", [
  ("a bird with bright wings", True), ("a small bird to the Right of it", False),
  ("the leftmost dog", False), ("a sign that says stop", False), ('he wrote "yes"', False),
  ("a clock on a wall", False), ("a cloak and a leftover pie", True), ("turns clockwise", False),
])  # fmt: skip
def test_what_may_be_mirrored(caption, may):
  assert may_be_mirrored(caption) == may


@pytest.mark.parametrize("size, box, wanted", [
  ((100, 100), (20, 30, 40, 20), (20, 20, 60, 60)), ((100, 100), (0, 0, 40, 40), (0, 0, 40, 40)),
  ((50, 200), (10, 10, 100, 20), (10, 0, 110, 50)),
])  # fmt: skip
def test_the_square_around_a_box(size, box, wanted):
  (height, width), (x, y, w, h) = size, box
  part = around(np.array([y / height, x / width, (y + h) / height, (x + w) / width]), size, 1.0)
  top, left, bottom, right = np.array(part) * [height, width, height, width]
  np.testing.assert_allclose([left, top, right, bottom], wanted, atol=1e-6)


def test_a_part_of_a_jpeg_is_decoded_at_a_size_that_suits_it(tmp_path):
  Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).resize(
    (960, 640), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
  part = (0.25, 0.5, 0.375, 0.625)
  with Image.open(tmp_path / "a.jpg") as image:
    wanted = image.crop((480, 160, 600, 240)).crop((20, 0, 100, 80)).resize(
      (40, 40), Image.Resampling.BICUBIC)
  found = decode(tmp_path / "a.jpg", 40, part)
  assert np.abs(found.astype(int) - np.asarray(wanted)).mean() < 2


def synthetic(path, *rows):
  path.write_text("".join(json.dumps(row) + "\n" for row in rows))
  return str(path)


def test_synthetic_captions_are_blended_by_their_share(wide):
  file = synthetic(
    wide.folder / "made.jsonl", {"file": "0.png", "caption": "a long\ntale"},
    {"file": "a/0.png", "captions": ["another tale"]}, {"file": "9.png", "caption": "of no one"},
  )
  source = wide(synthetic=file, synthetic_share=0.9)
  texts = [source.caption(0, int(d)) for d in DRAWS]
  share = np.mean([text.endswith("tale") for text in texts])
  assert 0.88 < share < 0.92 and 0.4 < texts.count("another tale") / len(texts) < 0.5
  assert source.caption(1, 3) == "a cat."  # it has none
  assert set(source.every_caption()) == {*wide().captions(), "a long tale", "another tale"}
  assert wide(synthetic=file, synthetic_share=1.0).captions_of(0) == ("a long tale",
                                                                      "another tale")
  kept = in_memory(source).fetch(np.zeros(9, np.int64), DRAWS[:9])
  assert kept.captions == texts[:9]


def test_wrong_synthetic_captions(wide):
  file = wide.folder / "made.jsonl"
  other = "has captions of another set: not one of its pictures, such as 'x.png'"
  for row, match in (
    ({"file": "x.png", "caption": "a"}, other), ({"caption": "a"}, "made.jsonl, line 1: not"),
    ({"file": "0.png", "caption": " "}, "line 1: no caption"),
    ({"file": "0.png", "caption": "half \ud83d"}, "line 1: a caption is not text"),
    ({"file": "0.png", "captions": None}, "line 1: a caption is not text"),
  ):  # fmt: skip
    with pytest.raises(UserError, match=match):
      wide(synthetic=synthetic(file, row))
  with pytest.raises(UserError, match="cannot read .*: No such file"):
    wide(synthetic=str(file) + "x")
  with pytest.raises(UserError, match="is no probability"):
    wide(synthetic_share=1.5)
  file.write_text("[" * 100_000)
  with pytest.raises(UserError, match="made.jsonl, line 1: not JSON"):
    wide(synthetic=str(file))


def test_synthetic_captions_of_the_same_file_name_in_other_folders(tmp_path):
  for split in ("train", "test"):
    (tmp_path / split).mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / split / "1.png")
  (tmp_path / "train/more").mkdir()
  Image.new("RGB", (8, 8)).save(tmp_path / "train/more/1.png")
  rows = [{"file": f"{name}/1.png", "caption": "c", "split": name.partition("/")[0]}
          for name in ("train", "train/more", "test")]
  (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

  def captions(*files):
    made = tmp_path / "made.jsonl"
    made.write_text("\ufeff" + "".join(
      json.dumps({"file": file, "captions": "of " + file}) + "\n" for file in files), "utf-8")
    source = open_source("folder", "train", 8, 0, {"path": str(tmp_path), "synthetic": str(made)})
    return [source.captions_of(n)[1:] for n in range(2)]

  assert captions("train/1.png", "test/1.png") == [("of train/1.png",), ()]
  assert captions("/data/train/1.png", "more/1.png") == [
    ("of /data/train/1.png",), ("of more/1.png",)]
  with pytest.raises(UserError, match="line 1: '1.png' may be train/1.png or train/more/1.png"):
    captions("1.png")
  with pytest.raises(UserError, match="has captions of another set"):
    captions("test/1.png")


def photos(path, names, **row):
  path.mkdir()
  for name in names:
    Image.new("RGB", (8, 8)).save(path / f"{name}.png")
  (path / "captions.jsonl").write_text("".join(
    json.dumps({"file": f"{n}.png", "caption": f"{path.name} {n}",
                "split": "test" if n == names[-1] else "train"}) + "\n" for n in names))
  return f"path={path}"


def test_a_mixture_draws_by_shares(tmp_path):
  small = photos(tmp_path / "small", list("abc"))
  large = photos(tmp_path / "large", [f"n{n}" for n in range(41)])
  parts = (f"folder 3 {small}", f"folder 1 {large}")
  source = open_source("mixture", "train", 8, 0, {"parts": parts})
  assert len(source) == 42 and abs(source.weights.sum() - 1) < 1e-12
  np.testing.assert_allclose([source.weights[0], source.weights[2]], [0.75 / 2, 0.25 / 40])
  assert source.captions_of(1) == ("small b",) and source.captions_of(2) == ("large n0",)
  rows = source.fetch(np.array([0, 41]), DRAWS[:2])
  assert rows.captions == ["small a", "large n39"] and rows.image.shape == (2, 8, 8, 3)
  assert [*source.captions()][:3] == ["small a", "large n0", "small b"]
  held_out = open_source("mixture", "held_out", 8, 0, {"parts": parts})
  assert [*held_out.captions()] == ["small c", "large n40"] and held_out.weights is None


@pytest.mark.parametrize("parts, match", [
  ((), "needs its option 'parts'"), (("folder",), "has no share; write 'folder 0.5'"),
  (("foldr 1",), "unknown data set 'foldr'"), (("folder -1",), "use a positive number"),
  (("folder 1 pth=x",), "unknown option of data set 'folder' 'pth'; did you mean 'path'"),
  (("scenes 1",), "is made on the fly"), (('"folder 1',), "No closing quotation; close"),
  (("folder 1 {}", "folder 1 {} sizes=True"), "give other arrays beside pictures"),
])  # fmt: skip
def test_wrong_mixtures(tmp_path, parts, match):
  there = photos(tmp_path / "photos", list("ab"))
  with pytest.raises(UserError, match=match):
    open_source("mixture", "train", 16, 0, {"parts": tuple(p.format(there) for p in parts)})
