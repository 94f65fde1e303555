"""The functions of arrays beneath the metrics, against closed forms and plain loops."""

import numpy as np
import pytest
import scipy.linalg

from t2i_jax.metrics import codebook, kernel, manifold, matching, pixels
from t2i_jax.metrics.frechet import Moments, frechet_distance
from t2i_jax.metrics.inception_score import inception_score

RANDOM = np.random.default_rng


def fitted(rows):
  moments = Moments()
  moments.update(rows)
  return moments


def distance(a, b):
  return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def test_frechet_distance_of_two_known_gaussians():
  """With covariances that commute it is |m|^2 + sum (sqrt a - sqrt b)^2 over their eigenvalues."""
  turn = scipy.linalg.qr(RANDOM(0).normal(size=(6, 6)))[0]
  a, b = np.array([4.0, 1, 9, 0, 2, 5]), np.array([1.0, 1, 4, 3, 0, 7])
  mean = np.arange(6.0)
  found = frechet_distance(mean, turn * a @ turn.T, np.zeros(6), turn * b @ turn.T)
  expected = mean @ mean + np.square(np.sqrt(a) - np.sqrt(b)).sum()
  np.testing.assert_allclose(found, expected, rtol=1e-8)  # of one eigenvalue that is 0, the root


def test_frechet_distance_of_covariances_that_do_not_commute_is_that_of_the_matrix_root():
  a, b = (fitted(RANDOM(seed).normal(size=(40, 8)) * (1 + np.arange(8))) for seed in (1, 2))
  root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
  gap = a.mean - b.mean
  expected = gap @ gap + np.trace(a.covariance + b.covariance - 2 * root)
  np.testing.assert_allclose(distance(a, b), expected, rtol=1e-9)
  np.testing.assert_allclose(distance(a, a), 0, atol=1e-9 * np.trace(a.covariance))


def test_moments_are_numpys_and_parts_merge_to_the_whole():
  rows = RANDOM(0).normal(3, 1, (50, 5)).astype("f4")
  whole, first, second = fitted(rows), fitted(rows[:7]), fitted(rows[7:])
  np.testing.assert_allclose(whole.covariance, np.cov(rows.astype("f8"), rowvar=False), rtol=1e-9)
  first.merge(Moments())
  first.merge(second)
  assert first.n == 50
  np.testing.assert_allclose(first.covariance, whole.covariance, rtol=1e-10)
  np.testing.assert_allclose(first.mean, whole.mean, rtol=1e-12)


def test_the_bias_of_a_frechet_distance_falls_as_one_over_the_number_of_pictures():
  """Chong and Forsyth 2020, section 3: to first order it is linear in 1 / N."""
  reference = fitted(RANDOM(0).normal(size=(50_000, 32)))
  bias = [
    np.mean([distance(fitted(RANDOM(seed).normal(size=(n, 32))), reference)
             for seed in range(1, 9)])
    for n in (500, 1000, 2000)
  ]  # fmt: skip
  assert bias[0] > bias[1] > bias[2] > 0
  np.testing.assert_allclose([bias[0] / bias[1], bias[1] / bias[2]], 2, rtol=0.15)


def test_kid_is_unbiased_and_the_biased_estimate_is_not():
  draws = [RANDOM(seed).normal(size=(2, 40, 8)) for seed in range(300)]
  found = np.array([kernel.unbiased(*draw) for draw in draws])
  error = found.std() / np.sqrt(len(found))
  assert abs(found.mean()) < 3 * error
  assert kernel.unbiased(draws[0][0], draws[0][1] + 1) > 10 * found.std()
  biased = kernel.cmmd(*draws[0])
  assert biased > 0 and kernel.cmmd(draws[0][0], draws[0][0]) == 0


def test_kid_of_subsets_is_seeded_and_of_all_rows_is_the_plain_estimate():
  a, b = RANDOM(0).normal(size=(30, 4)), RANDOM(1).normal(0.5, 1, (30, 4))
  value, deviation = kernel.kid(a, b, subsets=3, size=30)
  np.testing.assert_allclose(value, kernel.unbiased(a, b), rtol=1e-12)
  assert deviation < 1e-12
  one, other = kernel.kid(a, b, 20, 10, seed=5), kernel.kid(a, b, 20, 10, seed=6)
  assert one == kernel.kid(a, b, 20, 10, seed=5) and one != other


def test_cmmd_is_the_sum_over_all_pairs():
  a, b = RANDOM(0).normal(size=(5, 3)), RANDOM(1).normal(size=(7, 3))

  def mean(x, y):
    return np.mean([[np.exp(-np.sum((p - q) ** 2) / 200) for q in y] for p in x])

  expected = 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))
  np.testing.assert_allclose(kernel.cmmd(a, b), expected, rtol=1e-9)


def test_inception_score_is_the_number_of_sure_classes():
  sure = 100 * np.eye(5)[np.arange(1000) % 5]
  assert inception_score(sure, splits=1)[0] == pytest.approx(5)
  assert inception_score(1000 * sure, splits=1)[0] == pytest.approx(5)  # others underflow to 0
  assert inception_score(np.zeros((1000, 5)), splits=10) == pytest.approx((1, 0))


def plain_manifold(fake, real, k):
  """Both papers' sums, one pair after the other."""
  gap = lambda a, b: np.linalg.norm(a - b)  # noqa: E731
  radius = lambda rows, i: sorted(gap(rows[i], x) for x in rows)[k]  # noqa: E731
  real_radii = [radius(real, i) for i in range(len(real))]
  fake_radii = [radius(fake, i) for i in range(len(fake))]
  inside = np.array([[gap(f, r) <= d for r, d in zip(real, real_radii, strict=True)] for f in fake])
  covered = [any(gap(r, f) <= d for f, d in zip(fake, fake_radii, strict=True)) for r in real]
  precision, density, coverage = inside.any(1).mean(), inside.sum() / k / len(fake), inside.any(0)
  return precision, np.mean(covered), density, coverage.mean()


def test_precision_recall_density_and_coverage_are_the_papers_sums():
  fake, real = RANDOM(0).normal(100, 1, (30, 3)), RANDOM(1).normal(100.5, 1.5, (41, 3))
  expected = plain_manifold(fake, real, 3)
  found = *manifold.precision_recall(fake, real, 3), *manifold.density_coverage(fake, real, 3)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert 0 < min(expected) and expected[0] != expected[1]


def test_more_rows_than_are_compared_at_a_time_give_the_same(monkeypatch):
  fake, real = RANDOM(0).normal(size=(30, 3)), RANDOM(1).normal(0.5, 1.5, (41, 3))
  whole = *manifold.precision_recall(fake, real), *manifold.density_coverage(fake, real)
  monkeypatch.setattr(manifold, "_ROWS", 16)
  parts = *manifold.precision_recall(fake, real), *manifold.density_coverage(fake, real)
  assert whole == parts
  monkeypatch.setattr(kernel, "_ROWS", 16)
  sums = kernel.cmmd(fake, real)
  monkeypatch.undo()
  np.testing.assert_allclose(sums, kernel.cmmd(fake, real), rtol=1e-9)


def test_equal_distributions_have_density_and_coverage_about_one():
  fake, real = RANDOM(0).normal(size=(2, 800, 6))
  density, coverage = manifold.density_coverage(fake, real, 5)
  assert density == pytest.approx(1, abs=0.1)
  # Naeem et al. 2020, section 3.3: the expectation is 1 - (N-1)...(N-k) / (2N-1)...(2N-k).
  steps = np.arange(1, 6)
  assert coverage == pytest.approx(1 - np.prod((800 - steps) / (1600 - steps)), abs=0.02)


def test_clip_score_is_clipped_cosines():
  pictures, captions = np.array([[1.0, 0], [0, 2], [3, 4]]), np.array([[5.0, 0], [0, -1], [0, 1]])
  np.testing.assert_allclose(matching.cosines(pictures, captions), [1, -1, 0.8])
  np.testing.assert_allclose(matching.clip_score(pictures, captions), [2.5, 0, 2.0])


def test_r_precision_is_whether_the_own_caption_is_nearest():
  vectors = RANDOM(0).normal(size=(120, 16))
  vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
  texts, index = [f"caption {i}" for i in range(120)], np.arange(120)
  # Captions that occur twice are no mismatch of each other.
  doubled = np.concatenate([vectors, vectors[:20]]), texts + texts[:20]
  right = matching.r_precision(doubled[0], *doubled, np.arange(140))
  assert right.all()
  wrong = matching.r_precision(np.roll(vectors, 1, 0), vectors, texts, index)
  # Of 120 captions 100 are shown, so that the picture's true one is often among them.
  assert wrong.mean() < 0.4
  noise = RANDOM(1).normal(size=(2000, 16))
  many = np.arange(2000) % 120
  chance = matching.r_precision(noise, vectors[many], [texts[i] for i in many], np.arange(2000))
  assert chance.mean() == pytest.approx(1 / 100, abs=0.01)


def test_r_precision_depends_on_the_pictures_index_and_the_seed_alone():
  pictures, vectors = RANDOM(0).normal(size=(2, 150, 4))
  texts, index = [str(i) for i in range(150)], np.arange(150)
  right = matching.r_precision(pictures, vectors, texts, index, seed=3)
  order = RANDOM(2).permutation(150)
  again = matching.r_precision(
    pictures[order], vectors[order], [texts[i] for i in order], index[order], seed=3
  )
  np.testing.assert_array_equal(right[order], again)


def test_psnr_is_decibels_of_each_pictures_error():
  a = RANDOM(0).integers(0, 200, (2, 12, 12, 3), dtype=np.uint8)
  b = a + np.array([1, 10], np.uint8)[:, None, None, None]
  np.testing.assert_allclose(pixels.psnr(a, b), 20 * np.log10(255 / np.array([1, 10])))
  assert np.isinf(pixels.psnr(a, a)).all()


def test_ssim_is_the_papers_sum_over_windows():
  a = RANDOM(0).integers(0, 256, (1, 13, 12, 3), dtype=np.uint8)
  b = np.clip(a + RANDOM(1).normal(0, 20, a.shape), 0, 255).astype(np.uint8)
  at = np.arange(11) - 5
  weights = np.exp(-(at[:, None] ** 2 + at**2) / 4.5)
  weights /= weights.sum()
  found = []
  for i in range(3):
    for j in range(2):
      for channel in range(3):
        x, y = (z[0, i : i + 11, j : j + 11, channel].astype(float) for z in (a, b))
        mx, my = (weights * x).sum(), (weights * y).sum()
        vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
        shared = (weights * (x - mx) * (y - my)).sum()
        c1, c2 = 2.55**2, 7.65**2
        value = (2 * mx * my + c1) * (2 * shared + c2)
        found.append(value / ((mx**2 + my**2 + c1) * (vx + vy + c2)))
  np.testing.assert_allclose(pixels.ssim(a, b), [np.mean(found)], rtol=1e-9)
  np.testing.assert_allclose(pixels.ssim(a, a), [1])


def test_codebook_usage_and_perplexity():
  assert codebook.usage(np.array([3, 3, 0, 0])) == pytest.approx((0.5, 2))
  assert codebook.usage(np.full(16, 9)) == pytest.approx((1, 16))
  assert codebook.usage(np.array([0, 5])) == pytest.approx((0.5, 1))
