"""DINOv2's vision transformer (Oquab et al. 2023), for the Frechet distance in its features.

Stein et al. 2023 (Exposing flaws of generative model evaluation metrics) take the class token
behind the last norm, of ViT-L/14 on pictures of 224 px.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError
from t2i_jax.metrics.resize import apply_weights, torch_bicubic_weights
from t2i_jax.networks.layers.attention import MultiHeadAttention

Array = jax.Array
SIDE = 224
# ImageNet's, of values in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes, by transformers' names in comments.

  Attributes:
    width, layers, heads: hidden_size, num_hidden_layers, num_attention_heads.
    mlp: units of the MLPs.
    gated: use_swiglu_ffn, of the largest model.
    resolution, patch: image_size, of which the positions are, and patch_size.
    input_bias: qkv_bias.
    epsilon: layer_norm_eps.
  """

  width: int = 1024
  layers: int = 24
  heads: int = 16
  mlp: int = 4096
  gated: bool = False
  resolution: int = 518
  patch: int = 14
  input_bias: bool = True
  epsilon: float = 1e-6

  @classmethod
  def from_transformers(cls, given: Mapping[str, Any]) -> "Config":
    """Of a Dinov2Config as a dict; UserError for what is none that is known."""
    if given.get("model_type") != "dinov2":
      raise UserError(f"model_type is {given.get('model_type')!r}, not 'dinov2'")
    if given.get("hidden_act", "gelu") != "gelu":
      raise UserError(f"DINOv2 with hidden_act='{given['hidden_act']}' is not known, only with "
                      "gelu")
    width, gated = given.get("hidden_size", 768), bool(given.get("use_swiglu_ffn"))
    mlp = int(width * given.get("mlp_ratio", 4))
    if gated:
      mlp = (int(mlp * 2 / 3) + 7) // 8 * 8
    return cls(
      width, given.get("num_hidden_layers", 12), given.get("num_attention_heads", 12), mlp, gated,
      given.get("image_size", 224), given.get("patch_size", 14), given.get("qkv_bias", True),
      given.get("layer_norm_eps", 1e-6),
    )  # fmt: skip

  @property
  def title(self) -> str:
    """`vitl14`, or `width-layers` where it is none of the published sizes."""
    known = {(384, 12): "vits", (768, 12): "vitb", (1024, 24): "vitl", (1536, 40): "vitg"}
    name = known.get((self.width, self.layers), f"{self.width}-{self.layers}-")
    return f"{name}{self.patch}"


class DINOv2(nn.Module):
  """The class token behind the last norm.

  Attributes:
    config: sizes.
  """

  config: Config

  @nn.compact
  def __call__(self, images: Array) -> Array:
    """[B, H, W, 3], normalised, H and W multiples of the patch -> float32 [B, width].

    Positions are interpolated for other sizes than `config.resolution`, as transformers does.
    """
    config = self.config
    for side in images.shape[1:3]:
      if side % config.patch:
        raise UserError(f"DINOv2: a side of {side} px does not divide by {config.patch}")
    patch = (config.patch, config.patch)
    x = nn.Conv(config.width, patch, patch, "VALID", name="patches")(images)
    height, width = x.shape[1:3]
    x = x.reshape(len(x), -1, config.width)
    first = self.param("class", nn.initializers.zeros, (config.width,))
    x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, config.width)), x], axis=1)
    x = x + self._positions(height, width)
    for i in range(config.layers):
      x = Layer(config, name=f"layers_{i}")(x)
    return nn.LayerNorm(config.epsilon, name="norm_out")(x[:, 0])

  def _positions(self, height: int, width: int) -> Array:
    side = self.config.resolution // self.config.patch
    shape = (side * side + 1, self.config.width)
    positions = self.param("positions", nn.initializers.normal(0.02), shape)
    if (height, width) == (side, side):
      return positions
    grid = positions[1:].reshape(1, side, side, -1)
    rows, columns = (torch_bicubic_weights(side, wanted) for wanted in (height, width))
    grid = apply_weights(grid, rows, columns).reshape(height * width, -1)
    return jnp.concatenate([positions[:1], grid])


class Layer(nn.Module):
  """Attention and an MLP, each behind a norm and before a learned scale of its channels.

  Attributes:
    config: sizes.
  """

  config: Config

  @nn.compact
  def __call__(self, x: Array) -> Array:
    """[B, L, width] -> [B, L, width]."""
    config = self.config
    norm = lambda name: nn.LayerNorm(config.epsilon, name=name)  # noqa: E731
    scale = lambda name: self.param(name, nn.initializers.ones, (config.width,))  # noqa: E731
    y = MultiHeadAttention(config.heads, input_bias=config.input_bias, name="attention")(
      norm("norm_attention")(x)
    )
    x = x + scale("scale_attention") * y
    y = norm("norm_mlp")(x)
    if config.gated:
      y = nn.silu(nn.Dense(config.mlp, name="mlp_gate")(y)) * nn.Dense(config.mlp, name="mlp_in")(y)
    else:
      y = nn.gelu(nn.Dense(config.mlp, name="mlp_in")(y), approximate=False)
    return x + scale("scale_mlp") * nn.Dense(config.width, name="mlp_out")(y)
