"""CLIP: two towers (Radford et al. 2021, section 2.4), as OpenAI and OpenCLIP trained them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError
from t2i_jax.networks.layers.embeddings import timestep_embedding
from t2i_jax.text.layers import ACTIVATIONS, EPSILON, AdaptiveNorm, PreNormLayer

Array = jax.Array
normal = nn.initializers.normal(0.02)
# Of the pictures that OpenAI and OpenCLIP trained on, by channel, values in [0, 1].
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)


def prepared(images: Array, resolution: int) -> Array:
  """Pictures [B, H, W, 3] in [-1, 1] as the vision tower takes them, [B, R, R, 3], float32."""
  images = images.astype(jnp.float32)
  if images.shape[1:3] != (resolution, resolution):
    shape = (len(images), resolution, resolution, images.shape[-1])
    images = jax.image.resize(images, shape, "cubic")
  return ((images + 1) / 2 - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)


@dataclasses.dataclass(frozen=True)
class TowerConfig:
  """Sizes of one tower, by transformers' names in comments.

  Attributes:
    width: hidden_size.
    layers: num_hidden_layers.
    heads: num_attention_heads.
    mlp: intermediate_size.
    activation: hidden_act.
    projection: projection_dim, the size of the space that both towers share.
  """

  width: int
  layers: int
  heads: int
  mlp: int
  activation: str = "quick_gelu"
  projection: int = 512

  @classmethod
  def read(cls, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that every tower has, of transformers' config."""
    names = {"width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
             "mlp": "intermediate_size", "activation": "hidden_act", "projection": "projection_dim"}
    fields = {ours: given[theirs] for ours, theirs in names.items() if theirs in given}
    if fields.get("activation", "gelu") not in ACTIVATIONS:
      raise UserError(f"CLIP with hidden_act='{fields['activation']}' is not known; one of "
                      f"{', '.join(ACTIVATIONS)}")
    if given.get("layer_norm_eps", EPSILON) != EPSILON:
      raise UserError(f"CLIP with layer_norm_eps={given['layer_norm_eps']} is not known, only with "
                      f"{EPSILON}")
    return fields


@dataclasses.dataclass(frozen=True)
class TextConfig(TowerConfig):
  """The text tower.

  Attributes:
    vocab_size, length: of the tokenizer.
    end: id of the end-of-text token, whose first occurrence gives the pooled vector.
  """

  vocab_size: int = 49408
  length: int = 77
  end: int = 49407

  @classmethod
  def from_transformers(cls, given: Mapping[str, Any]) -> "TextConfig":
    """Of `text_config` of a CLIPConfig, or of a CLIPTextConfig, as a dict."""
    end = given.get("eos_token_id", 49407)
    vocab = given.get("vocab_size", 49408)
    # Configs from before transformers 4.31 say 2, which is not the id that the tokenizer gives.
    return cls(
      **cls.read({"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8,
                  "intermediate_size": 2048, "hidden_act": "quick_gelu", **given}),
      vocab_size=vocab, length=given.get("max_position_embeddings", 77),
      end=vocab - 1 if end == 2 else end,
    )  # fmt: skip


def published_of_open_clip(
  shapes: Mapping[str, tuple[int, ...]], activation: str, heads: int = 0
) -> dict[str, Any]:
  """What transformers would write as the config of a text tower under OpenCLIP's names.

  Args:
    shapes: of the tensors.
    activation: "quick_gelu" for OpenAI's models, "gelu" for most of OpenCLIP's.
    heads: of the attention; one for each 64 channels if 0.

  Raises:
    UserError: a tensor without which there is no tower is missing.
  """
  needed = ("token_embedding.weight", "positional_embedding", "text_projection",
            "transformer.resblocks.0.mlp.c_fc.weight")  # fmt: skip
  missing = [name for name in needed if name not in shapes]
  if missing:
    raise UserError(f"these are no weights of CLIP under OpenAI's or OpenCLIP's names: "
                    f"{', '.join(missing)} missing")
  wrong = [name for name in needed if len(shapes[name]) != 2 or 0 in shapes[name]]
  if wrong:
    raise UserError(f"these are no weights of CLIP: {wrong[0]} has the shape "
                    f"{list(shapes[wrong[0]])}")
  vocab, width = shapes["token_embedding.weight"]
  layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.resblocks.")}
  return {
    "model_type": "clip_text_model", "hidden_size": width, "num_hidden_layers": len(layers),
    "num_attention_heads": heads or max(width // 64, 1),
    "intermediate_size": shapes[needed[3]][0], "hidden_act": activation, "vocab_size": vocab,
    "max_position_embeddings": shapes["positional_embedding"][0],
    # The markers are the last of the vocabulary.
    "bos_token_id": vocab - 2, "eos_token_id": vocab - 1,
    "projection_dim": shapes["text_projection"][1], "layer_norm_eps": EPSILON,
  }


@dataclasses.dataclass(frozen=True)
class VisionConfig(TowerConfig):
  """The vision tower.

  Attributes:
    resolution: side of the pictures, image_size.
    patch: side of a patch, patch_size.
  """

  resolution: int = 224
  patch: int = 32

  @classmethod
  def from_transformers(cls, given: Mapping[str, Any]) -> "VisionConfig":
    """Of `vision_config` of a CLIPConfig, or of a CLIPVisionConfig, as a dict."""
    return cls(
      **cls.read({"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                  "intermediate_size": 3072, "hidden_act": "quick_gelu", **given}),
      resolution=given.get("image_size", 224), patch=given.get("patch_size", 32),
    )  # fmt: skip


# Published sizes: the text towers of Stable Diffusion 1 (OpenAI's L), 2 (OpenCLIP's H, of which it
# runs all layers but the last) and XL (L and OpenCLIP's bigG).
TEXT = {
  "B": TextConfig(512, 12, 8, 2048),
  "L": TextConfig(768, 12, 12, 3072, projection=768),
  "H": TextConfig(1024, 24, 16, 4096, "gelu", 1024),
  "bigG": TextConfig(1280, 32, 20, 5120, "gelu", 1280),
}
VISION = {
  "B/32": VisionConfig(768, 12, 12, 3072),
  "B/16": VisionConfig(768, 12, 12, 3072, patch=16),
  "L/14": VisionConfig(1024, 24, 16, 4096, projection=768, patch=14),
  "H/14": VisionConfig(1280, 32, 16, 5120, "gelu", 1024, patch=14),
  "bigG/14": VisionConfig(1664, 48, 16, 8192, "gelu", 1280, patch=14),
}


def _layer(config: TowerConfig, i: int, dtype: jnp.dtype) -> PreNormLayer:
  return PreNormLayer(
    config.heads, config.mlp, config.activation, dtype=dtype, name=f"layers_{i}"
  )


class CLIPText(nn.Module):
  """The text tower: a causal transformer.

  Attributes:
    config: sizes.
    layer: whose output is the sequence, counted as transformers' `hidden_states`: 0 are the
      embeddings, -1 the last layer, -2 the one before it. Layers above it are not run unless the
      pooled vector is wanted.
    final_norm: whether the sequence passes the norm behind the last layer: Stable Diffusion 1 and 2
      want it, SDXL and SD3 do not.
    pool: whether the pooled vector is computed, always of the last layer.
    project: whether there is a projection of it to the space shared with pictures.
    dtype: type of the computation; norms' statistics and the softmax are float32.
  """

  config: TextConfig
  layer: int = -1
  final_norm: bool = True
  pool: bool = True
  project: bool = True
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: Array, mask: Array | None = None) -> tuple[Array, Array | None]:
    """ids int [B, L], mask bool [B, L] -> sequence [B, L, width], pooled [B, P].

    `mask` is of tokens that may be attended to; None, as in Stable Diffusion, attends to padding.
    Pooled is of the first end-of-text token, or the last one of a row without any; its size is
    `config.projection` with a projection and `width` without, and it is None unless `pool`.
    """
    config = self.config
    chosen = self.layer % (config.layers + 1)
    if not -config.layers - 1 <= self.layer <= config.layers:
      raise UserError(f"CLIP's text encoder has {config.layers} layers; there is no {self.layer}")
    x = nn.Embed(config.vocab_size, config.width, embedding_init=normal, name="tokens")(ids)
    x = x + self.param("positions", normal, (config.length, config.width))[: ids.shape[1]]
    x = x.astype(self.dtype)
    allowed = jnp.tril(jnp.ones((ids.shape[1],) * 2, bool))[None, None]
    if mask is not None:
      allowed = allowed & mask[:, None, None, :]
    sequence = x
    for i in range(config.layers if self.pool else chosen):
      x = _layer(config, i, self.dtype)(x, allowed)
      if i + 1 == chosen:
        sequence = x
    norm = nn.LayerNorm(EPSILON, dtype=self.dtype, name="norm_out")
    pooled = None
    if self.pool:
      is_end = ids == config.end
      end = jnp.where(jnp.any(is_end, axis=1), jnp.argmax(is_end, axis=1), ids.shape[1] - 1)
      pooled = norm(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])
      if self.project:
        pooled = nn.Dense(
          config.projection, use_bias=False, dtype=self.dtype, kernel_init=normal,
          name="projection",
        )(pooled)  # fmt: skip
    return norm(sequence) if self.final_norm else sequence, pooled


class CLIPVision(nn.Module):
  """The vision tower: a ViT with a norm before its first layer.

  With times it is one for noised pictures (Liu et al. 2021, section 3.3): an embedding of the time
  scales and shifts what every norm gives, by nothing before it is trained.

  Attributes:
    config: sizes.
    project: whether the pooled vector is projected to the space shared with captions.
    time_width: of the sinusoidal embedding of times; the trained one has four times as many units.
    dtype: type of the computation.
  """

  config: VisionConfig
  project: bool = True
  time_width: int = 128
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, images: Array, t: Array | None = None) -> tuple[Array, Array]:
    """images [B, R, R, 3], normalised by CLIP's mean and deviation -> sequence, pooled.

    The sequence [B, 1 + patches, width] is the last layer's output, the class token first, without
    the last norm; pooled [B, P] is the class token behind it. Times are [B], or None for clean
    pictures. Every layer's output is sown as the intermediate `layers`.
    """
    config = self.config
    if images.shape[1:3] != (config.resolution, config.resolution):
      raise UserError(f"CLIP's vision tower takes pictures of {config.resolution} px, these are "
                      f"{images.shape[2]}x{images.shape[1]}")
    embedding = None if t is None else self._embedded(t)
    norm = lambda name: AdaptiveNorm(dtype=self.dtype, name=name)  # noqa: E731
    patch = (config.patch, config.patch)
    x = nn.Conv(
      config.width, patch, patch, "VALID", use_bias=False, dtype=self.dtype, kernel_init=normal,
      name="patches",
    )(images)  # fmt: skip
    x = x.reshape(len(x), -1, config.width)
    first = self.param("class", normal, (config.width,)).astype(self.dtype)
    x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, config.width)), x], axis=1)
    x = x + self.param("positions", normal, (x.shape[1], config.width)).astype(self.dtype)
    x = norm("norm_in")(x, embedding)
    for i in range(config.layers):
      x = _layer(config, i, self.dtype)(x, embedding=embedding)
      self.sow("intermediates", "layers", x)
    pooled = norm("norm_out")(x[:, 0], embedding)
    if self.project:
      pooled = nn.Dense(
        config.projection, use_bias=False, dtype=self.dtype, kernel_init=normal, name="projection"
      )(pooled)
    return x, pooled

  def _embedded(self, t: Array) -> Array:
    """[B] -> [B, 4 time_width], through the activation that its readers want."""
    dense = lambda name: nn.Dense(4 * self.time_width, dtype=self.dtype, name=name)  # noqa: E731
    e = timestep_embedding(t, self.time_width).astype(self.dtype)
    return nn.silu(dense("time_out")(nn.silu(dense("time_in")(e))))


class CLIP(nn.Module):
  """Both towers and the temperature of their cosine similarities.

  Attributes:
    text_config, vision_config: sizes.
    dtype: type of the computation.
  """

  text_config: TextConfig
  vision_config: VisionConfig
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.text = CLIPText(self.text_config, dtype=self.dtype)
    self.vision = CLIPVision(self.vision_config, dtype=self.dtype)
    self.logit_scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

  def __call__(self, images: Array, ids: Array, mask: Array | None = None) -> Array:
    """Logits [pictures, captions]: scaled cosine similarities, float32."""
    return jnp.exp(self.logit_scale) * self.embed_images(images) @ self.embed_text(ids, mask).T

  def embed_images(self, images: Array) -> Array:
    """images [B, R, R, 3] -> unit vectors [B, P], float32."""
    return unit(self.vision(images)[1])

  def embed_text(self, ids: Array, mask: Array | None = None) -> Array:
    """ids int [B, L], mask bool [B, L] -> unit vectors [B, P], float32."""
    return unit(self.text(ids, mask)[1])


def unit(x: Array) -> Array:
  """Vectors [B, P] of length 1, float32."""
  x = x.astype(jnp.float32)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
