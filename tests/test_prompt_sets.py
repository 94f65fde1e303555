"""Real pictures that drawn ones are compared with."""

import json

import numpy as np
import pytest
from PIL import Image

from t2i_jax import data, recipe
from t2i_jax.evaluation.prompt_sets import (
  Sources,
  of_split,
  pictures_of,
  real_pictures,
  rows_of,
)


@pytest.mark.parametrize("options", [{}, {"crop": "random"}], ids=["in memory", "from files"])
def test_real_pictures_of_a_bucketed_set_are_squares_in_the_captions_order(tmp_path, options):
  lines = []
  for number in range(8):
    size = (40, 20) if number % 2 else (20, 40)
    Image.new("RGB", size, (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines.append({"file": f"{number}.png", "caption": f"number {number}", "split": "test"})
  (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
  config = recipe.base("ddpm", "folder")
  with config.unlocked():
    config.data.options.update(path=str(tmp_path), buckets=("16x8", "8x16"), **options)
  sources = Sources(config)
  source = sources.of("test", 16)
  (pictures,) = real_pictures(source, 8, 8)
  captions = of_split(source, "test", 8, 1).captions
  assert pictures.shape == (8, 16, 16, 3)
  shades = [30 * int(caption.split()[1]) for caption in captions]
  np.testing.assert_array_equal(pictures[:, 0, 0, 0], shades)

  bucketed = sources.of("test", 16, bucketed=True)
  assert bucketed.buckets is not None and source.buckets is None
  assert config.data.options[data.BUCKETS] == ("16x8", "8x16")


def test_fewer_pictures_than_a_split_has_are_of_all_of_it(tmp_path):
  """A mixture lies part behind part, and its first rows are of the first part alone."""
  for part, shade in (("dark", 0), ("light", 200)):
    lines = []
    (tmp_path / part).mkdir()
    for number in range(6):
      colour = (shade + number,) * 3
      Image.new("RGB", (8, 8), colour).save(tmp_path / part / f"{number}.png")
      lines.append({"file": f"{number}.png", "caption": f"{shade + number}", "split": "test"})
    (tmp_path / part / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
  parts = tuple(f"folder 1 path={tmp_path / part}" for part in ("dark", "light"))
  source = data.open_source("mixture", "held_out", 8, 0, {"parts": parts})
  shades = lambda pictures: pictures[:, 0, 0, 0].tolist()  # noqa: E731
  for count, wanted in ((4, [0, 3, 200, 203]), (12, [*range(6), *range(200, 206)]),
                        (13, [*range(6), *range(200, 206), 0])):
    captions = of_split(source, "held_out", count, 1).captions
    (pictures,) = real_pictures(source, count, 16)
    assert shades(pictures) == [int(caption) for caption in captions] == wanted
    assert shades(pictures_of(source, np.array([count - 1, 1]), count)) == [wanted[-1], wanted[1]]


def test_scenes_lie_in_no_order_and_their_first_rows_are_taken():
  source = data.open_source("scenes", "held_out_combinations", 32, 0, {})
  assert rows_of(source, 5).tolist() == [0, 1, 2, 3, 4]
