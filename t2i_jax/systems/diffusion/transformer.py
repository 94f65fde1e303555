"""What diffusion systems whose network is a transformer of patches share."""

import abc
import dataclasses
from functools import cached_property
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp

from t2i_jax.errors import UserError, unknown
from t2i_jax.networks.layers.stack import REMATS
from t2i_jax.systems import trees
from t2i_jax.systems.base import Array, Batch, Conditioning
from t2i_jax.systems.checks import check_positive
from t2i_jax.systems.diffusion import labels
from t2i_jax.systems.diffusion.denoiser import DENOISER
from t2i_jax.systems.diffusion.latent import LatentDenoiser
from t2i_jax.systems.trees import Variables


@dataclasses.dataclass(frozen=True, eq=False)
class TransformerDenoiser(LatentDenoiser):
  """Diffusion by a transformer of patches, in latents or, without a first stage, in pixels.

  Attributes (beside those of `LatentDenoiser`):
    patch, width, depth, heads, mlp_ratio, remat, scan: of `networks.patch_transformer`.

  Class attributes:
    Network: class of the network, whose other options are fields of the system too.
  """

  models_pixels: ClassVar[bool] = True
  Network: ClassVar[type[nn.Module]]

  patch: int = 2
  width: int = 1152
  depth: int = 28
  heads: int = 16
  mlp_ratio: float = 4.0
  remat: str = "none"
  scan: bool = True

  def __post_init__(self):
    check_positive("model", self, "patch", "width", "depth", "heads")
    if self.mlp_ratio <= 0:
      raise UserError(f"model.mlp_ratio={self.mlp_ratio} is not positive; 4 is usual")
    if self.width % self.heads or self.width % 4:
      raise UserError(f"model.width={self.width} does not divide by model.heads={self.heads}, or "
                      "not by 4 (positions are sines and cosines of two coordinates); change one "
                      "of them")
    if self.remat not in REMATS:
      raise unknown("model.remat", self.remat, REMATS)
    super().__post_init__()

  @property
  def unit(self) -> int:
    return self.patch

  @property
  def unit_is(self) -> str:
    return "model.patch"

  @cached_property
  def network(self) -> nn.Module:
    return self.Network(**self.network_options())

  def network_options(self) -> dict[str, Any]:
    """The network's attributes: the system's fields of the same names, and what follows."""
    names = {field.name for field in dataclasses.fields(self.Network)} - {"parent", "name"}
    own = {name: getattr(self, name) for name in names if hasattr(self, name)}
    return {**own, "out_channels": self.shape[-1] * self.outputs}

  @abc.abstractmethod
  def arguments(self, given: Conditioning) -> dict[str, Array | None]:
    """What the network reads of the conditioning, by the names of its arguments."""

  def init_denoiser(self, rng: Array, x: Array, given: Conditioning) -> Variables:
    return self.network.init(rng, x, jnp.zeros(len(x)), **self.arguments(given))

  def output(
    self, variables: Variables, x: Array, t: Array, given: Conditioning, **kwargs: Any
  ) -> Array:
    own = trees.group(variables, DENOISER)
    return self.network.apply(own, x, t, **self.arguments(given), **kwargs)


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledTransformer(labels.Labelled, TransformerDenoiser):
  """The same of a network that may be told labels, in place of a text or beside it."""

  def network_options(self) -> dict[str, Any]:
    return {**super().network_options(), "classes": labels.rows_of(self.classes)}

  def given(
    self, variables: Variables, batch: Batch, rng: Array | None = None
  ) -> Conditioning:
    return labels.trained(self, super().given(variables, batch, rng), batch, rng)
