"""Metrics of features against those of other pictures: a reference's, or the originals'."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.metrics import kernel, manifold
from t2i_jax.metrics.frechet import frechet_distance
from t2i_jax.metrics.making import CMMD, MANY, Making, about_of, bias, few, meant, named
from t2i_jax.metrics.network import Features
from t2i_jax.metrics.parts import Fitted
from t2i_jax.metrics.result import Result
from t2i_jax.metrics.scores import Metric, Seen


def frechet(making: Making, name: str, features: Features) -> Metric:
  """Frechet distance to a reference."""
  reference = making.references[features.network.kind]
  parts, part = making.part("moments", lambda: Fitted(features), features)

  def compute(seen: Seen) -> Sequence[Result]:
    ours, width = part.moments, len(reference.mean)
    value = frechet_distance(
      ours.mean, ours.covariance, reference.mean, reference.covariance
    )
    remarks = (*features.network.remarks, *reference.remarks, *bias(seen.n, width, "pictures"),
               *bias(reference.n, width, "reference pictures"))  # fmt: skip
    about = about_of(features, **reference.described())
    return [Result(named(name, features), value, seen.n, about, remarks=remarks)]

  return Metric(name, parts, compute, check=lambda size: reference.check(features, size))


def frechet_of_originals(making: Making, name: str, features: Features) -> Metric:
  """Frechet distance of reconstructions to what they are reconstructions of."""
  ours, part = making.part("moments", lambda: Fitted(features), features)
  theirs, other = making.part(
    "moments of originals", lambda: Fitted(features, "originals"), features
  )

  def compute(seen: Seen) -> Sequence[Result]:
    a, b = part.moments, other.moments
    value = frechet_distance(a.mean, a.covariance, b.mean, b.covariance)
    remarks = (*features.network.remarks, *bias(seen.n, len(a.mean), "pictures"))
    about = about_of(features, reference="the originals")
    return [Result(named(name, features), value, seen.n, about, remarks=remarks)]

  return Metric(name, ours | theirs, compute, frozenset({"originals"}), check=features.check)


def _against_rows(
  making: Making, name: str, features: Features, least: int,
  compute: Callable[[np.ndarray, np.ndarray, dict[str, Any], tuple[str, ...]], Sequence[Result]],
) -> Metric:
  """A metric of features against each of the reference's: rows, rows, about, remarks -> results."""
  reference = making.references[features.network.kind]
  parts, part = making.rows(features)
  if reference.n < least:
    raise UserError(f"{name} needs a reference of at least {least} pictures, and it has "
                    f"{reference.n}; measure a larger one")

  def results(seen: Seen) -> Sequence[Result]:
    remarks = (*features.network.remarks, *reference.remarks)
    about = about_of(features, **reference.described())
    return compute(seen.rows(part), reference.rows, about, remarks)

  return Metric(
    name, parts, results, least=least,
    check=lambda size: reference.check(features, size, rows=True),
  )


def kernel_distance(making: Making, name: str, features: Features) -> Metric:
  """KID and its like."""
  wanted, subsets, seed = making.options["subset_size"], making.options["subsets"], making.seed

  def compute(ours, theirs, about, remarks):
    size = min(wanted, len(ours), len(theirs))
    value, deviation = kernel.kid(ours, theirs, subsets, size, seed)
    about |= {"subsets": subsets, "subset_size": size, "seed": seed}
    remark = few(size, MANY["subset"], f"subsets of {size} pictures")
    over = f"{subsets} subsets of {size}"
    result = named(name, features)
    return [Result(result, value, len(ours), about, deviation, over, (*remarks, *remark))]

  return _against_rows(making, name, features, 2, compute)


def _manifold(
  making: Making, name: str, features: Features, titles: tuple[str, str], nearest: int,
  function: Callable,
) -> Metric:
  """Two results, each under its own title with what `name` has behind both."""
  suffix = name.removeprefix("_".join(titles))

  def compute(ours, theirs, about, remarks):
    about |= {"nearest": nearest}
    remark = few(len(ours), MANY["manifold"], f"{len(ours)} pictures")
    values = function(ours, theirs, nearest)
    return [
      Result(named(title + suffix, features), value, len(ours), about, remarks=(*remarks, *remark))
      for title, value in zip(titles, values, strict=True)
    ]

  return _against_rows(making, name, features, nearest + 1, compute)


def precision_recall(making: Making, name: str, features: Features) -> Metric:
  """Improved precision, and recall."""
  nearest = making.options["precision_nearest"]
  return _manifold(
    making, name, features, ("precision", "recall"), nearest, manifold.precision_recall
  )


def density_coverage(making: Making, name: str, features: Features) -> Metric:
  """Density, and coverage."""
  nearest = making.options["density_nearest"]
  return _manifold(
    making, name, features, ("density", "coverage"), nearest, manifold.density_coverage
  )


def cmmd(making: Making, name: str, features: Features) -> Metric:
  """CMMD."""

  def compute(ours, theirs, about, remarks):
    remark = few(min(len(ours), len(theirs)), MANY["cmmd"], f"{len(ours)} pictures")
    remarks = (*remarks, *meant(features, CMMD), *remark)
    about |= {"sigma": 10, "scale": 1000}
    return [Result(name, kernel.cmmd(ours, theirs), len(ours), about, remarks=remarks)]

  return _against_rows(making, name, features, 2, compute)
