"""Work directories and exports on a store where nothing can be appended to or renamed in one move.

The store is in memory and stands in for Google Cloud Storage, under its own scheme; checkpoints,
which orbax writes there by other means, are not tried.
"""

import json
import os

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, register_implementation
from runs import TOY, config_of, train_on

import t2i_jax
from t2i_jax import export, run_data, tokenizing, workdirs
from t2i_jax.errors import UserError
from t2i_jax.training import marker
from t2i_jax.training.grids import save_picture
from t2i_jax.training.writers import JsonLines, Writers

pytestmark = pytest.mark.usefixtures("compiled_programs")


class Store(MemoryFileSystem):
  """Objects by name, written whole."""

  protocol = ("gcs", "gs")
  store: dict = {}
  pseudo_dirs: list = [""]
  cachable = False

  @classmethod
  def _strip_protocol(cls, path):
    return "/" + os.fspath(path).removeprefix("gs://").removeprefix("gcs://").strip("/")

  def _open(self, path, mode="rb", **options):
    if "a" in mode:
      raise NotImplementedError("objects cannot be appended to")
    return super()._open(path, mode, **options)


@pytest.fixture
def bucket():
  """The path of an empty store."""
  Store.store, Store.pseudo_dirs = {}, [""]
  register_implementation("gcs", Store, clobber=True)
  backend.fsspec_backend._get_filesystem.cache_clear()
  yield epath.Path("gs://bucket")
  _registry.pop("gcs")
  backend.fsspec_backend._get_filesystem.cache_clear()


def test_metrics_are_written_whole_now_and_then(bucket):
  def there():
    return [json.loads(line)["step"] for line in (bucket / "m.jsonl").read_text().splitlines()]

  lines = JsonLines(bucket / "m.jsonl")
  for step in range(1, 5):
    lines.scalars(step, {"loss": 0.5})
  assert there() == [1]  # the others wait, but for a minute at most
  lines.flush()
  assert there() == [1, 2, 3, 4]
  (bucket / "m.jsonl").unlink()
  lines.flush()  # nothing is new: it is not sent again
  assert not (bucket / "m.jsonl").exists()
  lines.scalars(5, {"loss": 0.5})
  lines.close()
  assert there() == [1, 2, 3, 4, 5]

  again = JsonLines(bucket / "m.jsonl")
  again.truncate_after(3)
  again.SECONDS = 0.0
  again.scalars(4, {"loss": 0.25})
  assert there() == [1, 2, 3, 4]


def test_which_hooks_are_done(bucket):
  assert marker.read(bucket / "run") is None
  for done in ((), ("samples",)):
    marker.Marker(2, done, 3).write(bucket / "run")
  found = marker.read(bucket / "run")
  assert found == marker.Marker(2, ("samples",), 3)
  assert [path.name for path in (bucket / "run").iterdir()] == ["hooks.json"]
  assert marker.done_at(found, 2) == ("samples",)
  assert marker.done_at(found, 1) is None  # all, as that run went on to step 2
  assert marker.done_at(found, 3) == marker.done_at(None, 2) == ()


def test_exports_are_there_when_their_config_is(bucket, tmp_path):
  train_on(config_of(TOY, train__duration=1, sample__every=0, evaluate__every=0), tmp_path / "run")
  local = export.read(tmp_path / "run" / "export")
  for _ in range(2):  # the second replaces the first
    path = export.write(bucket / "a" / "export", local.config, 1, local.variables, local.tokenizers)
  assert os.fspath(path) == "gs://bucket/a/export" and not os.path.exists("gs:")
  export.add_to_card(path, "Judged")
  assert (path / "README.md").read_text().endswith("Judged\n")
  prompts = ["a red ring"]
  expected = t2i_jax.load(tmp_path / "run" / "export")(prompts)
  np.testing.assert_array_equal(t2i_jax.load("gs://bucket/a/export")(prompts), expected)
  # Cut off in the middle, it is none.
  (path / "config.json").unlink()
  with pytest.raises(UserError, match="no export at 'gs://bucket/a/export'"):
    export.read(path)
  with pytest.raises(UserError, match="is there and is no export"):
    export.check_replaceable(path)


def test_a_work_directory(bucket, tmp_path):
  config = config_of(TOY)
  workdir = bucket / "run"
  workdirs.check_workdir(workdir, config)
  with workdirs.locked(workdir), Writers(workdir, True) as writers:
    writers.scalars(1, {"loss": 1.0})
    source = run_data.open_data(config, "train", 16)
    workdirs.claim_workdir(workdir, config, tokenizing.make_tokenizer(config, source))
    workdirs.claim_workdir(workdir, config, tokenizing.run_tokenizers(config, workdir, source, {}))
    save_picture(workdir / "samples" / "a.png", np.zeros((4, 4, 3), np.uint8))
    save_picture(workdir / "samples" / "a.png", np.zeros((4, 4, 3), np.uint8))
  assert workdirs.read_run_config(workdir).system == "toy"
  names = {p.name for p in workdir.iterdir()}
  assert names == {"config.json", "tokenizer.json", "metrics.jsonl", "samples"}
  with pytest.raises(UserError, match="holds another run"):
    workdirs.check_workdir(workdir, config_of(TOY, seed=7))


def test_a_store_whose_package_is_missing_is_one_line():
  with pytest.raises(UserError, match="gs://bucket/run cannot be reached: .*gcsfs"):
    workdirs.check_workdir(epath.Path("gs://bucket/run"), config_of(TOY))
