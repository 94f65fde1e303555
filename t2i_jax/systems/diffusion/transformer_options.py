"""The transformer of a system, from the options that the system's fields are."""

import dataclasses
from typing import Any, TypeVar

import flax.linen as nn

from t2i_jax.errors import UserError, unknown
from t2i_jax.networks.layers.stack import REMATS
from t2i_jax.systems import base

Network = TypeVar("Network", bound=nn.Module)


def make_transformer(kind: type[Network], values: Any, **own: Any) -> Network:
  """The network of the options that `values` has as attributes, and those that are given."""
  names = {field.name for field in dataclasses.fields(kind)} - {"parent", "name", *own}
  return kind(**{name: getattr(values, name) for name in names if hasattr(values, name)}, **own)


def check_transformer(values: Any) -> None:
  """Raises UserError for options that make no network."""
  base.check_positive("model", values, "patch", "width", "depth", "heads")
  if values.mlp_ratio <= 0:
    raise UserError(f"model.mlp_ratio={values.mlp_ratio} is not positive; 4 is usual")
  if values.width % values.heads or values.width % 4:
    raise UserError(f"model.width={values.width} does not divide by model.heads={values.heads}, or "
                    "not by 4 (positions are sines and cosines of two coordinates); change one of "
                    "them")
  if values.remat not in REMATS:
    raise unknown("model.remat", values.remat, REMATS)
