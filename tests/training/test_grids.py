import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from t2i_jax.errors import UserError
from t2i_jax.training import grids


def pictures(n, height=32, width=32):
  """Distinct colours, uint8 [n,height,width,3], never white or black."""
  colours = np.stack([np.arange(n) * 20 + 30, np.full(n, 60), np.full(n, 90)], axis=-1)
  return np.broadcast_to(colours[:, None, None], (n, height, width, 3)).astype(np.uint8)


def find(sheet, colour):
  """Top, left, height and width of the box of one colour."""
  rows, columns = np.nonzero((np.asarray(sheet) == colour).all(axis=-1))
  assert len(rows) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
  return rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1


def ink(sheet, top, left, width):
  """How many pixels are not white in the 16 rows below a picture."""
  strip = np.asarray(sheet)[top:top + 16, left:left + width]
  return (strip != 255).any(axis=-1).sum()


def test_pictures_are_enlarged_and_in_reading_order():
  images = pictures(5)
  sheet = grids.prompt_grid(images, ["a red square", "two", "three", "four", ""], columns=3)
  boxes = [find(sheet, image[0, 0]) for image in images]
  assert all(box[2:] == (128, 128) for box in boxes)
  assert [b[0] for b in boxes[:3]] == [boxes[0][0]] * 3 and boxes[3][0] > boxes[0][0] + 128
  assert [b[1] for b in boxes[3:]] == [b[1] for b in boxes[:2]]
  below = [ink(sheet, top + height, left, width) for top, left, height, width in boxes]
  assert all(amount > 20 for amount in below[:4]) and below[4] == 0


@pytest.mark.parametrize("shape, scale, expected", [
  ((64, 64), None, (128, 128)), ((48, 96), None, (144, 288)), ((256, 256), None, (256, 256)),
  ((32, 32), 1, (32, 32)),
])
def test_integer_enlargement(shape, scale, expected):
  images = pictures(1, *shape)
  assert find(grids.prompt_grid(images, ["x"], scale=scale), images[0, 0, 0])[2:] == expected


def test_floats_are_mapped_to_the_same_bytes():
  images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
  floats = images.astype(np.float32) / 127.5 - 1
  prompts = ["one", "two"]
  assert np.array_equal(grids.prompt_grid(images, prompts), grids.prompt_grid(floats, prompts))
  outside = np.array([-9, 9, np.nan], np.float32).reshape(1, 1, 1, 3).repeat(64, 1).repeat(64, 2)
  assert find(grids.prompt_grid(outside, ["x"]), (0, 255, 0))[2:] == (128, 128)


def test_wrapping_fits_the_cell():
  font = grids._default_font(12)
  text = "a small blue circle to the left of a very large green triangle below three stars"
  lines = grids._wrap(text, font, 128)
  assert len(lines) == 3 and all(font.getlength(line) <= 128 for line in lines)
  assert lines[-1].endswith(("…", "..."))
  kept = " ".join(lines).rstrip(".…")
  assert text.startswith(kept) and len(kept) > 40
  assert grids._wrap("a red square", font, 128) == ["a red square"]
  assert grids._wrap("", font, 128) == []
  cut = grids._wrap("x" * 40, font, 128)
  assert "".join(cut) == "x" * 40 and all(font.getlength(line) <= 128 for line in cut)
  assert grids._wrap("xx", font, 1) == ["x", "x"]


@pytest.mark.parametrize("prompt", [
  "红色的方块在蓝色圆圈的左边", "красный круг", "مرحبا", "🎈 party 🎉", "\ud800 \0 \x07",
  "tab\tand\nline", "é" * 500, " ",
])
def test_no_prompt_breaks_it(prompt):
  assert grids.prompt_grid(pictures(1), [prompt]).size[0] == 136


def test_other_scripts_are_drawn_with_a_system_font():
  text = "красный круг"
  if shutil.which("fc-list") is None or not subprocess.run(
      ["fc-list", ":charset=43a"], capture_output=True, text=True).stdout.strip():
    pytest.skip("no system font with Cyrillic letters")
  assert set(grids._missing(grids._default_font(12), text)) == set(text) - {" "}
  assert grids._missing(grids._font_for(text, 12), text) == ""


def test_without_fontconfig_boxes_are_drawn(monkeypatch):
  monkeypatch.setenv("PATH", "")
  grids._system_font.cache_clear()
  assert grids._font_for("красный", 12) is grids._default_font(12)
  grids._system_font.cache_clear()


def test_saved_picture(tmp_path):
  sheet = grids.prompt_grid(pictures(2), ["a", "b"])
  grids.save_picture(tmp_path / "new" / "step_10.png", sheet)
  grids.save_picture(tmp_path / "new" / "array.png", np.asarray(sheet))
  for name in ("step_10.png", "array.png"):
    assert np.array_equal(Image.open(tmp_path / "new" / name), sheet)
  assert len(list((tmp_path / "new").iterdir())) == 2
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot write .*file/x.png"):
    grids.save_picture(tmp_path / "file" / "x.png", sheet)
