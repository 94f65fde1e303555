"""CLIP's image encoder for noised pictures, which makes a denoiser obey a text or a picture.

Liu et al. 2021 (More Control for Free! Image Synthesis with Semantic Diffusion Guidance): section
3.2, guidance by a text and by a picture's meaning, structure and style; section 3.3, the encoder,
conditioned on the time, is trained to see in noised pictures what CLIP sees in clean ones, for
which no captions are needed.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.diffusion.process import DiscreteProcess
from t2i_jax.diffusion.schedules import make_process
from t2i_jax.diffusion.timesteps import stratified
from t2i_jax.errors import UserError, unknown
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Array, Aux, Batch, Conditioning, Field, Player
from t2i_jax.systems.checks import check_positive
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.guides.times import by_quarter
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.randomness import fold_name
from t2i_jax.systems.text.clip import CLIP, TOWERS, matching
from t2i_jax.systems.trees import NO_VARIABLES, Variables
from t2i_jax.text import clip

ENCODER = "image_encoder"
COMPONENT = "clip"
# What `Conditioning.extra` holds of the guide: the prompts' embeddings [B, P]; pictures to be like
# [B, H, W, 3] in [-1, 1]; weights [B, 4] in place of the config's, in the order of `WEIGHTS`.
TEXT, IMAGE, GIVEN_WEIGHTS = "guide_text", "guide_image", "guide_weights"
WEIGHTS = ("text_weight", "semantic_weight", "style_weight", "content_weight")
KINDS = tuple(name.removesuffix("_weight") for name in WEIGHTS)


@dataclasses.dataclass(frozen=True, eq=False)
class SemanticGuidance(base.System):
  """See the module's docstring.

  Attributes:
    text: with the frozen CLIP as its encoder.
    resolution: side of the pictures, in pixels; CLIP is given them in its own.
    schedule, steps: of the process, as of the denoiser that it is to guide.
    time_width: of the embedding of times.
    scale: of the cosines that are to match in training.
    text_weight: of the cosine of picture and text.
    semantic_weight: of the cosine of picture and reference; where a reference is given and no
      weight is of it, `text_weight`'s.
    style_weight: of the squared difference of the Gram matrices of all layers.
    content_weight: of the squared difference of the features of all layers, place by place.
    dtype: type of the computation.
  """

  text: TextConditioner
  resolution: int = 256
  schedule: str = "linear"
  steps: int = 1000
  time_width: int = 128
  scale: float = 100.0
  text_weight: float = 100.0
  semantic_weight: float = 0.0
  style_weight: float = 0.0
  content_weight: float = 0.0
  dtype: Any = jnp.float32

  ema_groups = (ENCODER,)

  def __post_init__(self):
    check_positive("model", self, "resolution", "time_width")
    given = self.text.components.get(COMPONENT)
    if self.text.encoder != "component" or self.text.names != (COMPONENT,):
      raise UserError("semantic_guidance fine-tunes a CLIP: set text.encoder=component and "
                      f"text.encoders={COMPONENT}")
    if given is not None and not isinstance(given, CLIP):
      raise UserError(f"components.{COMPONENT} is a {type(given).__name__}, and semantic_guidance "
                      "fine-tunes a CLIP of both towers, such as configs/clip.py trains")
    self.process  # noqa: B018

  @cached_property
  def process(self):
    return make_process(self.schedule, self.steps)

  @property
  def clean_clip(self) -> CLIP:
    return self.text.components[COMPONENT]

  @cached_property
  def network(self) -> clip.CLIPVision:
    return clip.CLIPVision(self.clean_clip.vision, time_width=self.time_width, dtype=self.dtype)

  @property
  def players(self) -> tuple[Player, ...]:
    return (Player(ENCODER, self.ema_groups, self.loss, couples_examples="exact"),)

  @property
  def frozen_groups(self) -> tuple[str, ...]:
    return self.text.frozen_groups

  def batch_spec(self) -> dict[str, Field]:
    return {"image": Field((self.resolution, self.resolution, 3), "uint8")}

  def init(
    self, rng: Array, batch: Batch, frozen: Variables = NO_VARIABLES
  ) -> dict[str, dict[str, Any]]:
    """CLIP's own vision tower, and times that do nothing yet."""
    images = clip.prepared(normalize_images(batch["image"][:1]), self.clean_clip.resolution)
    fresh = self.network.init(fold_name(rng, ENCODER), images, jnp.zeros(1))["params"]
    theirs = trees.group(frozen, COMPONENT)["params"][TOWERS]["vision"]
    return {"params": {ENCODER: _started(fresh, theirs)}}

  def loss(self, variables: Variables, batch: Batch, rng: Array, step: Array):
    """Each noised picture is to be told from the others by what CLIP sees in the clean ones."""
    terms, u = self._terms(variables, batch, rng)
    values = {name: jnp.mean(value) for name, value in terms.items()}
    return values["contrastive"], Aux({**values, **by_quarter("cosine", terms["cosine"], u)})

  def evaluation_loss(self, variables: Variables, batch: Batch, rng: Array) -> dict[str, Array]:
    """The loss in nats, the cosine with the clean picture, and whether it is the nearest, [B]."""
    return self._terms(variables, batch, rng)[0]

  def references(
    self, image: np.ndarray | None, weights: Mapping[str, float]
  ) -> dict[str, np.ndarray]:
    """See `PictureGuide`; the weights are of `text`, `semantic`, `style` and `content`."""
    side = self.resolution
    if image is not None and image.shape != (side, side, 3):
      raise UserError(f"the guide's picture is {'x'.join(map(str, image.shape))}, and it sees "
                      f"{side}x{side}x3; resize it")
    for kind, weight in weights.items():
      if kind not in KINDS:
        raise unknown("kind of likeness", kind, KINDS)
      if not math.isfinite(weight):
        raise UserError(f"the guide's weight {kind}={weight} is no finite number")
    chosen = {kind: getattr(self, name) for kind, name in zip(KINDS, WEIGHTS, strict=True)}
    chosen |= weights
    of_picture = any(chosen[kind] for kind in KINDS[1:])
    if image is None:
      if of_picture:
        raise UserError("the guide's weights of likeness to a picture ("
                        f"{', '.join(kind for kind in KINDS[1:] if chosen[kind])}) have none to be "
                        "like; give a picture too")
    elif not of_picture and "semantic" not in weights:
      chosen["semantic"] = self.text_weight
    given = {"weights": np.array([[chosen[kind] for kind in KINDS]], np.float32)}
    return given if image is None else {**given, "image": image[None]}

  def read(self, variables: Variables, batch: Batch) -> dict[str, Array]:
    """CLIP's embeddings of prompts; the picture and the weights of `references`."""
    extra = {TEXT: self.clean_clip.embed_text(trees.group(variables, COMPONENT), batch["text"])}
    if "image" in batch:
      extra[IMAGE] = normalize_images(batch["image"])
    if "weights" in batch:
      extra[GIVEN_WEIGHTS] = batch["weights"]
    return extra

  def log_prob(
    self, variables: Variables, x_t: Array, t: Array, conditioning: Conditioning
  ) -> Array:
    """The weighted likeness of noised pictures to their text and reference, [B].

    Section 3.2, without the constant that would make it a logarithm of a probability.

    Args:
      variables: of this system.
      x_t: noised pictures [B, H, W, 3].
      t: [B], times of the process; they may be fractional.
      conditioning: see `TEXT`, `IMAGE` and `GIVEN_WEIGHTS`; with neither text nor picture it is 0.
    """
    extra = conditioning.extra
    weights = extra.get(GIVEN_WEIGHTS)
    if weights is None:
      weights = jnp.array([[getattr(self, name) for name in WEIGHTS]])
    text_weight, semantic, style, content = weights.astype(jnp.float32).T
    total = jnp.zeros(len(x_t))
    if TEXT not in extra and IMAGE not in extra:
      return total
    seen, layers = self._features(variables, x_t, t)
    if TEXT in extra:
      total += text_weight * jnp.sum(seen * extra[TEXT], axis=-1)
    if IMAGE in extra:
      reference = jax.lax.stop_gradient(self._noised(extra[IMAGE], t))
      wanted, their_layers = self._features(variables, reference, t)
      total += semantic * jnp.sum(seen * wanted, axis=-1)
      for ours, theirs in zip(layers, their_layers, strict=True):
        total -= style * jnp.sum(jnp.square(gram(ours) - gram(theirs)), axis=(1, 2))
        total -= content * jnp.mean(jnp.square(ours - theirs), axis=(1, 2))
    return total

  def _terms(
    self, variables: Variables, batch: Batch, rng: Array
  ) -> tuple[dict[str, Array], Array]:
    """Each example's terms [B], and where in [0, 1) its time lies."""
    x_0 = normalize_images(batch["image"])
    u = stratified(fold_name(rng, "time"), len(x_0))
    t = self.process.time(u)
    noise = jax.random.normal(fold_name(rng, "noise"), x_0.shape)
    seen, _ = self._features(variables, self.process.corrupt(x_0, noise, t), t)
    clean = self.clean_clip.embed_images(trees.group(variables, COMPONENT), x_0)
    logits = self.scale * seen @ jax.lax.stop_gradient(clean).T
    terms = {
      "contrastive": matching(logits),
      "cosine": jnp.diagonal(logits) / self.scale,
      "accuracy": (jnp.argmax(logits, axis=1) == jnp.arange(len(x_0))).astype(jnp.float32),
    }
    return terms, u

  def _features(
    self, variables: Variables, x: Array, t: Array
  ) -> tuple[Array, tuple[Array, ...]]:
    """Unit vectors [B, P], and the features of each layer's patches [B, T, C], float32."""
    (_, pooled), state = self.network.apply(
      trees.group(variables, ENCODER), clip.prepared(x, self.clean_clip.resolution),
      self.process.embedded(t), mutable="intermediates",
    )
    layers = (layer[:, 1:].astype(jnp.float32) for layer in state["intermediates"]["layers"])
    return clip.unit(pooled), tuple(layers)

  def _noised(self, images: Array, t: Array) -> Array:
    """References [B, H, W, 3] at times [B]: at one time always with the same noise."""
    bits = jax.lax.bitcast_convert_type(t.astype(jnp.float32), jnp.uint32)
    draw = lambda bits: jax.random.normal(  # noqa: E731
      jax.random.fold_in(jax.random.key(0), bits), images.shape[1:]
    )
    if isinstance(self.process, DiscreteProcess):
      t = jnp.round(t).astype(jnp.int32)
    return self.process.corrupt(images, jax.vmap(draw)(bits), t)


def gram(features: Array) -> Array:
  """Products of all channels over places (Gatys et al. 2016, equation 3), [B, T, C] -> [B, C, C].

  Divided by T C, so that networks of any size have entries of about the same size.
  """
  _, places, channels = features.shape
  return jnp.einsum("btc,btd->bcd", features, features) / (places * channels)


def _started(fresh: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
  """A tree with the arrays of another where that one has them."""
  return {
    name: _started(value, given.get(name, {})) if isinstance(value, Mapping)
    else jnp.asarray(given.get(name, value), value.dtype)
    for name, value in fresh.items()
  }  # fmt: skip
