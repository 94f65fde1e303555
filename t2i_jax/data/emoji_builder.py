"""The emoji of a font as a TensorFlow Datasets builder that needs no TensorFlow.

Prepare it with `file_format="array_record"`; other formats need TensorFlow.
"""

import io
from collections.abc import Iterator
from typing import Any

import emoji
import tensorflow_datasets as tfds
from PIL import Image

from t2i_jax.data.emoji_font import base_of, drawings
from t2i_jax.data.held_out import held_out
from t2i_jax.data.images import to_rgb

# One base in ten, with all its variants, is for testing.
TEST_SHARE = 10


def names_of(sequence: str) -> dict[str, str]:
  """An emoji's names by language: ":man_astronaut:" is "man astronaut".

  `emoji.config.load_language` decides which languages there are.
  """
  entry = emoji.EMOJI_DATA[sequence]
  names = {language: entry.get(language, "") for language in emoji.LANGUAGES}
  return {k: " ".join(name.strip(":").replace("_", " ").split()) for k, name in names.items()}


def sequences() -> Iterator[str]:
  """All emoji that Unicode recommends (fully qualified) and their components."""
  wanted = (emoji.STATUS["fully_qualified"], emoji.STATUS["component"])
  return (sequence for sequence, entry in emoji.EMOJI_DATA.items() if entry["status"] in wanted)


class EmojiBuilder(tfds.core.GeneratorBasedBuilder):
  """Drawings of emoji with their names in 14 languages.

  A row has `image` (uint8 [128, 136, 3], over white), `emoji` (the characters),
  `base` (its kin, see `emoji_font.base_of`) and `names` (by language, empty
  where one is missing). The splits `train` and `test` share no base and no
  drawing.

  Args:
    font: path of the bitmap (CBDT) build of Noto Color Emoji.
    **kwargs: as of every builder, such as `data_dir`.
  """

  name = "emoji"
  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, font: str, **kwargs: Any):
    self._font = font
    super().__init__(**kwargs)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Drawings of emoji from the font Noto Color Emoji, and their names.",
      license="OFL-1.1 (the font)",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
          "emoji": tfds.features.Text(),
          "base": tfds.features.Text(),
          "names": {language: tfds.features.Text() for language in emoji.LANGUAGES},
        }
      ),
    )

  def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, dict]]]:
    for language in emoji.LANGUAGES:
      emoji.config.load_language(language)
    # Some flags are drawn alike (Norway's is Svalbard's): they stay together.
    owner: dict[bytes, str] = {}
    drawn = drawings(self._font, sequences())
    rows = [(e, png, owner.setdefault(png, base_of(e))) for e, png in drawn]
    test = held_out(set(owner.values()), TEST_SHARE)
    return {
      split: self._generate_examples([row for row in rows if (row[2] in test) == (split == "test")])
      for split in ("train", "test")
    }

  def _generate_examples(self, rows: list[tuple[str, bytes, str]]) -> Iterator[tuple[str, dict]]:
    for sequence, png, base in rows:
      yield (
        sequence,
        {
          "image": to_rgb(Image.open(io.BytesIO(png))),
          "emoji": sequence,
          "base": base,
          "names": names_of(sequence),
        },
      )
