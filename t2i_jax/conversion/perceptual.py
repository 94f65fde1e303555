"""Public perceptual networks to exports of ours."""

import os

from etils import epath

from t2i_jax import export, recipe
from t2i_jax.text.tokenizer import Tokenizers
from t2i_jax.weights.perceptual import load_lpips


def from_lpips(source: str | os.PathLike, output: str | os.PathLike) -> epath.Path:
  """Writes the export of LPIPS on VGG16, to be another config's `components.perceptual`.

  Args:
    source: folder with the two public files, `weights.perceptual.FILES`.
    output: folder of the export; replaced if it is one.

  Raises:
    UserError: a file is missing or holds something else, or the export cannot be written.
  """
  export.check_replaceable(output)
  blocks, params = load_lpips(source)
  config = recipe.base("lpips", "scenes")
  config.model.blocks = blocks
  return export.write(output, config, 0, {"params": params}, Tokenizers({}), ema=False)
