"""How much of a tokenizer's codebook is used."""

import numpy as np


def usage(counts: np.ndarray) -> tuple[float, float]:
  """The fraction of codes that occur, and the perplexity of how often each does.

  The perplexity is exp of the entropy: as many equally frequent codes would be as hard to guess
  (van den Oord et al. 2017).

  Args:
    counts: int [K], at least one of them positive.
  """
  counts = np.asarray(counts, np.float64)
  p = counts[counts > 0] / counts.sum()
  return float(np.mean(counts > 0)), float(np.exp(-np.sum(p * np.log(p))))
