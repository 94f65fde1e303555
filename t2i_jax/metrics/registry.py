"""The metrics by name: what each is, what it needs, and how it is made."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from t2i_jax.errors import UserError, unknown
from t2i_jax.metrics import against_reference as against
from t2i_jax.metrics import of_pictures
from t2i_jax.metrics.making import Making
from t2i_jax.metrics.network import Features
from t2i_jax.metrics.reference import Reference
from t2i_jax.metrics.scores import Metric, Scores

INCEPTION, DINOV2, TOWERS, PERCEPTUAL, FEATURE_NET = (
  "inception", "dinov2", "clip-vit", "lpips-vgg", "feature-net"
)
KINDS = (INCEPTION, DINOV2, TOWERS, PERCEPTUAL, FEATURE_NET)
# What a metric may need besides pictures.
NEEDS = ("reference", "reference_rows", "captions", "repeats", "originals", "codes", "latents")
OPTIONS = {
  "subsets": 100, "subset_size": 1000,  # of KID
  "splits": 10,  # of the Inception Score
  "precision_nearest": 3, "density_nearest": 5,
  "vocabulary": 0,  # codes of the tokenizer, for `codebook`
}  # fmt: skip


class Networks(Protocol):
  """Networks that are at hand, by kind."""

  def has(self, kind: str) -> bool:
    """Whether a file of it was given."""

  def of(self, kind: str, preprocessing: str = "") -> Features:
    """The network, as one of its preprocessings has it; the usual one if none is named."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """A metric that can be made.

  Attributes:
    line: what it is and what it needs, for people.
    network: kind of the network, or "".
    needs: of `NEEDS`.
    make: `Making, name -> Metric`.
    preprocessing: of the network, where it is not the usual one.
    instead: the name of the same thing in the features of a `feature-net`; "" for none.
  """

  line: str
  network: str
  needs: frozenset[str]
  make: Callable[..., Metric]
  preprocessing: str = ""
  instead: str = ""


def _families() -> dict[str, Entry]:
  """What can be measured in the features of any network, for each of them."""
  found = {}
  for kind, suffix, of in (
    (INCEPTION, "", "the Inception of 2015-12-05"), (DINOV2, "_dinov2", "DINOv2"),
    (FEATURE_NET, "_feature_net", "a feature_net export, named by its data set"),
  ):
    stand_in = lambda name, kind=kind: "" if kind == FEATURE_NET else f"{name}_feature_net"  # noqa: E731
    frechet, kernel = ("fid", "kid") if kind == INCEPTION else (f"fd{suffix}", f"kd{suffix}")
    statistics, rows = frozenset({"reference"}), frozenset({"reference", "reference_rows"})
    found |= {
      frechet: Entry(f"Frechet distance to the reference, in features of {of}", kind, statistics,
                     against.frechet, instead=stand_in("fd")),
      f"r{frechet}": Entry(f"Frechet distance of reconstructions to their originals, in features "
                           f"of {of}", kind, frozenset({"originals"}),
                           against.frechet_of_originals, instead=stand_in("rfd")),
      kernel: Entry(f"kernel distance to the reference's pictures, in features of {of}", kind, rows,
                    against.kernel_distance, instead=stand_in("kd")),
      f"precision_recall{suffix}": Entry(
        f"improved precision and recall against the reference's pictures, in features of {of}",
        kind, rows, against.precision_recall, instead=stand_in("precision_recall")),
      f"density_coverage{suffix}": Entry(
        f"density and coverage against the reference's pictures, in features of {of}", kind, rows,
        against.density_coverage, instead=stand_in("density_coverage")),
    }  # fmt: skip
  return found


def _perceptual() -> dict[str, Entry]:
  found = {}
  for kind, prefix, of in (
    (PERCEPTUAL, "lpips_", "LPIPS's distance"),
    (FEATURE_NET, "feature_net_", "a feature_net export's distance"),
  ):
    stand_in = "" if kind == FEATURE_NET else "feature_net_"
    found |= {
      f"{prefix}distance": Entry(
        f"{of} between reconstructions and their originals", kind, frozenset({"originals"}),
        of_pictures.perceptual_distance, instead=stand_in and f"{stand_in}distance"),
      f"{prefix}diversity": Entry(
        f"{of} among pictures of the same caption; several of each", kind,
        frozenset({"captions", "repeats"}), of_pictures.diversity,
        instead=stand_in and f"{stand_in}diversity"),
    }  # fmt: skip
  return found


_CAPTIONS, _ORIGINALS = frozenset({"captions"}), frozenset({"originals"})
METRICS: dict[str, Entry] = {
  **_families(),
  "is": Entry("Inception Score", INCEPTION, frozenset(), of_pictures.inception_score),
  "cmmd": Entry("CMMD to the reference's pictures, in a CLIP's space (published: ViT-L/14 at 336)",
                TOWERS, frozenset({"reference", "reference_rows"}), against.cmmd, "cmmd"),
  "clip_score": Entry("CLIPScore, 2.5 max(cos, 0) with a prefix (published: ViT-B/32)", TOWERS,
                      _CAPTIONS, of_pictures.clip_score),
  "clip_cosine": Entry("100 times the cosine of a picture and its caption, without a prefix",
                       TOWERS, _CAPTIONS, of_pictures.clip_cosine),
  "r_precision": Entry("how often the own caption is nearer than 99 others, in a CLIP's space; at "
                       "least 100 different captions", TOWERS, _CAPTIONS, of_pictures.r_precision),
  **_perceptual(),
  "psnr": Entry("peak signal-to-noise ratio of reconstructions, in dB", "", _ORIGINALS,
                of_pictures.psnr),
  "ssim": Entry("structural similarity of reconstructions", "", _ORIGINALS, of_pictures.ssim),
  "codebook": Entry("share of a tokenizer's codes that are used, and their perplexity", "",
                    frozenset({"codes"}), of_pictures.codebook),
  "latents": Entry("of an autoencoder's latents: KL to the standard normal distribution in nats a "
                   "dimension, mean and standard deviation", "", frozenset({"latents"}),
                   of_pictures.latents),
}  # fmt: skip


def entry(name: str) -> Entry:
  """A metric's entry; UserError for an unknown name."""
  if name not in METRICS:
    raise unknown("metric", name, METRICS)
  return METRICS[name]


def reference_networks(names: Sequence[str], networks: Networks) -> dict[str, Features]:
  """By kind the networks in whose features some metrics need a reference, as they prepare pictures.

  Raises:
    UserError: as `make`, for unknown names and networks that are not at hand.
  """
  found = {}
  for name in names:
    if "reference" in entry(name).needs:
      found[entry(name).network] = _network(name, networks)
  return found


def make(
  names: Sequence[str], networks: Networks, references: Mapping[str, Reference] | None = None,
  seed: int = 0, options: Mapping[str, Any] | None = None,
) -> Scores:
  """Some metrics of one stream of pictures.

  Args:
    names: keys of `METRICS`.
    networks: what is at hand.
    references: by kind of the network that measured them.
    seed: of subsets, splits and mismatched captions.
    options: in place of `OPTIONS`.

  Raises:
    UserError: an unknown metric or option; no file of a metric's network; no reference that it
      needs, or one of another network.
  """
  settings = dict(OPTIONS)
  for name, value in (options or {}).items():
    if name not in OPTIONS:
      raise unknown("option of the metrics", name, OPTIONS)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
      raise UserError(f"option {name}={value!r} of the metrics: use a number of 1 or more")
    settings[name] = value
  making = Making(dict(references or {}), seed, settings)
  metrics = []
  for name in dict.fromkeys(names):
    features = _network(name, networks)
    if "reference" in entry(name).needs:
      _check_reference(name, making.references)
    metrics.append(entry(name).make(making, name, features))
  identity = {
    "metrics": sorted(metric.name for metric in metrics), "seed": seed, "options": settings,
    "networks": making.described,
    "references": {kind: reference.digest for kind, reference in making.references.items()},
  }  # fmt: skip
  return Scores(metrics, identity)


def _network(name: str, networks: Networks) -> Features | None:
  found = entry(name)
  if not found.network:
    return None
  if not networks.has(found.network):
    instead = f", or take {found.instead} with a feature_net export" if found.instead else ""
    raise UserError(f"{name} needs the network {found.network}, of which no file was given; give "
                    f"one{instead}")
  return networks.of(found.network, found.preprocessing)


def _check_reference(name: str, references: Mapping[str, Reference]) -> None:
  kind = METRICS[name].network
  if kind not in references:
    raise UserError(f"{name} needs a reference of real pictures in features of {kind}; measure one "
                    "or give its file")
  if "reference_rows" in METRICS[name].needs and references[kind].rows is None:
    raise UserError(f"{name} needs every reference picture's features, and the file has mean and "
                    f"covariance only; measure it again with --metric={name} --reference-only")
