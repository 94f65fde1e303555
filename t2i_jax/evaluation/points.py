"""What an evaluation draws: exports, and sampling options that are swept."""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from t2i_jax import assembly, export, guiding
from t2i_jax.errors import UserError, unknown
from t2i_jax.pipeline import Pipeline
from t2i_jax.sample import COMMON
from t2i_jax.systems import trees
from t2i_jax.systems.base import System
from t2i_jax.systems.capabilities import FirstStage, Sampler, require
from t2i_jax.values import typed


@dataclasses.dataclass(frozen=True)
class Model:
  """An export to evaluate, described before its numbers are read.

  Attributes:
    name: what tables call it.
    path: its folder.
    exported: what `export.read` gave, its variables left where they are.
    system: of its config.
    ema: whether its parameters are moving averages.
    parameters, frozen: numbers that were trained, and that came from components.
    digest: `export.fingerprint`, of its guide too, if it has one.
  """

  name: str
  path: str
  exported: export.Export
  system: System
  ema: bool
  parameters: int
  frozen: int
  digest: str

  @property
  def config(self):
    return self.exported.config

  @property
  def reconstructs(self) -> bool:
    """Whether it is a first stage, which encodes and decodes pictures rather than draw any."""
    return isinstance(self.system, FirstStage) and not isinstance(self.system, Sampler)


@dataclasses.dataclass(frozen=True)
class Point:
  """Pictures to draw with one export and one set of sampling options.

  Attributes:
    model: that draws.
    swept: the values of the options that are swept.
    options: all that are given to the sampler.
  """

  model: Model
  swept: dict[str, Any]
  options: dict[str, Any]

  @property
  def told(self) -> dict[str, Any]:
    """The options that are always said, and those that are not the system's defaults."""
    if not self.options:
      return {}
    defaults = {f.name: f.default for f in dataclasses.fields(self.model.system.Options)}
    return {name: value for name, value in self.options.items()
            if name in COMMON or value != defaults[name] or len(defaults) <= len(COMMON)}

  @property
  def label(self) -> str:
    """Its name and place in the sweep, in one line."""
    return " ".join([self.model.name, *(f"{k}={v}" for k, v in self.swept.items())])


def read_models(given: Sequence[str], guide: str = "", resolution: int = 0) -> list[Model]:
  """Exports as they are given, "DIR" or "NAME=DIR".

  Args:
    given: the exports.
    guide: another export, which steers them.
    resolution: of the pictures that first stages are to take; 0 for that of their training.

  Raises:
    UserError: for one that cannot be read, or neither draws nor reconstructs pictures, or two of
      one name.
  """
  models: list[Model] = []
  for text in given:
    name, path = _named(text)
    exported = export.read(path, stored="://" not in path)
    if guide:
      exported = guiding.guided(exported, guide)
    system = assembly.build_with(exported.config, exported.components)
    if not isinstance(system, FirstStage):
      require(system, Sampler, f"evaluating the pictures of --export={path}")
    assembly.check_fits(system, exported)
    if resolution:
      system = _resized(system, resolution, path)
    about = json.loads((epath.Path(path).expanduser() / export.CONFIG).read_text())
    digest = export.fingerprint(path) + (export.fingerprint(guide) if guide else "")
    sizes = {
      group: sum(math.prod(leaf.shape) for leaf in trees.flatten({group: tree}).values())
      for group, tree in exported.variables.get("params", {}).items()
    }
    frozen = sum(size for group, size in sizes.items() if group in system.frozen_groups)
    models.append(Model(
      name, path, exported, system, bool(about.get("ema", True)),
      sum(sizes.values()) - frozen, frozen, digest,
    ))
  for name in (names := [model.name for model in models]):
    if names.count(name) > 1:
      raise UserError(f"two exports are called '{name}'; name them: --export=NAME=DIR")
  return models


def _resized(system: System, resolution: int, path: str) -> System:
  """A first stage for pictures of another side; UserError for a side that it does not take."""
  if isinstance(system, Sampler):
    raise UserError(f"--resolution={resolution} is of first stages, and --export={path} draws "
                    "pictures; say their size by --option=height= and --option=width=, if it has "
                    "them")
  system.latent_shape(resolution)
  return dataclasses.replace(system, resolution=resolution)


def _named(text: str) -> tuple[str, str]:
  """A name and a path; that of a run's export is called as its work directory."""
  name, equals, path = text.partition("=")
  if equals and name and re.fullmatch(r"[\w.+-]+", name):
    return name, path
  parts = [part for part in epath.Path(text).parts if part not in ("/", "..", ".")]
  names = [part for part in parts if part != "export"] or parts or ["export"]
  return names[-1], text


def read_points(models: Sequence[Model], fixed: Sequence[dict[str, Any]],
                sweeps: Sequence[str]) -> list[Point]:
  """Every export at every point of the grid that `--sweep=NAME=V1,V2,...` span.

  Args:
    models: the exports.
    fixed: the sampling options of each where nothing is swept.
    sweeps: as they are given; the last varies fastest.

  Raises:
    UserError: for an option that a system does not have, a value of another type or given twice.
  """
  points = []
  for model, options in zip(models, fixed, strict=True):
    axes = [_axis(model, text) for text in sweeps]
    for name in (names := [name for name, _ in axes]):
      if names.count(name) > 1:
        raise UserError(f"--sweep={name} is given twice; put all values into one")
    for values in itertools.product(*(values for _, values in axes)):
      swept = dict(zip(names, values, strict=True)) if axes else {}
      points.append(Point(model, swept, {**options, **swept}))
  return points


def _axis(model: Model, text: str) -> tuple[str, list[Any]]:
  name, equals, given = text.partition("=")
  if not equals or not given:
    raise UserError(f"--sweep={text} is not NAME=V1,V2,...")
  if name == "ema":
    kind = "moving averages" if model.ema else "those of the last step, not averaged"
    raise UserError(
      f"--sweep=ema: an export holds one set of parameters, and those of {model.path} are {kind}; "
      "make another of the run with python -m t2i_jax.export (--no-ema), and give both as --export"
    )
  defaults = {f.name: f.default for f in dataclasses.fields(model.system.Options)}
  if name not in defaults:
    raise unknown(f"sampling option of {model.config.system}", name, defaults)
  values = [typed(f"sampling option {name}", part, defaults[name])
            for part in given.split(",")]
  if len(set(values)) < len(values):
    raise UserError(f"--sweep={text} has a value twice")
  return name, values


def check_points(points: Sequence[Point], mesh: Mesh, say: Callable[[str], None]) -> list[Point]:
  """The points that their systems draw; of several, refused ones are left out with a line.

  Nothing is compiled, and no numbers are read.

  Raises:
    UserError: all are refused.
  """
  pipelines: dict[str, Pipeline] = {}
  verdicts: dict[tuple, UserError | None] = {}
  for point in points:
    model, key = point.model, static_options(point)
    if model.name not in pipelines:
      exported = model.exported
      pipelines[model.name] = Pipeline(
        model.system, exported.tokenizers, mesh, config=exported.config
      )
    if key not in verdicts:
      shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.exported.variables
      )
      try:
        pipelines[model.name].check(shapes, **point.options)
        verdicts[key] = None
      except UserError as error:
        verdicts[key] = error
    if verdicts[key] is not None and len(points) > 1:
      say(f"warning: {point.label} left out: {verdicts[key]}")
  drawn = [point for point in points if verdicts[static_options(point)] is None]
  if not drawn:
    raise next(error for error in verdicts.values() if error is not None)
  return drawn


def static_options(point: Point) -> tuple:
  """What of a point decides which program is compiled."""
  fields = {f.name: f for f in dataclasses.fields(point.model.system.Options)}
  static = {name: value for name, value in point.options.items()
            if not fields[name].metadata.get("pytree_node", True)}
  return (point.model.name, *sorted(static.items()))
