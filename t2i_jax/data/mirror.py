"""Which captions a mirrored picture still fits.

Mirroring doubles a small data set, and teaches a wrong left and right where captions say them.
Writing, clocks and maps are wrong in a mirror too.
"""

import re

_SIDED = re.compile(
  r"\b(left|right|lefts|rights|leftmost|rightmost|leftward|rightward|leftwards|rightwards|lefty|"
  r"(anti|counter|counter-)?clockwise|east|west|eastern|western|"
  r"letters?|words?|text|writing|written|writes|reads?|reading|says?|saying|signs?|logos?|labels?|"
  r"numbers?|numerals?|digits?|clocks?|maps?|captions?|titles?|slogans?|graffiti|inscriptions?)\b"
  r"|[\"\u201c\u201d]",
  re.IGNORECASE,
)


def may_be_mirrored(caption: str) -> bool:
  """Whether an English caption says nothing of sides, and nothing that is read.

  Quotation marks count as writing. Captions in other languages are not understood: leave `flips`
  off for them.
  """
  return _SIDED.search(caption) is None
