"""Pictures compared by their pixels; float64 on the host."""

import numpy as np
import scipy.ndimage

WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Peak signal-to-noise ratios in dB, [N], of pictures uint8 [N, H, W, 3]; infinite if equal.

  10 log10(255^2 / mean squared error), of each picture.
  """
  errors = np.square(np.asarray(a, np.float64) - b).mean(axis=(1, 2, 3))
  with np.errstate(divide="ignore"):
    return 10 * np.log10(255.0**2 / errors)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Structural similarities [N] of pictures uint8 [N, H, W, 3] with sides of at least 11.

  Wang et al. 2004, section III.B and equation 13: Gaussian windows of 11x11 pixels with deviation
  1.5 that lie wholly inside the picture, K1 = 0.01, K2 = 0.03; the mean over windows and, as the
  paper's is of grey pictures, over the three channels.
  """
  x, y = (np.asarray(z, np.float64) for z in (a, b))
  mean_x, mean_y = _windows(x), _windows(y)
  spread_x = _windows(x * x) - mean_x**2
  spread_y = _windows(y * y) - mean_y**2
  shared = _windows(x * y) - mean_x * mean_y
  value = (2 * mean_x * mean_y + _C1) * (2 * shared + _C2)
  value /= (mean_x**2 + mean_y**2 + _C1) * (spread_x + spread_y + _C2)
  return value.mean(axis=(1, 2, 3))


def _windows(x: np.ndarray) -> np.ndarray:
  """Weighted means of all windows inside, [N, H, W, C] -> [N, H - 10, W - 10, C]."""
  reach = WINDOW // 2
  weights = np.exp(-np.square(np.arange(-reach, reach + 1)) / (2 * _SIGMA**2))
  weights /= weights.sum()
  for axis in (1, 2):
    x = scipy.ndimage.correlate1d(x, weights, axis)
  return x[:, reach:-reach, reach:-reach]
