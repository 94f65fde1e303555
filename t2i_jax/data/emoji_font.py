"""Drawings of emoji out of the Noto Color Emoji font, each with its base.

The font (its CBDT build) holds one PNG of 136x128 pixels for each drawing.
Which drawing belongs to a sequence of code points is in `cmap`, and for a
sequence of several in the ligatures of `GSUB`.
"""

import glob
import shutil
import subprocess
from collections.abc import Iterator

from t2i_jax.errors import UserError

_FAMILY = "Noto Color Emoji"
_INSTALL = "install the Debian package fonts-noto-color-emoji, or give a path with option 'font'"

_JOINER, _VARIATION = 0x200D, 0xFE0F
_TONES = range(0x1F3FB, 0x1F400)
_SIGNS = {0x2640, 0x2642, 0x27A1}  # female, male, facing right: only after a joiner
_NEUTRAL = {
  **dict.fromkeys((0x1F468, 0x1F469), 0x1F9D1),  # man, woman: person
  **dict.fromkeys((0x1F466, 0x1F467), 0x1F9D2),  # boy, girl: child
  **dict.fromkeys((0x1F474, 0x1F475), 0x1F9D3),  # old man, old woman: older person
  **dict.fromkeys((0x1F934, 0x1F478), 0x1FAC5),  # prince, princess: person with crown
  **dict.fromkeys((0x1F930, 0x1FAC3), 0x1FAC4),  # pregnant woman, man: person
  **dict.fromkeys((0x1F57A,), 0x1F483),  # man dancing, woman dancing
  **dict.fromkeys((0x1F936,), 0x1F385),  # Mrs. Claus, Santa Claus
  **dict.fromkeys((0x1F46C, 0x1F46D), 0x1F46B),  # men, women holding hands: woman and man
}
_PERSON, _CHILD, _FAMILY_SIGN = 0x1F9D1, 0x1F9D2, 0x1F46A
# Sequences that mean the same as one code point.
_SAME = {
  (_PERSON, 0x1F91D, _PERSON): 0x1F46B,
  (_PERSON, 0x2764, 0x1F48B, _PERSON): 0x1F48F,
  (_PERSON, 0x2764, _PERSON): 0x1F491,
  (_PERSON, 0x1F430, _PERSON): 0x1F46F,
  (_PERSON, 0x1F384): 0x1F385,
  (0x1FAF1, 0x1FAF2): 0x1F91D,  # the two hands of a handshake
}


def find_font(path: str = "") -> str:
  """`path`, or where fontconfig or Debian keep Noto Color Emoji.

  Raises:
    UserError: it is nowhere.
  """
  if path:
    return path
  if shutil.which("fc-list"):
    command = ["fc-list", "--format=%{file}\n", _FAMILY]
    found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
  else:
    found = glob.glob("/usr/share/fonts/**/NotoColorEmoji.ttf", recursive=True)
  found = sorted(filter(None, found))
  if not found:
    raise UserError(f"the font {_FAMILY} is not on this machine: {_INSTALL}")
  return found[0]


def base_of(emoji: str) -> str:
  """What an emoji has in common with its variants of skin tone, gender, direction
  and family: a man cook and a woman cook with dark skin are both "person cook".
  """
  codes = [ord(c) for c in emoji if ord(c) != _VARIATION and ord(c) not in _TONES]
  codes = codes or [ord(emoji[0])]  # a swatch of a skin tone alone
  kept = []
  for code in codes:
    if code in _SIGNS and kept and kept[-1] == _JOINER:
      kept.pop()
    else:
      kept.append(_NEUTRAL.get(code, code))
  people = tuple(code for code in kept if code != _JOINER)
  if len(people) > 1 and set(people) <= {_PERSON, _CHILD}:
    return chr(_FAMILY_SIGN)
  if people in _SAME:
    return chr(_SAME[people])
  return "".join(map(chr, kept))


def drawings(path: str, emoji: Iterator[str]) -> Iterator[tuple[str, bytes]]:
  """(emoji, PNG) of those `emoji` that the font at `path` draws as one picture.

  Raises:
    UserError: no such file, no font, or one without CBDT pictures.
  """
  from fontTools.ttLib import TTFont, TTLibError

  try:
    font = TTFont(path, lazy=True)
    tables = font["CBDT"], font["GSUB"], font.getBestCmap()
  except OSError as error:
    raise UserError(f"cannot read the font '{path}': {error.strerror}; {_INSTALL}") from None
  except TTLibError as error:
    raise UserError(f"'{path}' is not a font: {error}; {_INSTALL}") from None
  except KeyError as error:
    raise UserError(
      f"the font '{path}' has no table {error}, so it is no bitmap (CBDT) {_FAMILY}; {_INSTALL}"
    ) from None
  pictures, substitutions, characters = tables[0].strikeData[0], tables[1].table, tables[2]
  ligatures: dict[tuple[str, ...], str] = {}
  for lookup in substitutions.LookupList.Lookup:
    for subtable in lookup.SubTable:
      for first, rest in getattr(subtable, "ligatures", {}).items():
        for ligature in rest:
          ligatures.setdefault((first, *ligature.Component), ligature.LigGlyph)
  for sequence in emoji:
    glyphs = tuple(characters.get(ord(c)) for c in sequence if ord(c) != _VARIATION)
    glyph = glyphs[0] if len(glyphs) == 1 else ligatures.get(glyphs)
    if glyph in pictures:
      yield sequence, pictures[glyph].imageData
