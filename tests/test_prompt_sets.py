"""Real pictures that drawn ones are compared with."""

import json

import numpy as np
import pytest
from PIL import Image

from t2i_jax import data, recipe
from t2i_jax.evaluation.prompt_sets import Sources, of_split, real_pictures


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
