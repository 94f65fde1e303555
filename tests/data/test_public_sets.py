"""Flowers, Flickr30k, Visual Genome and Conceptual Captions, from miniatures of their downloads."""

import miniatures
import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")

from t2i_jax.data import open_source, prepare, read_labels
from t2i_jax.data.sets import conceptual, flickr30k, flowers, preparable, visual_genome
from t2i_jax.errors import UserError


def prepared(name, source, root):
  """Prepares a set; returns the options that open it."""
  read, module = preparable(name).load()
  prepare.write(name, read(source), module, root, bar=False)
  return {"data_dir": str(root)}


def rows(source):
  return source.fetch(np.arange(len(source)), np.arange(len(source)).astype(np.uint64))


def fails(match, read, *given):
  with pytest.raises(UserError, match=match) as raised:
    read(*given)
  assert "\n" not in str(raised.value)


def test_flowers(tmp_path):
  folder = miniatures.flowers(tmp_path / "flowers")
  options = prepared("flowers", folder, tmp_path / "out") | {"labels": True}
  train, test = (open_source("flowers", split, 8, 0, options) for split in ("train", "test"))
  np.testing.assert_array_equal(rows(train).extra["label"], [[76], [0], [0]])
  assert [test.captions_of(n)[0] for n in range(2)] == ["flower 3 has petals 0",
                                                        "flower 5 has petals 0"]
  classes = open_source("flowers", "test", 8, 0, options | {"captions": "class"})
  np.testing.assert_array_equal(read_labels("flowers", rows(classes).captions), [[101], [101]])


def test_wrong_flowers(tmp_path):
  folder = miniatures.flowers(tmp_path / "flowers")
  labels = (folder / "imagelabels.mat").read_bytes()
  (folder / "imagelabels.mat").write_bytes((folder / "setid.mat").read_bytes())
  fails("imagelabels.mat has no 'labels'; it is another file, such as setid.mat", flowers.read,
        folder)
  (folder / "imagelabels.mat").write_bytes(labels[:100])
  fails("is no whole .mat file", flowers.read, folder)
  (folder / "imagelabels.mat").write_bytes(labels)
  (folder / "text_c10/class_00001/image_00002.txt").unlink()
  (folder / "text_c10/class_00001/image_00004.txt").write_text("\n")
  miniatures.picture(folder / "jpg/image_00006.jpg")
  assert flowers.read(folder).skipped == [
    ("image_00002.jpg", "has no file in text_c10"), ("image_00004.jpg", "its file in text_c10 is "
     "empty"), ("image_00006.jpg", "imagelabels.mat has no label for it")]  # fmt: skip


@pytest.mark.parametrize("form", ["token", "csv", "karpathy"])
def test_flickr30k_in_every_form(tmp_path, form):
  listing = flickr30k.read(miniatures.flickr30k(tmp_path / form, form))
  pictures = [p for split in listing.splits.values() for p in split]
  assert len({p.name for p in pictures}) == 70 == len(pictures) and not listing.skipped
  broken = next(p for p in pictures if p.name == miniatures.BROKEN_ROW)
  text = "Picture 0, caption 4." if form == "karpathy" else "Picture 0 , caption 4 ."
  assert len(broken.captions) == 5 and broken.captions[4] == text
  mended = [note for note in listing.notes if "mended" in note]
  assert mended == (["results.csv, line 6: mended, its second bar is missing"] if form == "csv"
                    else [])
  counts = {split: len(of) for split, of in listing.splits.items()}
  assert counts == {"train": 68, "val": 1, "test": 1} if form == "karpathy" else all(
    counts.values())


def test_flickr30k_is_read(tmp_path):
  folder = miniatures.flickr30k(tmp_path / "flickr", "karpathy", 4)
  options = prepared("flickr30k", folder, tmp_path / "out")
  source = open_source("flickr30k", "val", 8, 0, options)
  assert rows(source).captions == ["Picture 1, caption 0."]


def test_wrong_flickr30k(tmp_path):
  folder = miniatures.flickr30k(tmp_path / "flickr", "token", 3)
  token = folder / "results_20130124.token"
  token.write_text(token.read_text() + "1000092795.jpg Two young guys\n")
  fails("results_20130124.token, line 16: not 'NAME.jpg#NUMBER<TAB>CAPTION'", flickr30k.read,
        folder)
  token.unlink()
  fails("has no dataset_flickr30k.json .or results_20130124.token", flickr30k.read, folder)
  miniatures.write(folder / "results.csv", "file,caption\n1.jpg,a\n")
  fails("the first line is no 'image_name. comment_number", flickr30k.read, folder)
  miniatures.write(folder / "results.csv", "image_name| comment_number| comment\n1.jpg| what\n")
  fails("results.csv, line 2: not 'NAME.jpg. NUMBER. CAPTION'", flickr30k.read, folder)
  (folder / "flickr30k-images").rename(folder / "pictures")
  fails("has no pictures in flickr30k-images or", flickr30k.read, folder)


def test_regions_of_visual_genome(tmp_path):
  folder = miniatures.visual_genome(tmp_path / "genome")
  options = prepared("visual_genome", folder, tmp_path / "out")
  regions = open_source("visual_genome", "train", 8, 0, options)
  pictures = open_source("visual_genome", "train", 8, 0, options | {"captions": "joined"})
  drawn = open_source("visual_genome", "train", 8, 0, options | {"captions": "draw"})
  # The region of no width is left out; the largest region comes first.
  assert len(regions) == 2 * len(pictures) == 2 * len(drawn) and len(pictures) < 24
  found = rows(regions)
  assert found.captions[:2] == ["the white half", "a black half"]
  for image, caption in zip(found.image, found.captions, strict=True):
    assert (image > 200).all() if caption == "the white half" else (image < 50).all()
  assert pictures.captions_of(0) == ("the white half. a black half.",)
  assert rows(pictures).image[0, 4, [0, 7], 0].tolist() == [0, 250]
  assert drawn.varies and not regions.varies
  several = drawn.fetch(np.zeros(9, np.int64), np.arange(9).astype(np.uint64))
  white = np.array([text == "the white half" for text in several.captions])
  assert 0 < white.sum() < 9
  np.testing.assert_array_equal(several.image[:, 4, 4, 0] > 200, white)


def test_wrong_visual_genome(tmp_path):
  folder = miniatures.visual_genome(tmp_path / "genome")
  (folder / "VG_100K_2/4.jpg").unlink()
  assert visual_genome.read(folder).skipped == [("4.jpg", "is in none of the folders of pictures")]
  miniatures.write(folder / "region_descriptions.json", [{"id": 1, "objects": []}])
  fails("is not a file of region descriptions .key 'regions'", visual_genome.read, folder)
  region = {"phrase": "a", "x": "1", "y": 0, "width": 9, "height": 9}
  miniatures.write(folder / "region_descriptions.json", [{"id": 1, "regions": [region]}])
  fails("is not a file of region descriptions .can only concat", visual_genome.read, folder)
  (folder / "region_descriptions.json").unlink()
  fails("has no region_descriptions.json", visual_genome.read, folder)


@pytest.mark.parametrize("form", ["row_crc", "crc", "files"])
def test_conceptual_captions_in_every_form(tmp_path, form):
  listing = conceptual.read_3m(miniatures.conceptual(tmp_path / form, form))
  assert [p.captions[0] for p in listing.splits["train"]] == [
    'a "picture 1', 'a "picture 2', 'a "picture 3']
  assert [p.captions[0] for p in listing.splits["val"]][0] == 'a "picture 101'
  assert "3 pictures in" in listing.notes[0] and "1 were not downloaded" in listing.notes[0]


def test_conceptual_captions_are_read(tmp_path):
  options = prepared("cc3m", miniatures.conceptual(tmp_path / "cc"), tmp_path / "out")
  found = rows(open_source("cc3m", "train", 8, 0, options))
  assert found.captions[1] == 'a "picture 2' and abs(int(found.image[1, 4, 4, 0]) - 20) <= 2


def test_the_columns_of_cc12m_are_reversed(tmp_path):
  listing = conceptual.read_12m(miniatures.conceptual_12m(tmp_path / "cc"))
  pictures = [p for split in listing.splits.values() for p in split]
  assert len(pictures) == 150 and listing.splits["test"]
  assert {p.captions[0] for p in pictures} == {f"a picture {n}" for n in range(150)}


def test_wrong_conceptual_captions(tmp_path):
  folder = miniatures.conceptual(tmp_path / "cc")
  table = folder / "Train_GCC-training.tsv"
  text = table.read_text()
  table.write_text("caption\turl\n" + text + "no address\there\n\thttps://a.example\n" +
                   text.splitlines()[1] + "\n")
  listing = conceptual.read_3m(folder)
  assert [why for _, why in listing.skipped] == [
    "not a caption and an address", "empty caption", "names a picture for the second time"]
  assert len(listing.splits["train"]) == 3
  table.write_text("a\tb\n")
  fails("no line has an address beside a caption", conceptual.read_3m, folder)
  table.write_text("a\thttps://elsewhere.example\n")
  fails("none of the pictures in .*training is of an address", conceptual.read_3m, folder)
  table.unlink()
  fails("has no Train_GCC-training.tsv", conceptual.read_3m, folder)
