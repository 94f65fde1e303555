"""The Inception Score (Salimans et al. 2016, section 4), in float64 on the host."""

import numpy as np
import scipy.special


def inception_score(logits: np.ndarray, splits: int = 10, seed: int = 0) -> tuple[float, float]:
  """exp E KL(p(y|x) || p(y)) over splits: mean and standard deviation.

  Args:
    logits: [N, classes], without the last bias, as the published code has them.
    splits: parts of which each has its own p(y).
    seed: of the order in which rows are split, as what is drawn prompt by prompt is not mixed.
  """
  order = np.random.RandomState(seed).permutation(len(logits))
  logits = np.asarray(logits, np.float64)[order]
  log_p = logits - scipy.special.logsumexp(logits, axis=1, keepdims=True)
  p = np.exp(log_p)
  edges = [i * len(logits) // splits for i in range(splits + 1)]
  scores = []
  for start, end in zip(edges, edges[1:], strict=False):
    part = p[start:end]
    with np.errstate(divide="ignore", invalid="ignore"):
      terms = part * (log_p[start:end] - np.log(part.mean(axis=0)))
    # The limit of p log p at 0; where p is, the marginal may be as well.
    divergence = np.sum(np.where(part > 0, terms, 0), axis=1).mean()
    scores.append(np.exp(divergence))
  return float(np.mean(scores)), float(np.std(scores))
