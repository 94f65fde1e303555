"""Aspect-ratio buckets: which shape a picture gets, and the order of batches of one shape each."""

import json

import numpy as np
import pytest
from PIL import Image

from t2i_jax.data import open_source
from t2i_jax.data.buckets import Buckets, assigned, made_of, shapes_of
from t2i_jax.data.images import BadImage, decode
from t2i_jax.data.loader import Loader, _in_turns, evaluation_batches
from t2i_jax.data.memory import InMemory, in_memory
from t2i_jax.data.order import BucketedOrder
from t2i_jax.errors import UserError

SHAPES = ("24x8", "16x16", "8x24")
SIZES = [(40, 40), (90, 30), (30, 80), (48, 50), (30, 90), (31, 90), (60, 20)]  # width, height


def test_shapes_of_a_step_are_as_large_as_the_area_allows():
  shapes = made_of(1024, 64)
  assert {(2048, 512), (1344, 768), (1024, 1024), (832, 1216), (512, 1984)} <= set(shapes)
  assert all(h * w <= 1024**2 and h % 64 == 0 == w % 64 for h, w in shapes)
  assert all((w, h) in shapes for h, w in shapes) and len(set(shapes)) == len(shapes)
  assert shapes_of(("8",), 16) == made_of(16, 8) == ((32, 8), (24, 8), (16, 16), (8, 24), (8, 32))
  assert shapes_of(SHAPES, 16) == ((24, 8), (16, 16), (8, 24))


@pytest.mark.parametrize("texts, match", [
  (("5",), "buckets=5: sides are multiples of it, and model.resolution=16"),
  (("0",), "use a divisor"), (("16x16", "16"), "'16' is not HEIGHTxWIDTH"),
  (("0x8",), "'0x8' is not"), (("8x16", "16x32"), "8x16 and 16x32 have one ratio"),
])  # fmt: skip
def test_wrong_buckets(texts, match):
  with pytest.raises(UserError, match=match):
    shapes_of(texts, 16)


@pytest.mark.parametrize("resolution, step, match", [
  (16, 16, "buckets=16 gives the square alone at model.resolution=16; use a smaller step, such as "
   "8, or name"),
  (1024, 8, r"gives 257 shapes, each of which is compiled \(at most 64\) .* a larger step, such as "
   "64, or name"),
  (13, 13, "the square alone at model.resolution=13; use a smaller step, such as 1, or name"),
  (101, 1, r"gives 203 shapes, .*=101; name the shapes"),
])  # fmt: skip
def test_a_step_gives_neither_one_shape_nor_too_many(resolution, step, match):
  with pytest.raises(UserError, match=match):
    made_of(resolution, step)


def test_pictures_go_where_their_ratio_is_nearest():
  rng = np.random.default_rng(0)
  heights, widths = rng.integers(50, 500, (2, 300))
  shapes = made_of(256, 64)
  buckets = assigned(shapes, heights, widths)
  distance = np.abs(np.log(heights / widths)[:, None] - np.log([h / w for h, w in shapes]))
  np.testing.assert_array_equal(buckets.of, distance.argmin(axis=1))
  assert buckets.of.dtype == np.uint8 and buckets.shapes == shapes


class Rows:
  """As much of a source as an order reads."""

  def __init__(self, counts, weights=None):
    self.buckets = Buckets(((1, 1),) * len(counts), np.repeat(np.arange(len(counts)), counts))
    self.weights = weights

  def __len__(self):
    return len(self.buckets.of)


def batches_of(order, size, first, last):
  return [order(np.arange(s * size, (s + 1) * size))[0] for s in range(first, last)]


def test_every_batch_is_of_one_bucket_and_every_row_comes_once_an_epoch():
  source, size = Rows([37, 3, 24, 0]), 8
  order = BucketedOrder(5, source, size)
  batches = batches_of(order, size, 0, 800)  # 100 epochs of 64 rows
  for batch in batches:
    assert len(set(source.buckets.of[batch])) == 1
  counts = np.bincount(np.concatenate(batches), minlength=64)
  # Half a batch more or less of a bucket, over 100 epochs.
  assert np.abs(counts - 100).max() <= 2
  for epochs in (1, 7):
    seen = np.bincount(np.concatenate(batches[: 8 * epochs]), minlength=64)
    assert np.abs(seen[:37] - epochs).max() <= 1 and np.abs(seen[40:] - epochs).max() <= 1
  # A bucket begins its permutation again when all of its rows were there.
  large = np.concatenate([b for b in batches if source.buckets.of[b[0]] == 0])
  assert sorted(large[:37]) == list(range(37)) == sorted(large[37:74])
  assert list(large[:37]) != list(large[37:74])
  # Shuffled: the buckets of an epoch do not come one after the other.
  plan = [source.buckets.of[batch[0]] for batch in batches[:100]]
  assert sum(a != b for a, b in zip(plan, plan[1:], strict=False)) > 20
  np.testing.assert_allclose(order.shares, np.array([37, 3, 24, 0]) / 64)


def test_the_order_is_a_function_of_the_position():
  source, size = Rows([37, 3, 24]), 8
  whole = batches_of(BucketedOrder(5, source, size), size, 0, 60)
  for step in (59, 3, 30):  # a fresh one, from wherever it begins
    (batch,) = batches_of(BucketedOrder(5, source, size), size, step, step + 1)
    np.testing.assert_array_equal(batch, whole[step])
  order = BucketedOrder(5, source, size)
  halves = [order(np.arange(a, a + 4) + 8 * 20)[0] for a in (0, 4)]  # of two hosts
  np.testing.assert_array_equal(np.concatenate(halves), whole[20])
  other = batches_of(BucketedOrder(6, source, size), size, 0, 60)
  assert any(list(a) != list(b) for a, b in zip(whole, other, strict=True))


def test_rows_are_drawn_by_their_weights():
  weights = np.concatenate([np.full(10, 0.05), np.full(40, 0.0125)])
  order = BucketedOrder(0, Rows([10, 40], weights), 5)
  batches = batches_of(order, 5, 0, 800)
  counts = np.bincount(np.concatenate(batches), minlength=50)
  assert counts[:10].sum() == counts[10:].sum() == 2000
  assert np.abs(counts / 4000 - weights).max() < 0.25 * weights.max()
  weights = np.array([0.25, 0.75, 0.0])
  counts = np.bincount(np.concatenate(batches_of(BucketedOrder(0, Rows([2, 1], weights), 2), 2, 0,
                                                 500)), minlength=3)
  assert counts[2] == 0 and abs(counts[0] / 1000 - 0.25) < 0.05


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
  return tmp_path / "cache"


def write_photos(path, sizes=SIZES, caption="thing {}"):
  """Pictures of these sizes, each brighter to the right and to the bottom."""
  path.mkdir()
  lines = []
  for n, (width, height) in enumerate(sizes):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 250, width, dtype=np.uint8)
    pixels[..., 1] = np.linspace(0, 250, height, dtype=np.uint8)[:, None]
    Image.fromarray(pixels).save(path / f"{n}.png")
    lines.append({"file": f"{n}.png", "caption": caption.format(n), "split": "train"})
  (path / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  return str(path)


def photos(path, **options):
  options = {"path": str(path), "buckets": SHAPES, **options}
  return open_source("folder", "train", 16, 0, options)


def read_text(captions):
  return {"text": {"n": {"ids": np.array([[int(c.split()[1])] for c in captions], np.int32)}}}


def test_a_folder_in_buckets(tmp_path):
  write_photos(tmp_path / "photos")
  source = photos(tmp_path / "photos", sizes=True)
  assert source.buckets.of.tolist() == [1, 2, 0, 1, 0, 0, 2]
  assert [source.image(n).shape[:2] for n in range(3)] == [(16, 16), (8, 24), (24, 8)]
  np.testing.assert_array_equal(source.image(2), decode(tmp_path / "photos" / "2.png", (24, 8)))
  # 30 x 80 is resized to 9 x 24, of which one column is cut off, half on each side.
  assert source.extra(2, 0)["size"].tolist() == [80, 30]
  assert source.extra(2, 0)["crop"].tolist() == [0, 0]
  assert source.extra(3, 0)["crop"].tolist() == [0, 0]  # 50 x 48
  with pytest.raises(UserError, match="has no classes"):
    photos(tmp_path / "photos", captions="class")


def test_crops_are_drawn_and_recorded_within_a_bucket(tmp_path):
  write_photos(tmp_path / "photos", [(120, 30), (90, 30)])
  source = photos(tmp_path / "photos", sizes=True, crop="random", flips=True)
  assert source.varies
  seen = set()
  for draw in range(200):
    image, extra = source.shown(0, draw), source.extra(0, draw)
    across = int(extra["crop"][1])  # of the picture resized to 32 x 8, or of its mirror image
    assert image.shape == (8, 24, 3) and extra["crop"][0] == 0
    mirrored = source.mirrored(0, draw)
    column = 31 - (across + 12) if mirrored else across + 12
    assert abs(int(image[4, 12, 0]) - column * 250 / 31) < 6
    seen.add((across, mirrored))
  assert seen == {(across, mirrored) for across in range(9) for mirrored in (False, True)}


def test_loaders_of_hosts_workers_and_memory_agree(tmp_path):
  write_photos(tmp_path / "photos")
  source = photos(tmp_path / "photos", sizes=True, flips=True)
  kept = in_memory(source)
  assert isinstance(kept, InMemory) and in_memory(source, memory_limit=4000) is source
  make = lambda source, **more: Loader(source, read_text, 4, seed=3, **more)  # noqa: E731
  loaders = [make(source), make(kept), make(source, rows=[0, 1]), make(source, rows=[2, 3])]
  whole, shapes = [], set()
  for _ in range(12):
    one, memory, *hosts = [next(loader) for loader in loaders]
    whole.append(one)
    shapes.add(one["image"].shape)
    for key in ("image", "index", "size", "crop"):
      np.testing.assert_array_equal(one[key], memory[key])
      np.testing.assert_array_equal(one[key], np.concatenate([h[key] for h in hosts]))
    assert one["image"].shape[1:3] == kept.buckets.shapes[kept.buckets.of[one["index"][0]]]
  assert shapes == {(4, 24, 8, 3), (4, 16, 16, 3), (4, 8, 24, 3)}
  with pytest.raises(ValueError, match=r"of one bucket, these 3 are of 2: \[1, 2\]"):
    kept.fetch(np.array([0, 1, 3]), np.zeros(3, np.uint64))
  assert [shape for shape, _ in loaders[0].shapes()] == [(24, 8), (16, 16), (8, 24)]
  resumed = make(kept)
  resumed.restore({"position": 27})  # after batches of another size: on with the next whole one
  np.testing.assert_array_equal(next(resumed)["image"], whole[7]["image"])
  for loader in (*loaders, resumed):
    loader.close()


def test_shapes_that_do_not_fill_a_batch_are_counted_once(tmp_path, caplog, monkeypatch):
  write_photos(tmp_path / "photos")  # of the shapes 3, 2 and 2
  source = photos(tmp_path / "photos")
  Loader(source, read_text, 2, seed=0)
  assert not caplog.records
  Loader(source, read_text, 3, seed=0)
  (record,) = caplog.records
  assert record.getMessage() == (
    "2 of 3 shapes have fewer pictures than a batch of 3, which is filled with copies of them: "
    "8x24 has 2, 16x16 has 2; use fewer shapes (data.options.buckets)")
  monkeypatch.setattr("t2i_jax.parallel.distributed.is_primary", lambda: False)
  Loader(source, read_text, 3, seed=0)
  assert len(caplog.records) == 1


def test_evaluation_gives_every_row_once_in_batches_of_one_shape(tmp_path):
  write_photos(tmp_path / "photos")
  (tmp_path / "photos" / "5.png").write_bytes((tmp_path / "photos" / "5.png").read_bytes()[:90])
  source = photos(tmp_path / "photos")
  batches = list(evaluation_batches(source, read_text, 2))
  assert [batch["image"].shape[1:3] for batch in batches] == [(24, 8), (16, 16), (8, 24), (24, 8)]
  seen = np.concatenate([b["index"][b["valid"]] for b in batches])
  assert sorted(seen) == [0, 1, 2, 3, 4, 6]


def test_the_first_batches_of_an_evaluation_are_of_the_largest_buckets():
  counts = np.full(20, 3)
  counts[[4, 11, 17]] = 40, 90, 60
  counts[9] = 7  # the fullest of those that have one batch
  source = Rows(counts)
  buckets = [int(source.buckets.of[rows[0]]) for rows in _in_turns(source, 10)]
  assert len(buckets) == 4 + 9 + 6 + 17 and set(buckets[:8]) == {4, 11, 17}
  # Each beginning is in proportion; what has one batch alone comes in the middle.
  for n in range(1, 37):
    for bucket, count in ((4, 4), (11, 9), (17, 6)):
      assert abs(buckets[:n].count(bucket) - count * n / 36) <= 3
  assert buckets.index(9) < min(buckets.index(n) for n in (0, 1, 19))
  assert [len(rows) for rows in _in_turns(Rows([25]), 10)] == [10, 10, 5]


def test_what_cannot_be_read_is_replaced_within_its_bucket(tmp_path):
  write_photos(tmp_path / "photos")
  broken = tmp_path / "photos" / "1.png"
  broken.write_bytes(broken.read_bytes()[:90])  # its header is whole
  source = photos(tmp_path / "photos")
  with pytest.raises(BadImage):
    source.image(1)
  assert {source.substitute(1, number) for number in range(20)} == {1, 6}
  loader = Loader(source, read_text, 2, seed=0)
  wide = [b for b in (next(loader) for _ in range(30)) if b["image"].shape[1:3] == (8, 24)]
  loader.close()
  assert wide and all(set(batch["index"]) == {6} for batch in wide)


def test_sizes_are_read_once(tmp_path, cache, monkeypatch):
  path = tmp_path / "photos"
  write_photos(path)
  first = photos(path).buckets.of
  (index,) = (cache / "data" / "folder").iterdir()
  assert json.loads(index.read_text())["1.png"][2:] == [30, 90]
  (path / "0.png").write_bytes(b"no picture")
  opened = []
  size_of = "t2i_jax.data.measured.size_of"
  monkeypatch.setattr(size_of, lambda file, real=decode: opened.append(file) or (9, 9))
  again = photos(path).buckets.of
  assert opened == [str(path / "0.png")] and again.tolist() == [1, *first[1:].tolist()]
  (whole,) = index.parent.iterdir()  # nothing temporary is left
  entries = json.loads(whole.read_text())
  entries |= {"1.png": entries["1.png"][:3], "2.png": [*entries["2.png"][:2], "a", 1], "3.png": 5}
  index.write_text(json.dumps(entries))
  assert len(photos(path)) == 7
  # By several threads, so in no order.
  assert sorted(opened[1:]) == [str(path / f"{n}.png") for n in (1, 2, 3)]
  for damaged in ("{", "[]"):
    del opened[:]
    index.write_text(damaged)
    assert len(photos(path)) == len(opened) == 7


def test_a_mixture_in_buckets(tmp_path):
  one, two = write_photos(tmp_path / "one"), write_photos(tmp_path / "two", SIZES[:2])
  (tmp_path / "two" / "0.png").write_bytes(b"")
  parts = (f"folder 1 path={one} crop=random", f"folder 1 path={two}")
  source = open_source("mixture", "train", 16, 0, {"parts": parts, "buckets": SHAPES})
  assert source.buckets.of.tolist() == [1, 2, 0, 1, 0, 0, 2, 2] and len(source) == 8
  np.testing.assert_allclose(source.weights, [0.5 / 7] * 7 + [0.5])
  loader = Loader(source, read_text, 4, seed=0)
  for _ in range(10):
    batch = next(loader)
    assert {tuple(source.buckets.shapes[source.buckets.of[n]]) for n in batch["index"]} == {
      batch["image"].shape[1:3]}
  loader.close()
  with pytest.raises(UserError, match="has buckets of its own, and batches are of all parts"):
    open_source("mixture", "train", 16, 0, {"parts": (f"folder 1 path={one} buckets=8",)})
