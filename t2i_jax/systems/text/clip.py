"""CLIP, trained: pictures and their captions are brought together, and others apart.

Radford et al. 2021, section 2.3 and figure 3 (the symmetric cross-entropy over a batch), section
2.5 (the temperature, learned, and at most 100). Its export is the component `clip` of others.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from t2i_jax.errors import UserError, unknown
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Aux, Batch, Conditioning, Field, Player
from t2i_jax.systems.checks import check_positive
from t2i_jax.systems.conditioning import GROUP, TextConditioner
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.trees import NO_VARIABLES, Variables
from t2i_jax.text import clip
from t2i_jax.text.layers import ACTIVATIONS
from t2i_jax.text.tokenizer import END, PAD, START

TOWERS = "towers"
LARGEST_SCALE = math.log(100.0)


@dataclasses.dataclass(frozen=True, eq=False)
class CLIP(base.System):
  """Both towers; see the module's docstring.

  Attributes:
    text: of the config; `length`, `vocab_size`, `width`, `layers` and `heads` are the text tower's.
    resolution, patch: of the vision tower, in pixels.
    width, layers, heads: of the vision tower.
    projection: size of the space that both share.
    activation: of both; MLPs are four times as wide as their tower.
    end: id of the token whose features are the caption's; a tokenizer that was trained on the
      captions has 2, OpenAI's 49407.
    start, pad: ids of the other tokens that are no text.
    mlp: units of the vision tower's MLPs, where they are not four times its width; 0 if they are.
    dtype: type of the computation.
  """

  text: TextConditioner
  resolution: int = 224
  patch: int = 32
  width: int = 768
  layers: int = 12
  heads: int = 12
  projection: int = 512
  activation: str = "quick_gelu"
  end: int = END
  start: int = START
  pad: int = PAD
  mlp: int = 0
  dtype: Any = jnp.float32

  ema_groups = (TOWERS,)

  def __post_init__(self):
    check_positive(
      "model", self, "resolution", "patch", "width", "layers", "heads", "projection"
    )
    if self.activation not in ACTIVATIONS:
      raise unknown("model.activation", self.activation, ACTIVATIONS)
    if self.mlp < 0:
      raise UserError(f"model.mlp={self.mlp} is no number of units; 0 is four times model.width")
    if self.resolution % self.patch:
      raise UserError(f"model.patch={self.patch} does not divide model.resolution="
                      f"{self.resolution}; change one of them")
    for section, values in (("model", self), ("text", self.text)):
      if values.width % values.heads:
        raise UserError(f"{section}.heads={values.heads} does not divide {section}.width="
                        f"{values.width}; change one of them")
    if self.text.encoder != "transformer":
      raise UserError(f"clip trains its own text tower, and text.encoder is {self.text.encoder}; "
                      "set it to transformer")

  @cached_property
  def network(self) -> clip.CLIP:
    text = self.text
    shared = {"activation": self.activation, "projection": self.projection}
    return clip.CLIP(
      clip.TextConfig(
        text.width, text.layers, text.heads, 4 * text.width, vocab_size=text.vocab_size,
        length=text.length, end=self.end, **shared,
      ),
      self.vision, self.dtype,
    )  # fmt: skip

  @cached_property
  def vision(self) -> clip.VisionConfig:
    """The vision tower's sizes."""
    return clip.VisionConfig(
      self.width, self.layers, self.heads, self.mlp or 4 * self.width, self.activation,
      self.projection, self.resolution, self.patch,
    )  # fmt: skip

  @property
  def players(self) -> tuple[Player, ...]:
    return (Player("clip", (TOWERS,), self.loss, couples_examples="exact"),)

  def batch_spec(self) -> dict[str, Field]:
    image = Field((self.resolution, self.resolution, 3), "uint8")
    return {"image": image, **self.text.batch_spec()}

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    images = self._images(batch)[:1]
    ids = batch["text"][GROUP]["ids"][:1]
    return trees.as_group(TOWERS, self.network.init(fold_name(rng, TOWERS), images, ids))

  def loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """The mean of both cross-entropies, of captions for pictures and of pictures for captions."""
    terms = {name: jnp.mean(value) for name, value in self._terms(variables, batch).items()}
    scale = variables["params"][TOWERS]["logit_scale"]
    return terms["contrastive"], Aux({**terms, "scale": jnp.exp(scale)})

  def evaluation_loss(self, variables: Variables, batch: Batch, rng: Array) -> dict[str, Array]:
    """The loss in nats, and whether the nearest caption of the batch is the picture's own, [B]."""
    return self._terms(variables, batch)

  def embed_images(self, variables: Variables, images: Array) -> Array:
    """Unit vectors [B, projection], float32, of pictures [B, H, W, 3] in [-1, 1]."""
    images = clip.prepared(images, self.resolution)
    return self._apply(variables, images, method="embed_images")

  def embed_text(self, variables: Variables, text: Mapping[str, Array]) -> Array:
    """Unit vectors [B, projection], float32, of `ids` [B, L]."""
    return self._apply(variables, text["ids"], method="embed_text")

  def encode(self, variables: Variables, text: Mapping[str, Array]) -> Conditioning:
    """The text tower's features, for systems that take it as their text encoder."""
    sequence, pooled = self._apply(
      variables, text["ids"], method=lambda network, ids: network.text(ids)
    )
    return Conditioning(sequence=sequence, mask=text["mask"], pooled=pooled)

  def null_text(self) -> Mapping[str, Any]:
    """`ids` and `mask` [L] of the empty caption."""
    ids = np.full((self.text.length,), self.pad, np.int32)
    ids[:2] = self.start, self.end
    return {"ids": ids, "mask": np.arange(self.text.length) < 2}

  def _terms(self, variables: Variables, batch: Batch) -> dict[str, Array]:
    images = self._apply(variables, self._images(batch), method="embed_images")
    text = self.embed_text(variables, batch["text"][GROUP])
    scale = jnp.exp(jnp.minimum(variables["params"][TOWERS]["logit_scale"], LARGEST_SCALE))
    logits = scale * images @ text.T
    return {
      "contrastive": matching(logits),
      "accuracy": (jnp.argmax(logits, 1) == jnp.arange(len(logits))).astype(jnp.float32),
    }

  def _images(self, batch: Batch) -> Array:
    return clip.prepared(normalize_images(batch["image"]), self.resolution)

  def _apply(self, variables: Variables, *given: Array, method: Any) -> Any:
    return self.network.apply(trees.group(variables, TOWERS), *given, method=method)


def matching(logits: Array) -> Array:
  """Row i is to be told by column i, and column i by row i: mean cross-entropies [B]."""
  own = jnp.arange(len(logits))
  cost = optax.softmax_cross_entropy_with_integer_labels
  return (cost(logits, own) + cost(logits.T, own)) / 2
