"""Tar shards read in place: the index, what is skipped, padding, damaged archives."""

import io
import os
import pickle
import tarfile

import miniatures
import numpy as np
import pytest

from t2i_jax.data import open_source, prepare
from t2i_jax.data.loader import Loader
from t2i_jax.data.sets import tar_samples, unfinished, webdataset
from t2i_jax.data.sets.tar_index import BadArchive, Member, members, read_at
from t2i_jax.errors import UserError


def run(source, output, *flags):
  prepare.main(["webdataset", f"--source={source}", f"--output={output}", "--workers=0", *flags])


def opened(source, output, split="train", resolution=8, **options):
  options |= {"path": str(source), "data_dir": str(output)}
  return open_source("webdataset", split, resolution, 0, options)


def fails(capsys, match, source, output, *flags):
  capsys.readouterr()
  with pytest.raises(SystemExit) as raised:
    run(source, output, *flags)
  line = capsys.readouterr().err.splitlines()[-1]
  assert raised.value.code == 2 and match in line, line


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, kind):
  names = ["a.txt", "folder/b.jpg", "d" * 90 + "/" + "f" * 60 + ".txt"]
  if kind != tarfile.USTAR_FORMAT:
    names += ["g" * 300 + ".jpg", "ü.txt"]
  with tarfile.open(tmp_path / "a.tar", "w", format=kind) as archive:
    directory = tarfile.TarInfo("folder")
    directory.type = tarfile.DIRTYPE
    archive.addfile(directory)
    for n, name in enumerate(names):
      miniatures.add(archive, name, b"x" * 300 * n)
  with tarfile.open(tmp_path / "a.tar") as archive:
    wanted = [Member(m.name, m.offset_data, m.size) for m in archive if m.isfile()]
  assert list(members(tmp_path / "a.tar")) == wanted
  assert read_at(tmp_path / "a.tar", wanted[1].offset, 300) == b"x" * 300


def test_damaged_archives(tmp_path):
  whole = miniatures.img2dataset(tmp_path / "tars", 1) / "00000.tar"
  content, cut = whole.read_bytes(), tmp_path / "cut.tar"
  for length in (7000, 2500, 600, 0):
    cut.write_bytes(content[:length])
    seen = []
    with pytest.raises(BadArchive, match="ends early"):
      for member in members(cut):
        seen.append(member)
    assert seen == [m for m in members(whole) if m.offset + m.length <= length]
  cut.write_bytes(b"<html>" * 200)
  with pytest.raises(BadArchive, match="no tar archive at byte 0"):
    list(members(cut))
  cut.write_bytes(b"\x1f\x8b" + content)
  with pytest.raises(BadArchive, match="compressed"):
    list(members(cut))
  header = bytearray(content[:512])
  header[124:136] = b"-0000001000\0"  # would lead back to this header
  header[148:156] = b" " * 8
  header[148:156] = b"%06o\0 " % sum(header)
  cut.write_bytes(bytes(header) + content[512:])
  with pytest.raises(BadArchive, match="length is below zero, at byte 0"):
    list(members(cut))


def test_shards_are_read_in_place(tmp_path, capsys):
  shards = miniatures.img2dataset(tmp_path / "shards")
  before = sorted(path.name for path in shards.iterdir())
  run(shards, tmp_path / "out")
  out = capsys.readouterr().out
  assert "train 7, test 1 pictures" in out and "2 left out" in out
  assert "has no picture (failed_to_download)" in out
  assert sorted(path.name for path in shards.iterdir()) == before
  train, test = (opened(shards, tmp_path / "out", split) for split in ("train", "test"))
  assert sorted([*train.captions(), *test.captions()]) == [
    f"a picture {n}" for n in (0, 1, 2, 3, 5, 6, 7, 8)]
  found = train.fetch(np.arange(7), np.zeros(7, np.uint64))
  numbers = [int(text.split()[-1]) for text in found.captions]
  assert np.abs(found.image[:, 4, 4, 0].astype(int) - 10 * np.array(numbers)).max() <= 2
  again = pickle.loads(pickle.dumps(train))  # as a worker process gets it
  np.testing.assert_array_equal(again.image(3), train.image(3))


def test_order_and_state(tmp_path):
  shards = miniatures.img2dataset(tmp_path / "shards")
  run(shards, tmp_path / "out")
  source = opened(shards, tmp_path / "out", crop="random")
  tokens = lambda texts: {"text": {"n": {"ids": np.array([[len(t)] for t in texts])}}}  # noqa: E731
  whole, resumed = Loader(source, tokens, 4, 1), Loader(source, tokens, 4, 1)
  first = [next(whole) for _ in range(4)]
  resumed.restore({"position": 12})
  np.testing.assert_array_equal(next(resumed)["image"], first[3]["image"])
  for loader in (whole, resumed):
    loader.close()


@pytest.mark.parametrize("border", [True, False])
def test_padding_is_not_looked_at(tmp_path, border):
  shards = miniatures.img2dataset(tmp_path / "shards", 1, border=border)
  run(shards, tmp_path / "out")
  source = opened(shards, tmp_path / "out", resolution=16, sizes=True)
  for n in range(len(source)):
    number = int(source.captions_of(n)[0].split()[-1])
    assert np.abs(source.image(n).astype(int) - 10 * number).max() <= 12
  extra = source.extra_of(0)
  assert extra["size"].tolist() == [32, 64]
  assert extra["crop"].tolist() == ([0, 9] if border else [0, 0])


def test_a_broken_shard_is_named_and_the_others_are_read(tmp_path, capsys):
  shards = miniatures.img2dataset(tmp_path / "shards", 3)
  last = shards / "00002.tar"
  last.write_bytes(last.read_bytes()[:6000])
  (shards / "00001.tar").write_bytes(b"not found")
  run(shards, tmp_path / "out")
  skipped = (webdataset.index_of(shards, tmp_path / "out") / "skipped.txt").read_text()
  assert "00001.tar\tit ends early, at byte 9\n" in skipped
  assert "00002.tar\tit ends early, at byte 6000\n" in skipped
  assert len(opened(shards, tmp_path / "out")) >= 4


def test_other_webdatasets(tmp_path, capsys):
  """Keys in folders, no json, no caption, an ending in capitals, a picture that is none."""
  with tarfile.open(tmp_path / "a.tar", "w") as archive:
    for n in range(3):
      miniatures.add(archive, f"./x/{n}.JPG", miniatures.jpeg(n, (20, 10)))
      miniatures.add(archive, f"./x/{n}.txt", f" picture\n{n} ".encode())
    miniatures.add(archive, "x/3.jpg", miniatures.jpeg(3, (20, 10)))
    miniatures.add(archive, "x/4.jpg", b"nothing")
    miniatures.add(archive, "x/4.txt", b"nothing")
  run(tmp_path, tmp_path / "out")
  source = opened(tmp_path, tmp_path / "out", sizes=True)
  assert len(source) == 2 and source.extra_of(0)["size"].tolist() == [10, 20]
  assert all(text.startswith("picture ") for text in source.captions())
  out = capsys.readouterr().out
  assert "has no caption" in out and "not a picture in a known format" in out


def test_what_a_user_may_have_wrong(tmp_path, capsys):
  shards, out = tmp_path / "shards", tmp_path / "out"
  shards.mkdir()
  fails(capsys, "has no .tar shards", shards, out)
  (shards / "a.tar").write_bytes(b"<html>" * 100)
  fails(capsys, "none of 1 tar shards of", shards, out)
  (shards / "a.tar").unlink()
  miniatures.img2dataset(shards)
  fails(capsys, "tar shards are read where they are", shards, out, "--size=64")
  with pytest.raises(UserError, match="needs --config.data.options.path"):
    open_source("webdataset", "train", 8, 0)
  with pytest.raises(UserError, match="have no index in .*: run python -m t2i_jax.data.prepare"):
    opened(shards, out)
  run(shards, out)
  with open(shards / "00001.tar", "ab") as file:
    file.write(io.BytesIO(b"more").read())
  with pytest.raises(UserError, match="00001.tar has changed since it was indexed; delete"):
    opened(shards, out)
  (shards / "00001.tar").unlink()
  with pytest.raises(UserError, match="00001.tar has changed"):
    opened(shards, out)
  for text in ("{", "[]", '{"format": 2}', '{"format": 2, "shards": 3}'):
    (webdataset.index_of(shards, out) / "index.json").write_text(text)
    with pytest.raises(UserError, match="index.json cannot be read .*; delete .* and run"):
      opened(shards, out)


def test_a_shard_of_the_same_size_but_another_time_has_changed(tmp_path):
  shards = miniatures.img2dataset(tmp_path / "shards")
  (shards / "folder.tar").mkdir()
  run(shards, tmp_path / "out")
  opened(shards, tmp_path / "out")
  state = (shards / "00001.tar").stat()
  os.utime(shards / "00001.tar", (state.st_atime, state.st_mtime + 60))
  with pytest.raises(UserError, match="00001.tar has changed since it was indexed"):
    opened(shards, tmp_path / "out")


def test_two_at_once(tmp_path, capsys, monkeypatch):
  """The second one is told so, and nothing of the first is lost; what was killed is cleared."""
  shards, out = miniatures.img2dataset(tmp_path / "shards"), tmp_path / "out"
  folder, index = webdataset.index_of(shards, out), tar_samples.index
  beside = unfinished.beside(folder)
  beside.mkdir(parents=True)
  (beside / "part.12345678.writing").write_bytes(b"killed")

  def second(*given):
    monkeypatch.setattr(tar_samples, "index", index)
    assert not [*beside.glob("*.writing")]
    fails(capsys, "another process is preparing the index of", shards, out)
    index(*given)

  monkeypatch.setattr(tar_samples, "index", second)
  run(shards, out)
  assert len(opened(shards, out)) == 7
  assert [path.name for path in folder.parent.iterdir()] == [folder.name]
