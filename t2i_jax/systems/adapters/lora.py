"""Low-rank adaptation of any trained system (Hu et al. 2021, LoRA).

The system that is adapted is the component `base`, frozen; the adapters of its layers are a group
of their own, trained by the base's own loss. In all else the system is its base: what batches
bring, the text with its tokenizers, how pictures are drawn.
"""

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from t2i_jax.errors import UserError, unknown
from t2i_jax.networks.layers import lora
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Aux, Batch, Field, Player
from t2i_jax.systems.capabilities import ManyShapes
from t2i_jax.systems.checks import check_positive
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables

BASE, ADAPTERS, ALPHAS = "base", "adapters", "alphas"
NAMED = 3  # layers that an error quotes


@struct.dataclass
class Options:
  """Stands for the sampling options of the base, which only a system with its base knows."""


@dataclasses.dataclass(frozen=True, eq=False)
class LoRA(base.System):
  """See the module's docstring.

  Whatever method of the base takes variables (`condition`, `sample`, `finish`, `evaluation_loss`
  and others), this system has too, and computes it with the adapters on.

  Attributes:
    text: the base's; what the config says of the text is not read.
    rank: columns of `down` and rows of `up`.
    alpha: the adapters' product is multiplied by alpha / rank (section 4.1).
    groups: of the base's variables, in which layers are adapted.
    targets: which layers, as regular expressions of their paths; see `layers.lora.chosen`. The
      default, the projections of every attention, is section 4.2's.
    layers: (path, rank) of each adapted layer, in place of `groups`, `targets` and `rank`: what a
      file of adapters holds.
    dropout: probability of leaving out an input of an adapter, in training.
    components: `base`.
    dtype: type of the computation; the base has the same.
  """

  Options = Options
  text_of = BASE

  text: TextConditioner
  rank: int = 4
  alpha: float = 4.0
  groups: tuple[str, ...] = ("denoiser",)
  targets: tuple[str, ...] = (
    r"attention(_\d+)?/(query|key|value|out)$",
    r"/(image|text|second)(/(query|key|value)|_out)$",  # of the multimodal transformer
  )
  layers: tuple[tuple[str, int], ...] = ()
  dropout: float = 0.0
  components: Mapping[str, base.System] = dataclasses.field(default_factory=dict)
  dtype: Any = jnp.float32

  ema_groups = (ADAPTERS,)
  frozen_groups = (BASE,)

  def __post_init__(self):
    check_positive("model", self, "rank")
    if not 0.0 <= self.dropout < 1.0:
      raise UserError(f"model.dropout={self.dropout} is out of range; use 0 to below 1")
    if set(self.components) != {BASE}:
      raise UserError("lora adapts one trained system: set components.base=PATH of its export, and "
                      "no other component; to guide it, merge it first (python -m "
                      "t2i_jax.adapters merge)")
    self._check_base()
    if self.text is not self.adaptee.text and (self.text.frozen_groups or self.text.cache):
      raise UserError("the text of a lora run is that of components.base, its encoders included; "
                      "leave text.encoder and text.cache as they are")
    taken = {"text": self.adaptee.text, "Options": self.adaptee.Options}
    if isinstance(self.adaptee, ManyShapes):
      taken["shape_of"] = self.adaptee.shape_of
    for name, method in inspect.getmembers(type(self.adaptee), inspect.isfunction):
      known = name.startswith("_") or hasattr(type(self), name)
      if not known and "variables" in list(inspect.signature(method).parameters)[1:2]:
        taken[name] = functools.partial(self._call, name)
    for name, value in taken.items():
      object.__setattr__(self, name, value)

  def __getattr__(self, name: str) -> Any:
    """What else the base has, such as its resolution."""
    if name.startswith("__") or name == "components":
      raise AttributeError(name)
    return getattr(self.adaptee, name)

  def _check_base(self):
    kind = type(self.adaptee).__name__
    if isinstance(self.adaptee, LoRA):
      raise UserError("components.base is a lora itself; merge it first, with python -m "
                      "t2i_jax.adapters merge")
    if getattr(self.adaptee, "scan", False):
      raise UserError("components.base has stacked blocks, whose layers take no adapters; train it "
                      "with model.scan=False, or convert it with --apart")
    if len(self.adaptee.players) != 1 or self.adaptee.players[0].custom_gradients is not None:
      raise UserError(f"lora trains by the loss of the system that it adapts, and {kind} has "
                      f"{len(self.adaptee.players)} players; only a system of one player with one "
                      "loss can be adapted")

  @property
  def adaptee(self) -> base.System:
    """The system that is adapted."""
    return self.components[BASE]

  @property
  def labels(self) -> tuple[tuple[str, int], ...]:
    return self.adaptee.labels

  @property
  def players(self) -> tuple[Player, ...]:
    (player,) = self.adaptee.players
    return (
      Player(ADAPTERS, (ADAPTERS,), self.loss, couples_examples=player.couples_examples),
    )

  def batch_spec(self) -> dict[str, Field]:
    return self.adaptee.batch_spec()

  def ranks(self, params: Mapping[str, Any]) -> dict[str, int]:
    """The rank of each adapted layer of the base's parameters, by its path.

    Raises:
      UserError: for groups or layers that the base does not have, or none at all.
    """
    there = lora.kernels(params)
    if self.layers:
      for path, _ in self.layers:
        if path not in there:
          raise unknown("layer in model.layers", path, there)
      return dict(self.layers)
    found: list[str] = []
    for group in self.groups:
      if group not in params:
        raise unknown("group of components.base in model.groups", group, params)
      within = [path for path in there if path.startswith(f"{group}/")]
      chosen = lora.chosen(within, self.targets)
      if not chosen:
        raise UserError(f"model.targets={self.targets} are in no path of the {len(within)} layers "
                        f"of {group}, such as {', '.join(within[:NAMED])}")
      found += chosen
    return dict.fromkeys(found, self.rank)

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    params = frozen["params"][BASE]
    adapters = lora.init(fold_name(rng, ADAPTERS), params, self.ranks(params))
    alphas = jax.tree.map(
      lambda layer: {"alpha": jnp.float32(self.alpha)}, adapters, is_leaf=lambda x: "down" in x
    )
    return {"params": {ADAPTERS: adapters}, ALPHAS: {ADAPTERS: alphas}}

  def adapted(self, variables: Variables) -> dict[str, dict[str, Any]]:
    """The base's variables, the adapters in their networks' reach."""
    added = lora.scaled(variables["params"][ADAPTERS], variables[ALPHAS][ADAPTERS])
    return trees.merge(trees.group(variables, BASE), {lora.LORA: added})

  def merged(self, variables: Variables, factor: float = 1.0) -> dict[str, dict[str, Any]]:
    """The base's variables, the adapters' products times `factor` added to its kernels."""
    own = trees.group(variables, BASE)
    added = lora.scaled(variables["params"][ADAPTERS], variables[ALPHAS][ADAPTERS])
    return {**own, "params": lora.merge(own["params"], added, factor)}

  def loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """The base's loss; what the base would change of its collections it does not."""
    (player,) = self.adaptee.players
    used: set[str] = set()
    with lora.adapters_on(self.dropout, fold_name(rng, "adapter_dropout"), used):
      loss, aux = player.loss(self.adapted(variables), batch, rng, step)
    self._check_used(variables["params"][ADAPTERS], used)
    return loss, Aux(aux.metrics)

  def _check_used(self, adapters: Mapping[str, Any], used: set[str]) -> None:
    """Raises UserError where a kernel is of no layer that the loss computes with."""
    paths = jax.tree_util.tree_leaves_with_path(adapters, is_leaf=lambda x: "down" in x)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    # A network knows its layers' paths without the groups before them.
    idle = [
      path for path in paths
      if not any("/".join(path.split("/")[i:]) in used for i in range(1, path.count("/") + 1))
    ]
    if idle:
      raise UserError(f"model.targets: {len(idle)} of {len(paths)} adapted kernels are of no Dense "
                      f"or Conv that the loss computes with, such as {', '.join(idle[:NAMED])}; "
                      'leave them out with a pattern that begins with "!"')

  def _call(self, name: str, variables: Variables, *args: Any, **kwargs: Any) -> Any:
    with lora.adapters_on():
      return getattr(self.adaptee, name)(self.adapted(variables), *args, **kwargs)
