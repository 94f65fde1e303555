"""Metrics of pictures by themselves, with their captions, their originals or their codes."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.metrics import codebook as codebooks
from t2i_jax.metrics import latents as latent
from t2i_jax.metrics import matching, pixels
from t2i_jax.metrics.inception_score import inception_score as score_of_logits
from t2i_jax.metrics.making import CLIP_SCORE, MANY, Making, about_of, few, meant
from t2i_jax.metrics.network import Features
from t2i_jax.metrics.parts import Batch, Collected, Counted
from t2i_jax.metrics.result import Result
from t2i_jax.metrics.scores import Metric, Seen

PAIRS = 256  # of pictures compared at a time


def inception_score(making: Making, name: str, features: Features) -> Metric:
  """The Inception Score."""
  parts, part = making.rows(features, "logits")
  splits, seed = making.options["splits"], making.seed

  def compute(seen: Seen) -> Sequence[Result]:
    value, deviation = score_of_logits(seen.rows(part), splits, seed)
    about = about_of(features, splits=splits, seed=seed)
    remark = few(seen.n, MANY["is"], f"{seen.n} pictures")
    return [Result(name, value, seen.n, about, deviation, f"{splits} splits", remark)]

  return Metric(name, parts, compute, least=10 * splits)


def _captioned(making: Making, features: Features, prefix: str = ""):
  """Parts of pictures' and captions' vectors, and the two parts."""
  seen, images = making.rows(features)

  def read(batch: Batch) -> np.ndarray:
    return features.read([prefix + caption for caption in batch.captions])

  read_parts, texts = making.part(
    "captions behind a prefix" if prefix else "captions", lambda: Collected(read), features
  )
  return seen | read_parts, images, texts


def _matched(
  making: Making, name: str, features: Features, prefix: str, function: Callable,
  published: str = "",
) -> Metric:
  parts, images, texts = _captioned(making, features, prefix)

  def compute(seen: Seen) -> Sequence[Result]:
    values = function(seen.rows(images), seen.rows(texts))
    remarks = meant(features, published) if published else ()
    remarks += few(seen.n, MANY["captions"], f"{seen.n} pictures")
    about = about_of(features, prefix=prefix, different_captions=len(set(seen.captions)))
    return [_mean(name, values, about, remarks)]

  return Metric(name, parts, compute, frozenset({"captions"}))


def _mean(
  name: str, values: np.ndarray, about: dict[str, Any], remarks: tuple[str, ...] = (),
  over: str = "pictures", n: int | None = None,
) -> Result:
  n = len(values) if n is None else n
  deviation = float(np.std(values)) if len(values) else None
  return Result(name, float(np.mean(values)), n, about, deviation, over, remarks)


def clip_score(making: Making, name: str, features: Features) -> Metric:
  """CLIPScore."""
  return _matched(making, name, features, matching.PREFIX, matching.clip_score, CLIP_SCORE)


def clip_cosine(making: Making, name: str, features: Features) -> Metric:
  """100 times the cosine."""
  return _matched(making, name, features, "", lambda a, b: 100 * matching.cosines(a, b))


def r_precision(making: Making, name: str, features: Features) -> Metric:
  """R-precision."""
  parts, images, texts = _captioned(making, features)

  def compute(seen: Seen) -> Sequence[Result]:
    different = len(set(seen.captions))
    if different < matching.CANDIDATES:
      raise UserError(f"{name} needs {matching.CANDIDATES} different captions, and there are "
                      f"{different}; draw for more, or leave it out")
    right = matching.r_precision(
      seen.rows(images), seen.rows(texts), seen.captions, seen.index, making.seed
    )
    about = about_of(features, candidates=matching.CANDIDATES, different_captions=different,
                   seed=making.seed)  # fmt: skip
    return [_mean(name, right, about, few(seen.n, MANY["captions"], f"{seen.n} pictures"))]

  return Metric(name, parts, compute, frozenset({"captions"}), matching.CANDIDATES)


def diversity(making: Making, name: str, features: Features) -> Metric:
  """The mean distance between two pictures of a caption, averaged over captions."""
  parts, part = making.part("pictures", lambda: Collected(lambda batch: batch.images))

  def compute(seen: Seen) -> Sequence[Result]:
    pictures, groups = seen.rows(part), {}
    for row, caption in enumerate(seen.captions):
      groups.setdefault(caption, []).append(row)
    pairs = [
      (number, *pair) for number, rows in enumerate(groups.values())
      for pair in itertools.combinations(rows, 2)
    ]
    if not pairs:
      raise UserError(f"{name} needs several pictures of a caption, and of no caption there are "
                      "two; draw several of each, or leave it out")
    number, a, b = np.array(pairs).T
    distances = np.concatenate([
      features.distance(pictures[a[i : i + PAIRS]], pictures[b[i : i + PAIRS]])
      for i in range(0, len(a), PAIRS)
    ]).astype(np.float64)
    counts = np.bincount(number, minlength=len(groups))
    means = (np.bincount(number, distances, len(groups)) / np.maximum(counts, 1))[counts > 0]
    about = about_of(features, captions=len(means), pairs=len(pairs))
    return [_mean(name, means, about, features.network.remarks, "captions", seen.n)]

  making.uses(features)
  return Metric(name, parts, compute, frozenset({"captions"}), check=features.check)


def _of_originals(
  making: Making, name: str, function: Callable[[Batch], np.ndarray],
  features: Features | None = None, check: Callable = lambda size: None,
) -> Metric:
  """The mean of what each reconstruction and its original give."""
  parts, part = making.part(name, lambda: Collected(function), features)
  check = features.check if features else check

  def compute(seen: Seen) -> Sequence[Result]:
    values = seen.rows(part).astype(np.float64)
    finite, remarks = values[np.isfinite(values)], features.network.remarks if features else ()
    if len(finite) < len(values):
      remarks += (f"{len(values) - len(finite)} pictures are equal to their originals, and are "
                  "left out",)  # fmt: skip
    if not len(finite):
      return [Result(name, float("inf"), seen.n, about_of(features), remarks=remarks)]
    return [_mean(name, finite, about_of(features), remarks, n=seen.n)]

  return Metric(name, parts, compute, frozenset({"originals"}), 1, check)


def perceptual_distance(making: Making, name: str, features: Features) -> Metric:
  """LPIPS, or what stands in for it."""
  return _of_originals(
    making, name, lambda batch: features.distance(batch.images, batch.originals), features
  )


def psnr(making: Making, name: str, features: None) -> Metric:
  """Peak signal-to-noise ratio."""
  return _of_originals(making, name, lambda batch: pixels.psnr(batch.images, batch.originals))


def ssim(making: Making, name: str, features: None) -> Metric:
  """Structural similarity."""

  def check(size: tuple[int, int]) -> None:
    if min(size) < pixels.WINDOW:
      raise UserError(f"{name} has windows of {pixels.WINDOW} pixels, and the pictures are "
                      f"{size[1]}x{size[0]}; leave it out")

  return _of_originals(
    making, name, lambda batch: pixels.ssim(batch.images, batch.originals), check=check
  )


def codebook(making: Making, name: str, features: None) -> Metric:
  """Usage and perplexity of a codebook."""
  size = making.options["vocabulary"]
  if not size:
    raise UserError(f"{name} needs the option vocabulary, the number of the tokenizer's codes")
  parts, part = making.part("codes", functools.partial(Counted, size))

  def compute(seen: Seen) -> Sequence[Result]:
    total = int(part.counts.sum())
    used, perplexity = codebooks.usage(part.counts)
    about = {"vocabulary": size, "codes": total}
    remark = few(total, MANY["codes"] * size, f"{total} codes of a vocabulary of {size}")
    return [
      Result("codebook_usage", used, seen.n, about, remarks=remark),
      Result("codebook_perplexity", perplexity, seen.n, about, remarks=remark),
    ]

  return Metric(name, parts, compute, frozenset({"codes"}), 1)


def latents(making: Making, name: str, features: None) -> Metric:
  """What an autoencoder's latents are like."""
  parts, part = making.part("latents", lambda: Collected(lambda batch: batch.latents))

  def compute(seen: Seen) -> Sequence[Result]:
    sums = seen.rows(part)
    found, kl = latent.statistics(sums), latent.divergences(sums).mean(axis=1)
    about = {"channels": found["channels"], "of": "draws from the latents' distributions"}
    idle, channels = found["idle"], len(found["channels"]["kl"])
    remark = (
      (f"{idle} of {channels} channels carry less than {latent.IDLE} nats a dimension",)
      if idle else ()
    )
    return [
      _mean("latent_kl", kl, about, remark),
      Result("latent_mean", found["mean"], seen.n, about),
      Result("latent_std", found["std"], seen.n, about),
    ]

  return Metric(name, parts, compute, frozenset({"latents"}), 1)
