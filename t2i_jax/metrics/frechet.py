"""Gaussians fitted to features, and the Frechet distance between two of them, in float64.

Heusel et al. 2017 (GANs Trained by a Two Time-Scale Update Rule), section 4; Dowson and Landau
1982.
"""

import numpy as np
import scipy.linalg


class Moments:
  """Sums from which mean and covariance follow; float64, on the host.

  Parts of a set may be summed apart and merged.

  Attributes:
    n: rows so far.
    total, outer: sums of rows [F], and of their products [F, F]; None before the first row.
  """

  def __init__(self):
    self.n, self.total, self.outer = 0, None, None

  def update(self, rows: np.ndarray) -> None:
    """Adds rows [N, F]."""
    rows = np.asarray(rows, np.float64)
    self._add(len(rows), rows.sum(axis=0), rows.T @ rows)

  def merge(self, other: "Moments") -> None:
    """Adds what another one has seen."""
    if other.n:
      self._add(other.n, other.total, other.outer)

  def _add(self, n: int, total: np.ndarray, outer: np.ndarray) -> None:
    if self.total is None:
      self.total, self.outer = np.zeros_like(total), np.zeros_like(outer)
    self.n, self.total, self.outer = self.n + n, self.total + total, self.outer + outer

  @property
  def mean(self) -> np.ndarray:
    """[F]."""
    return self.total / self.n

  @property
  def covariance(self) -> np.ndarray:
    """[F, F], divided by n - 1; of at least two rows."""
    mean = self.mean
    return (self.outer - self.n * np.outer(mean, mean)) / (self.n - 1)


def frechet_distance(
  mean_a: np.ndarray, covariance_a: np.ndarray, mean_b: np.ndarray, covariance_b: np.ndarray
) -> float:
  """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of means [F] and covariances [F, F].

  The trace of the root is the sum of the singular values of C_a^(1/2) C_b^(1/2), roots of symmetric
  matrices: it needs neither the root of a matrix that is not symmetric, nor something added to the
  diagonal of one without full rank.
  """
  difference = np.asarray(mean_a, np.float64) - np.asarray(mean_b, np.float64)
  product = _root(covariance_a) @ _root(covariance_b)
  root_trace = scipy.linalg.svdvals(product).sum()
  traces = np.trace(np.asarray(covariance_a, np.float64)) + np.trace(
    np.asarray(covariance_b, np.float64)
  )
  return float(difference @ difference + traces - 2 * root_trace)


def _root(covariance: np.ndarray) -> np.ndarray:
  """The symmetric root of a symmetric matrix, rounding below zero taken for zero."""
  values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
  return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
