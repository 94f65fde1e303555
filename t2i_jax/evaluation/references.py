"""Statistics of real pictures that drawn ones are compared with: measured once, or given."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from t2i_jax.data.base import digest_of
from t2i_jax.errors import UserError
from t2i_jax.evaluation.drawing import Progress
from t2i_jax.evaluation.folder import slug
from t2i_jax.evaluation.prompt_sets import real_pictures, rows_of
from t2i_jax.metrics.network import Features
from t2i_jax.metrics.reference import Reference
from t2i_jax.metrics.registry import INCEPTION, METRICS, Networks, reference_networks
from t2i_jax.parallel.distributed import agree_any, barrier, is_primary


@dataclasses.dataclass
class References:
  """Finds, or measures, the references of metrics.

  Attributes:
    given: of `--reference`: files of statistics, and at most one split.
    pictures: real pictures of a split to measure.
    networks: whose features they are of.
    batch_size: pictures at a time.
    folder: where what was measured is kept.
  """

  given: Sequence[str]
  pictures: int
  networks: Networks
  batch_size: int
  folder: epath.Path

  def __post_init__(self):
    self._files = {path: Reference.load(path) for path in self.given if path.endswith(".npz")}
    self._splits = [name for name in self.given if not name.endswith(".npz")]
    if len(self._splits) > 1:
      raise UserError(f"--reference names the splits {' and '.join(self._splits)}; name one")

  def of(
    self, names: Sequence[str], sources: Any, split: str, resolution: int
  ) -> dict[str, Reference]:
    """References by kind of network.

    Args:
      names: metrics that are to be computed.
      sources: opens splits, `of(split, resolution)`; and the `config` whose data set it is.
      split: whose pictures they are by default; "" for prompts of a file, which have none.
      resolution: of the pictures.

    Raises:
      UserError: there is none for a network, or a file is of another one.
    """
    networks = reference_networks(names, self.networks)
    found = self._by_kind(networks)
    for kind, network in networks.items():
      if kind in found:
        continue
      chosen = (self._splits or [split])[0]
      if not chosen:
        raise UserError(f"{', '.join(names)}: real pictures are compared with, and prompts of a "
                        "file have none; give --reference=SPLIT, or --reference=FILE.npz of their "
                        "statistics")
      rows = any(
        METRICS[name].network == kind and "reference_rows" in METRICS[name].needs for name in names
      )
      found[kind] = self._measured(kind, network, sources, chosen, resolution, rows)
    return found

  def _by_kind(self, networks: Mapping[str, Features]) -> dict[str, Reference]:
    """The files' statistics by kind of network."""
    found: dict[str, Reference] = {}
    for path, reference in self._files.items():
      # pytorch-fid's files, which say nothing, are Inception's.
      fitting = [
        kind for kind, network in networks.items()
        if (reference.about.get("network") == network.name if reference.about else
            kind == INCEPTION)
      ]
      if not fitting:
        theirs = reference.about.get("network", "Inception's features")
        ours = ", ".join(network.name for network in networks.values()) or "no network"
        raise UserError(f"--reference={path} is of {theirs}, and the metrics compare features of "
                        f"{ours}; leave it out, or name a metric of its network")
      found[fitting[0]] = reference
    return found

  def _measured(
    self, kind: str, network: Features, sources, split: str, resolution: int, rows: bool
  ) -> Reference:
    source, dataset = sources.of(split, resolution), sources.config.data.name
    count = self.pictures if source.infinite else min(self.pictures, len(source))
    about = f"{dataset}, split {split}, {count} pictures"
    options = sources.config.data.options.to_json_best_effort(sort_keys=True)
    how = digest_of(network.digest, network.preprocessing, source.digest(), options, rows,
                    rows_of(source, count).tobytes())[:12]
    name = slug(f"{dataset}_{split}_{resolution}_{count}_{kind}_{how}")
    path = self.folder / "references" / f"{name}.npz"
    # All hosts read it or all measure it, which they do together.
    if not agree_any(not path.exists()):
      try:
        return Reference.load(path)
      except UserError as error:
        logging.warning("%s: it is measured again", error)
    progress = Progress(f"{kind}, {dataset} {split}", "measured")
    progress.begin(count, 0)
    reference = Reference.measure(
      network, real_pictures(source, count, self.batch_size), about, rows, progress.reach
    )
    progress.end()
    if is_primary():
      path.parent.mkdir(parents=True, exist_ok=True)
      reference.save(path)
    barrier("referenced")
    return reference


def save(references: Mapping[str, Reference], path: str) -> list[str]:
  """Writes references to a file, or, of several networks, to one each; the names of the files."""
  names = []
  for kind, reference in references.items():
    names.append(path if len(references) == 1 else f"{path.removesuffix('.npz')}-{kind}.npz")
    file = epath.Path(names[-1]).expanduser()
    if is_primary():
      file.parent.mkdir(parents=True, exist_ok=True)
      reference.save(file)
  return names
