"""Data sets by name."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from t2i_jax.data import DATASETS, default_options, open_source, splits
from t2i_jax.errors import UserError


@pytest.mark.parametrize("name", DATASETS)
def test_every_set_has_splits_and_defaults(name):
  assert splits(name)[0] == "train" and len(splits(name)) > 1
  assert not {"split", "resolution", "seed", "log_dir", "self"} & set(default_options(name))


def test_options_reach_the_set(tmp_path):
  Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
  (tmp_path / "captions.jsonl").write_text(
    json.dumps({"file": "a.png", "caption": "a", "split": "train"})
  )
  source = open_source("folder", "train", 8, 0, {"path": str(tmp_path)}, str(tmp_path / "log"))
  assert len(source) == 1 and source.resolution == 8
  assert default_options("folder") == {
    "path": "", "captions_file": "", "captions": "draw", "crop": "centre", "flips": False,
    "sizes": False, "synthetic": "", "synthetic_share": 0.95, "buckets": (),
  }  # fmt: skip
  assert "buckets" in default_options("mixture") and "buckets" not in default_options("emoji")


def test_unknown_names():
  with pytest.raises(UserError, match="unknown data set 'emojis'; did you mean 'emoji'"):
    open_source("emojis", "train", 8, 0)
  with pytest.raises(UserError, match="unknown split of data set 'folder' 'tets'; did.* 'test'"):
    open_source("folder", "tets", 8, 0)
  with pytest.raises(UserError, match="unknown split of data set 'emoji' 'val'"):
    open_source("emoji", "val", 8, 0)
  with pytest.raises(UserError, match="unknown option of data set 'folder' 'pth'; did.* 'path'"):
    open_source("folder", "train", 8, 0, {"pth": "x"})
  with pytest.raises(UserError, match="unknown data set"):
    default_options("mnist")


def test_packages_of_file_formats_are_imported_only_when_used():
  code = """
import sys
from t2i_jax.data import default_options
import t2i_jax.data.loader, t2i_jax.data.memory, t2i_jax.data.prefetch
default_options("folder"), default_options("emoji")
packages = ["grain", "tensorflow_datasets", "emoji", "fontTools", "jax"]
print([package for package in packages if package in sys.modules])
"""
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert out.stdout == "[]\n"
