"""Preparing data sets by Apache Beam's local runner: as by processes here."""

import sys

import miniatures
import numpy as np
import pytest

pytest.importorskip("tensorflow_datasets", reason="needs tensorflow-datasets")

from t2i_jax.data import open_source, prepare
from t2i_jax.data.sets import beam
from t2i_jax.errors import UserError


def run(name, source, output, *flags):
  prepare.main([name, f"--source={source}", f"--output={output}", "--workers=0", *flags])


def contents(folder):
  """Everything that a prepared set holds."""
  texts = {path.name: path.read_text() for path in folder.glob("*.txt")}
  columns = {path.name: np.load(path).tolist() for path in folder.glob("*.npy")}
  return texts, columns


def rows(options):
  source = open_source("cub", "train", 8, 0, options)
  return source.fetch(np.arange(len(source)), np.zeros(len(source), np.uint64))


def test_a_set_is_the_same(tmp_path, monkeypatch):
  pytest.importorskip("apache_beam", reason="needs apache-beam")
  monkeypatch.setattr("t2i_jax.data.sets.builder._SMALLEST_SHARD", 2)
  folder = miniatures.cub(tmp_path / "cub")
  broken = next(iter(sorted((folder / "CUB_200_2011/images").glob("002*/*.jpg"))))
  broken.write_bytes(broken.read_bytes()[:-100])
  run("cub", folder, tmp_path / "here")
  run("cub", folder, tmp_path / "beam", "--runner=DirectRunner",
      "--pipeline=--direct_running_mode=in_memory")
  one, other = (contents(tmp_path / name / "cub" / "1.0.0") for name in ("here", "beam"))
  assert one == other and broken.name in one[0]["skipped.txt"]
  found = [rows({"data_dir": str(tmp_path / name)}) for name in ("here", "beam")]
  np.testing.assert_array_equal(found[0].image, found[1].image)
  assert found[0].captions == found[1].captions
  assert [path.name for path in (tmp_path / "beam" / "cub").iterdir()] == ["1.0.0"]


def test_what_was_done_is_not_done_again(tmp_path, monkeypatch):
  pytest.importorskip("apache_beam", reason="needs apache-beam")
  monkeypatch.setattr("t2i_jax.data.sets.builder._SMALLEST_SHARD", 2)
  folder, given = miniatures.coco(tmp_path / "coco"), []
  work = beam.run

  def stop(function, jobs, *more):
    work(function, jobs[:2], *more)
    raise KeyboardInterrupt

  monkeypatch.setattr(beam, "run", stop)
  with pytest.raises(SystemExit):
    run("coco", folder, tmp_path / "out", "--runner=DirectRunner")
  monkeypatch.setattr(beam, "run", lambda function, jobs, *more: (given.extend(jobs),
                                                                  work(function, jobs, *more)))
  run("coco", folder, tmp_path / "out", "--runner=DirectRunner")
  assert [path.name for (path,) in given] == ["train-00002", "val-00000", "val-00001"]
  assert len(open_source("coco", "train", 8, 0, {"data_dir": str(tmp_path / "out")})) == 5


def fail(number):
  raise UserError(f"no space left for {number}")


def test_a_failing_job_is_one_line():
  pytest.importorskip("apache_beam", reason="needs apache-beam")
  with pytest.raises(UserError, match="did not do all of 1 jobs: .*no space left for 3") as raised:
    beam.run(fail, [(3,)], "DirectRunner", "", print)
  assert "\n" not in str(raised.value)
  with pytest.raises(UserError, match="--runner=NoRunner did not"):
    beam.run(fail, [(3,)], "NoRunner", "", print)


def test_without_beam_it_is_asked_for(tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "apache_beam", None)
  folder = miniatures.coco(tmp_path / "coco")
  for flags, message in (
    (("--runner=DirectRunner",), "--runner=DirectRunner needs Apache Beam"),
    (("--pipeline=--x=1",), "is of a Beam runner; name it with --runner"),
  ):
    with pytest.raises(SystemExit) as raised:
      run("coco", folder, tmp_path / "out", *flags)
    assert raised.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
