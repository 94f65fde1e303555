"""Pictures against captions, by unit vectors of a network that reads both; float64 on the host."""

from collections.abc import Sequence

import numpy as np

PREFIX = "A photo depicts "  # what CLIPScore says before each caption
CANDIDATES = 100


def cosines(pictures: np.ndarray, captions: np.ndarray) -> np.ndarray:
  """Of rows [N, P] and [N, P], [N]; scaled to length 1 first."""
  a, b = (np.asarray(x, np.float64) for x in (pictures, captions))
  return np.sum(a * b, axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def clip_score(pictures: np.ndarray, captions: np.ndarray) -> np.ndarray:
  """2.5 max(cos, 0) of each picture and its caption behind `PREFIX`, [N].

  Hessel et al. 2021 (CLIPScore), equation 1.
  """
  return 2.5 * np.maximum(cosines(pictures, captions), 0.0)


def r_precision(
  pictures: np.ndarray, captions: np.ndarray, texts: Sequence[str], index: Sequence[int],
  seed: int = 0, candidates: int = CANDIDATES,
) -> np.ndarray:
  """Whether each picture is nearer to its own caption than to 99 mismatched ones, bool [N].

  Xu et al. 2018 (AttnGAN), section 4 (R = 1); in CLIP's space, Park et al. 2021 (Benchmark for
  Compositional Text-to-Image Synthesis). Mismatched ones are drawn from the other captions, each
  text once, by the seed and the picture's index.

  Args:
    pictures, captions: unit vectors [N, P].
    texts: the captions.
    index: of each picture among all.
    seed: of the draws.
    candidates: captions that a picture is shown, its own one among them.
  """
  pictures, captions = (np.asarray(x, np.float64) for x in (pictures, captions))
  first = {text: row for row, text in reversed(list(enumerate(texts)))}
  names = sorted(first)
  place = {text: i for i, text in enumerate(names)}
  vectors = captions[[first[text] for text in names]]
  right = np.zeros(len(texts), bool)
  for row, text in enumerate(texts):
    random = np.random.default_rng([seed, int(index[row])])
    drawn = random.choice(len(names) - 1, candidates - 1, replace=False)
    drawn += drawn >= place[text]
    own = vectors[place[text]] @ pictures[row]
    right[row] = own > np.max(vectors[drawn] @ pictures[row])
  return right
