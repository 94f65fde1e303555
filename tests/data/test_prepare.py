"""Preparing public data sets from miniatures of their downloads, and reading them."""

import json
import os
import pickle
import signal
import subprocess
import sys

import miniatures
import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")

from t2i_jax.data import default_options, open_source, prepare, read_labels, sets, splits
from t2i_jax.data.images import BadImage, size_of
from t2i_jax.data.loader import Loader
from t2i_jax.data.memory import InMemory, in_memory
from t2i_jax.data.sets import classes, shard
from t2i_jax.errors import UserError


def run(name, source, output, *flags, workers=0):
  prepare.main([name, f"--source={source}", f"--output={output}", f"--workers={workers}", *flags])


def fails(capsys, match, name, source, output="out", *flags):
  """The command ends with status 2 and one line."""
  capsys.readouterr()
  with pytest.raises(SystemExit) as raised:
    run(name, source, output, *flags)
  line = capsys.readouterr().err.splitlines()[-1]
  assert raised.value.code == 2 and line.startswith("error: ")
  assert match in line, line


MAKE = {"coco": miniatures.coco, "coco_karpathy": miniatures.coco_karpathy, "cub": miniatures.cub}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
  """Prepares the miniature of a set, once; returns the options that open it."""
  root, there = tmp_path_factory.mktemp("sets"), {}

  def make(name):
    if name not in there:
      run(name, MAKE[name](root / name), root / "out")
      there[name] = {"data_dir": str(root / "out")}
    return there[name]

  return make


def rows(source, draws=None):
  draws = np.arange(len(source)) if draws is None else np.full(len(source), draws)
  return source.fetch(np.arange(len(source)), draws.astype(np.uint64))


def grey(number):
  return 10 * number % 256


def test_coco(prepared):
  options = prepared("coco")
  train, val = (open_source("coco", split, 8, 0, options) for split in ("train", "val"))
  assert (len(train), len(val)) == (5, 3) and splits("coco") == ("train", "val")
  found = rows(train)
  assert found.image.shape == (5, 8, 8, 3) and found.captions[1] == "Picture 101, caption 3."
  numbers = [int(text.split()[1].rstrip(",")) for text in found.captions]
  assert np.abs(found.image[:, 4, 4, 0].astype(int) - [grey(n) for n in numbers]).max() <= 2
  assert "A caption of two lines." in train.captions_of(0)
  assert sum(map(len, (train.captions_of(n) for n in range(5)))) == 25 == len([*train.captions()])


def test_karpathy_s_rest_is_trained_on(prepared):
  options = prepared("coco_karpathy")
  names = {split: [open_source("coco_karpathy", split, 8, 0, options).table.name(n)
                   for n in range(count)]
           for split, count in (("train", 3), ("val", 1), ("test", 1))}
  assert names["train"][2] == "val2014/COCO_val2014_000000000202.jpg"
  assert names["test"] == ["val2014/COCO_val2014_000000000201.jpg"]


def test_cub(prepared, tmp_path):
  options = prepared("cub")
  train, test = (open_source("cub", split, 8, 0, options | {"labels": True, "sizes": True})
                 for split in ("train", "test"))
  assert (len(train), len(test)) == (4, 2)
  found = rows(train)
  np.testing.assert_array_equal(found.extra["label"], [[0], [0], [1], [1]])
  np.testing.assert_array_equal(rows(test).extra["label"], [[199], [199]])
  # The square around the box, 24 pixels of width about its middle (18, 9), cut off above.
  np.testing.assert_array_equal(found.extra["size"], [[21, 24]] * 4)
  assert train.captions_of(0)[3] == "bird 1 is light brown"
  folder = os.path.join(options["data_dir"], "cub", "1.0.0")
  with open(os.path.join(folder, "skipped.txt")) as file:
    assert file.read() == ("001.Black_footed_Albatross/Black_footed_Albatross_0001_796111_rgb.jpg\t"
                           "images.txt does not name it\n")


def test_classes_as_captions_are_read_as_labels(prepared):
  source = open_source("cub", "test", 8, 0, prepared("cub") | {"labels": True, "captions": "class"})
  found = rows(source)
  assert found.captions == ["class 200"] * 2
  np.testing.assert_array_equal(read_labels("cub", found.captions), found.extra["label"])
  np.testing.assert_array_equal(read_labels("cub", ["017.Cardinal", "17"]), [[16], [16]])
  for text in ("class 0", "class 201", "a bird"):
    with pytest.raises(UserError, match="names no class"):
      read_labels("cub", [text])
  with pytest.raises(UserError, match="has no classes"):
    open_source("coco", "train", 8, 0, prepared("coco") | {"captions": "class"})


def test_a_prepared_set_is_one_of_tfds(prepared):
  import tensorflow_datasets as tfds

  builder = tfds.builder_from_directory(os.path.join(prepared("cub")["data_dir"], "cub", "1.0.0"))
  row = builder.as_data_source(split="test")[0]
  assert builder.info.full_name == "cub/1.0.0" and row["image"].shape == (30, 40, 3)
  assert row["label"] == 199 and len(row["captions"]) == 10 == len(row["boxes"])


def test_nothing_of_tensorflow_or_jax_is_imported(tmp_path):
  miniatures.coco(tmp_path / "coco")
  code = """
import sys
from t2i_jax.data import open_source, prepare
if __name__ == "__main__":
  root = sys.argv[1]
  prepare.main(["coco", f"--source={root}/coco", f"--output={root}/out", "--workers=2"])
  open_source("coco", "val", 8, 0, {"data_dir": f"{root}/out"}).image(0)
  assert not {"tensorflow", "jax", "torch"} & set(sys.modules)
"""
  (tmp_path / "main.py").write_text(code)
  result = subprocess.run([sys.executable, tmp_path / "main.py", tmp_path], capture_output=True,
                          text=True)
  assert result.returncode == 0, result.stderr
  assert "train 5, val 3 pictures" in result.stdout


def test_broken_pictures_are_left_out_and_named(tmp_path, capsys):
  folder = miniatures.coco(tmp_path / "coco")
  names = [folder / "train2014" / f"COCO_train2014_{n:012d}.jpg" for n in range(100, 104)]
  names[0].unlink()
  names[1].write_bytes(names[1].read_bytes()[:-100])  # its header is whole
  names[2].write_bytes(b"<html>gone</html>")
  run("coco", folder, tmp_path / "out")
  assert "3 left out, named in" in capsys.readouterr().out
  lines = (tmp_path / "out/coco/1.0.0/skipped.txt").read_text().splitlines()
  reasons = [line.split("\t")[1] for line in lines]
  assert reasons[::2] == ["no such file", "not a picture in a known format"]
  assert "truncated" in reasons[1].lower()
  source = open_source("coco", "train", 8, 0, {"data_dir": str(tmp_path / "out")})
  assert {text.split(",")[0] for text in source.captions()} == {"Picture 103", "Picture 104"}


def test_pictures_are_shrunk_and_their_own_sizes_kept(tmp_path):
  folder = miniatures.coco(tmp_path / "coco", train=1, val=1)
  miniatures.picture(folder / "train2014" / f"COCO_train2014_{100:012d}.jpg", 100, (400, 300))
  run("coco", folder, tmp_path / "out", "--size=64")
  source = open_source("coco", "train", 32, 0, {"data_dir": str(tmp_path / "out"), "sizes": True})
  assert size_of(source.content(0)) == (64, 85)
  assert source.extra_of(0)["size"].tolist() == [300, 400]
  assert source.extra_of(0)["crop"].tolist() == [0, 5]


def test_a_picture_that_is_too_long_for_jpeg_is_left_out(tmp_path):
  from PIL import Image

  Image.new("L", (80_000, 300)).save(tmp_path / "long.png")
  with pytest.raises(BadImage, match="80000x300, which at a shorter side of 299 is longer than"):
    shard.load(str(tmp_path / "long.png"), 299)


def test_texts_and_numbers_that_json_can_spell(tmp_path, capsys):
  folder = miniatures.coco(tmp_path / "coco", train=2, val=1)
  path = folder / "annotations/captions_train2014.json"
  content = json.loads(path.read_text())
  content["annotations"][0]["caption"] = "Half \ud83d of a pair."
  path.write_text("\ufeff" + json.dumps(content), "utf-8")
  run("coco", folder, tmp_path / "out")
  source = open_source("coco", "train", 8, 0, {"data_dir": str(tmp_path / "out")})
  assert "Half of a pair." in [*source.captions()]
  for image in content["images"]:
    image["id"] = str(image["id"])
  path.write_text(json.dumps(content))
  fails(capsys, "is not a captions file of MS COCO (Unknown format code", "coco", folder)
  path.write_text("[" * 100_000)
  fails(capsys, "is no whole JSON file (maximum recursion depth", "coco", folder)


def test_a_stopped_run_goes_on(tmp_path, monkeypatch, capsys):
  folder, made = miniatures.coco(tmp_path / "coco"), []
  make = shard.make
  monkeypatch.setattr("t2i_jax.data.sets.builder._SMALLEST_SHARD", 2)

  def stops(path, *given):
    if len(made) == 2:
      raise KeyboardInterrupt
    made.append(path.name)
    make(path, *given)

  monkeypatch.setattr(shard, "make", stops)
  with pytest.raises(SystemExit) as raised:
    run("coco", folder, tmp_path / "out")
  assert raised.value.code == 130 and not (tmp_path / "out/coco/1.0.0").exists()
  monkeypatch.setattr(shard, "make", lambda path, *given: (made.append(path.name),
                                                           make(path, *given)))
  run("coco", folder, tmp_path / "out")
  assert made == ["train-00000", "train-00001", "train-00002", "val-00000", "val-00001"]
  assert [p.name for p in (tmp_path / "out/coco").iterdir()] == ["1.0.0"]
  source = open_source("coco", "train", 8, 0, {"data_dir": str(tmp_path / "out")})
  assert [source.captions_of(n)[-1].split(",")[0] for n in range(1, 5)] == [
    f"Picture {n}" for n in range(101, 105)]
  run("coco", folder, tmp_path / "out")  # says that it is there
  assert len(made) == 5
  fails(capsys, "with --size=0, not 64; delete that folder, or name another", "coco", folder,
        tmp_path / "out", "--size=64")


def test_a_run_that_is_killed_at_its_end_loses_no_shard(tmp_path, monkeypatch):
  folder, out = miniatures.coco(tmp_path / "coco"), tmp_path / "out/coco"
  script = f"""
import os, signal
import tensorflow_datasets as tfds
from t2i_jax.data import prepare

tfds.core.DatasetInfo.write_to_directory = lambda *given: os.kill(os.getpid(), signal.SIGKILL)
prepare.main(["coco", "--source={folder}", "--output={tmp_path / "out"}", "--workers=0"])
"""
  assert subprocess.run([sys.executable, "-c", script]).returncode == -signal.SIGKILL
  (beside,), (incomplete,) = out.glob("unfinished-*"), out.glob("incomplete.*")
  assert len([*beside.glob("*.array_record")]) == 2 and any(incomplete.iterdir())
  (beside / "train-00000.12345678.writing").write_bytes(b"half a shard")
  monkeypatch.setattr(shard, "make", lambda *given: 1 / 0)
  run("coco", folder, tmp_path / "out")
  assert [p.name for p in out.iterdir()] == ["1.0.0"]
  assert len(open_source("coco", "train", 8, 0, {"data_dir": str(tmp_path / "out")})) == 5


def test_another_folder_begins_afresh(tmp_path, monkeypatch):
  folder = miniatures.coco(tmp_path / "coco")
  monkeypatch.setattr("t2i_jax.data.sets.builder.PicturesBuilder._collect", lambda *given: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    run("coco", folder, tmp_path / "out")
  monkeypatch.undo()
  run("coco", miniatures.coco(tmp_path / "other", train=2, val=1), tmp_path / "out")
  assert len(open_source("coco", "train", 8, 0, {"data_dir": str(tmp_path / "out")})) == 2


def test_what_a_user_may_have_wrong(tmp_path, capsys):
  out = tmp_path / "out"
  fails(capsys, "unknown data set to prepare 'coca'; did you mean 'coco'?", "coca", tmp_path, out)
  fails(capsys, "data set 'folder' is not prepared; train on it as it is", "folder", tmp_path, out)
  fails(capsys, "no directory --source=", "coco", tmp_path / "nowhere", out)
  fails(capsys, "has no annotations/captions_train2014.json (or captions_train2014.json), the "
        "captions of MS COCO", "coco", tmp_path, out)
  folder = miniatures.coco(tmp_path / "coco")
  fails(capsys, "has no dataset_coco.json", "coco_karpathy", folder, out)
  file = folder / "annotations/captions_train2014.json"
  text = file.read_text()
  file.write_text(text[:-50])
  fails(capsys, "is no whole JSON file", "coco", folder, out)
  file.write_text(json.dumps({"questions": []}))
  fails(capsys, "is not a captions file of MS COCO (key 'images')", "coco", folder, out)
  instances = json.loads(text)
  for annotation in instances["annotations"]:
    del annotation["caption"]
  file.write_text(json.dumps(instances))
  fails(capsys, "not instances_*.json", "coco", folder, out)
  file.write_text((folder / "annotations/captions_val2014.json").read_text())
  fails(capsys, "is of another set: its picture 200 is 'COCO_val2014_", "coco", folder, out)
  file.write_text(text)
  (folder / "train2014").rename(folder / "train")
  fails(capsys, "has no train2014 (or images/train2014), its pictures", "coco", folder, out)
  (folder / "train2014").mkdir()
  fails(capsys, "none of 5 pictures that captions_train2014.json names is there", "coco", folder,
        out)
  fails(capsys, "--size and --workers are not negative", "coco", folder, out, "--size=-1")
  assert not out.exists()
  with pytest.raises(UserError, match="'coco' is not prepared in .*: run python -m t2i_jax.data"):
    open_source("coco", "train", 8, 0, {"data_dir": str(out)})


def test_karpathy_of_another_set(tmp_path, capsys):
  folder = miniatures.coco_karpathy(tmp_path / "coco")
  content = json.loads((folder / "dataset_coco.json").read_text())
  (folder / "dataset_coco.json").write_text(json.dumps(content | {"dataset": "flickr30k"}))
  fails(capsys, "has the captions of another set, 'flickr30k'", "coco_karpathy", folder,
        tmp_path / "out")


def test_wrong_birds(tmp_path, capsys):
  folder = miniatures.cub(tmp_path / "cub")
  out = tmp_path / "out"
  test = (folder / "testclasses.txt").read_text()
  (folder / "testclasses.txt").unlink()
  fails(capsys, "has no trainvalclasses.txt and testclasses.txt", "cub", folder, out)
  (folder / "testclasses.txt").write_text("200.Red_Rose\n")
  fails(capsys, "are of another set: neither has the class of '200.Common_Yellowthroat/", "cub",
        folder, out)
  (folder / "testclasses.txt").write_text(test + miniatures.BIRDS[0])
  fails(capsys, "class '001.Black_footed_Albatross' is for training too", "cub", folder, out)
  (folder / "testclasses.txt").write_text(test)
  (folder / "CUB_200_2011/bounding_boxes.txt").write_text("1 10.0 5.0\n")
  fails(capsys, "boxes.txt, line 1: '1 10.0 5.0' is not a number and 4", "cub", folder, out)
  (folder / "CUB_200_2011/bounding_boxes.txt").write_text("1 10.0 nan 9 9\n")
  fails(capsys, "line 1: '1 10.0 nan 9 9' is not a number and 4 fields that are numbers", "cub",
        folder, out)
  (folder / "CUB_200_2011/bounding_boxes.txt").write_text(
    "".join(f"{n} 1 1 9 9\n" for n in range(1, 7)))
  labels = folder / "CUB_200_2011/image_class_labels.txt"
  kept = labels.read_text()
  for text, match in (("0", "picture 1 is of class 0, and there are 1 to 200"),
                      ("201", "picture 1 is of class 201"),
                      ("x", "labels.txt, line 1: '1 x' is not a number and 1 fields that are")):
    labels.write_text(kept.replace("1 1\n", f"1 {text}\n", 1))
    fails(capsys, match, "cub", folder, out)
  labels.write_text(kept)
  (folder / "text_c10").rename(folder / "texts")
  fails(capsys, "has no text_c10 (or text, ", "cub", folder, out)
  (folder / "text_c10").mkdir()
  fails(capsys, "no bird of split 'train' has captions in", "cub", folder, out)


def test_a_damaged_prepared_set(prepared, tmp_path):
  import shutil

  shutil.copytree(prepared("coco")["data_dir"], tmp_path / "out")
  folder = tmp_path / "out/coco/1.0.0"
  column = folder / "train.captions_at.npy"
  np.save(column, np.load(column)[:-1])
  with pytest.raises(UserError, match="captions_at.npy has 25 rows, not 26; delete"):
    open_source("coco", "train", 8, 0, {"data_dir": str(tmp_path / "out")})
  (records,) = folder.glob("coco-val.array_record*")
  whole = records.read_bytes()
  records.write_bytes(whole[:-500])
  with pytest.raises(UserError, match="the shards of split 'val' have .* bytes, and had"):
    open_source("coco", "val", 8, 0, {"data_dir": str(tmp_path / "out")})
  records.unlink()
  with pytest.raises(UserError, match="cannot read .*No such file.*delete it and prepare it again"):
    open_source("coco", "val", 8, 0, {"data_dir": str(tmp_path / "out")})
  records.write_bytes(whole)
  assert len(open_source("coco", "val", 8, 0, {"data_dir": str(tmp_path / "out")})) == 3
  (folder / "val.first.npy").write_bytes(b"short")
  with pytest.raises(UserError, match="val.first.npy cannot be read"):
    open_source("coco", "val", 8, 0, {"data_dir": str(tmp_path / "out")})


def read_text(captions):
  return {"text": {"n": {"ids": np.array([[hash(c) % 2**31] for c in captions], np.int32)}}}


@pytest.mark.parametrize("options", [{}, {"crop": "random", "flips": True, "sizes": True}])
def test_order_and_state(prepared, options):
  """A pure function of (seed, position), whoever reads and from wherever it begins."""
  source = open_source("coco", "train", 8, 0, prepared("coco") | options)
  batches = lambda s, **more: Loader(s, read_text, 4, seed=3, **more)  # noqa: E731
  whole = batches(source)
  first = [next(whole) for _ in range(4)]
  kept = in_memory(source)
  assert isinstance(kept, InMemory) == (not options)
  resumed, parts = batches(kept), [batches(source, rows=rows) for rows in ([0, 1], [2, 3])]
  resumed.restore({"position": 8})
  for n in range(4):
    pieces = [next(part) for part in parts]
    for key in first[n].keys() - {"text"}:
      np.testing.assert_array_equal(np.concatenate([p[key] for p in pieces]), first[n][key])
  for n in (2, 3):
    again = next(resumed)
    np.testing.assert_array_equal(again["image"], first[n]["image"])
    np.testing.assert_array_equal(again["text"]["n"]["ids"], first[n]["text"]["n"]["ids"])
  for loader in (whole, resumed, *parts):
    loader.close()


@pytest.mark.parametrize("name", sets.PREPARABLE)
def test_a_set_that_is_prepared_can_be_trained_on(name):
  assert default_options(name)["data_dir"] == "" and sets.preparable(name).load()[1].ABOUT


def test_damaged_lists_of_names(tmp_path):
  whole = pickle.dumps([f"{name}/a" for name in miniatures.BIRDS])
  for damaged in (whole[:-8], whole.replace(b"]", b"a"), b"\x95" + b"\xff" * 8, b"(R."):
    (tmp_path / "filenames.pickle").write_bytes(damaged)
    with pytest.raises(UserError, match="filenames.pickle is no list of names"):
      classes._names(tmp_path / "filenames.pickle")
