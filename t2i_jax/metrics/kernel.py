"""Maximum mean discrepancies of features (Gretton et al. 2012), in float64 on the host."""

import numpy as np

_ROWS = 1024  # of a kernel matrix at a time


def polynomial(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """(a b / F + 1)^3 of rows [N, F] and [M, F]: [N, M]. Binkowski et al. 2018, equation 3."""
  return (a @ b.T / a.shape[1] + 1.0) ** 3


def unbiased(a: np.ndarray, b: np.ndarray) -> float:
  """The squared discrepancy's unbiased estimate, by the polynomial kernel, of [N, F] and [M, F].

  Gretton et al. 2012, equation 3; it may be negative.
  """
  a, b = (np.asarray(x, np.float64) for x in (a, b))

  def within(x):
    kernel = polynomial(x, x)
    return (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1))

  return float(within(a) + within(b) - 2 * polynomial(a, b).mean())


def kid(
  a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
  """The kernel inception distance: mean and standard deviation over random subsets.

  Binkowski et al. 2018 (Demystifying MMD GANs), section 3. Each subset is drawn without
  replacement, from `a` and then from `b`, by numpy's legacy generator, whose stream never changes.

  Args:
    a, b: features [N, F] and [M, F], both of at least `size` rows.
    subsets, size: how many, and of how many rows.
    seed: of the draws.
  """
  random = np.random.RandomState(seed)
  found = []
  for _ in range(subsets):
    rows = [x[random.choice(len(x), size, replace=False)] for x in (a, b)]
    found.append(unbiased(*rows))
  return float(np.mean(found)), float(np.std(found))


def cmmd(a: np.ndarray, b: np.ndarray, sigma: float = 10.0, scale: float = 1000.0) -> float:
  """CMMD of unit vectors [N, P] and [M, P]: 1000 times the squared discrepancy, biased.

  Jayasumana et al. 2024 (Rethinking FID), section 4: the Gaussian kernel of bandwidth 10, and the
  estimate that counts each row with itself. Kernels are summed without their leading 1, which
  cancels, and whose rounding would be as large as what is left.
  """
  a, b = (np.asarray(x, np.float64) for x in (a, b))

  def mean(x, y):
    squares, total = np.sum(y * y, axis=1), 0.0
    for start in range(0, len(x), _ROWS):
      part = x[start : start + _ROWS]
      distances = np.sum(part * part, axis=1)[:, None] + squares - 2 * part @ y.T
      total += np.expm1(-distances / (2 * sigma**2)).sum()
    return total / (len(x) * len(y))

  return float(scale * (mean(a, a) + mean(b, b) - 2 * mean(a, b)))
