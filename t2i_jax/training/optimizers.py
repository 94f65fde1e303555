"""Optimizers and learning-rate schedules by name.

Every optimizer is one chain: clip the gradient, find a direction, add decoupled weight decay
(https://arxiv.org/abs/1711.05101), apply the multipliers, scale by the schedule. Its state has the
dtype of the parameters, which is float32.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t2i_jax.errors import UserError, unknown
from t2i_jax.parallel.sharding import path_text
from t2i_jax.training.muon import scale_by_muon

Section = Mapping[str, Any]

_MUON_MOMENTUM = 0.95
_MUON_RMS = 0.2  # of an AdamW update: one learning rate then suits both, 2502.16982 section 2.2
# What `networks.layers.stack` calls blocks that are scanned over; others have their number behind.
_SCANNED = re.compile(r"(^|/)(\w+_)?blocks?/")
_NOT_HIDDEN = re.compile(r"(^|/)(\w*embed\w*|(\w+_)?head|logits|final\w*|output\w*)(/|$)")


def make_schedule(section: Section, total_steps: int) -> optax.Schedule:
  """The learning rate by number of updates done.

  It rises linearly over the first `warmup` updates, the last of which has the full rate. Then:
    constant: stays.
    linear, cosine: falls to `final_fraction` of the rate at `total_steps`
      (cosine: https://arxiv.org/abs/1608.03983 section 3, without restarts).
    inverse_sqrt: falls as 1/sqrt(updates) (https://arxiv.org/abs/1706.03762 section 5.3), not
      below `final_fraction` of the rate.

  Args:
    section: `learning_rate`, `schedule`, `warmup` (in updates), `final_fraction`.
    total_steps: updates of the whole run.

  Raises:
    UserError: an unknown schedule, or a value out of range.
  """
  name, peak, final = section["schedule"], section["learning_rate"], section["final_fraction"]
  warmup = section["warmup"]
  if name not in _SCHEDULES:
    raise unknown("optimizer.schedule", name, _SCHEDULES)
  _check_range("learning_rate", peak, 0.0, math.inf)
  _check_range("final_fraction", final, 0.0, 1.0)
  shape = _SCHEDULES[name]

  def schedule(count):
    done = jnp.asarray(count, jnp.float32)
    decayed = shape(done, warmup, total_steps, final)
    return peak * jnp.minimum((done + 1) / max(warmup, 1), 1.0) * decayed

  return schedule


def make_optimizer(section: Section, total_steps: int, params: Any) -> optax.GradientTransformation:
  """The optimizer that a config section describes.

  Args:
    section: `name` (adamw, adam, adafactor, lion, muon, sgd), `b1`, `b2`, `eps`, `weight_decay`,
      `clip_norm` (of the global norm; 0 for none), `multipliers` ((regex, factor), ... of the
      learning rate, the first found in a parameter's path decides), and `make_schedule`'s keys.
    total_steps: updates of the whole run.
    params: the parameters to train, or their shapes.

  Raises:
    UserError: an unknown name, a value out of range, or a bad regular expression.
  """
  name = section["name"]
  if name not in _DIRECTIONS:
    raise unknown("optimizer.name", name, _DIRECTIONS)
  for key in ("b1", "b2"):
    _check_range(key, section[key], 0.0, 0.999999)
  for key in ("eps", "weight_decay", "clip_norm"):
    _check_range(key, section[key], 0.0, math.inf)
  if name == "adam" and section["weight_decay"]:
    raise UserError("optimizer.name=adam has no weight decay: use adamw,"
                    " or set optimizer.weight_decay=0")
  parts = []
  if section["clip_norm"]:
    parts.append(optax.clip_by_global_norm(section["clip_norm"]))
  parts.append(_DIRECTIONS[name](section, params))
  if section["weight_decay"]:
    parts.append(optax.add_decayed_weights(section["weight_decay"], decay_mask(params)))
  if section["multipliers"]:
    factors = _factors(section["multipliers"], params)
    parts.append(optax.stateless(
      lambda updates, _: jax.tree.map(lambda factor, update: factor * update, factors, updates)))
  parts.append(optax.scale_by_learning_rate(make_schedule(section, total_steps)))
  return optax.chain(*parts)


def decay_mask(params: Any) -> Any:
  """True where weight decay applies: not on biases, scales of norms, and vectors."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf.ndim > 1 and _leaf_name(path) not in ("bias", "scale"), params)


def _adam(section: Section, params: Any) -> optax.GradientTransformation:
  """https://arxiv.org/abs/1412.6980, algorithm 1."""
  return optax.scale_by_adam(section["b1"], section["b2"], section["eps"])


def _lion(section: Section, params: Any) -> optax.GradientTransformation:
  """https://arxiv.org/abs/2302.06675, algorithm 2."""
  return optax.scale_by_lion(section["b1"], section["b2"])


def _sgd(section: Section, params: Any) -> optax.GradientTransformation:
  """Momentum `b1`; plain when that is 0."""
  return optax.trace(section["b1"])


def _adafactor(section: Section, params: Any) -> optax.GradientTransformation:
  """https://arxiv.org/abs/1804.04235, algorithms 4 to 6, with their constants and no momentum.

  The learning rate is relative to a parameter's own size.
  """
  return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0),
                     optax.scale_by_param_block_rms())


def _muon(section: Section, params: Any) -> optax.GradientTransformation:
  """https://arxiv.org/abs/2502.16982 for hidden matrices, Adam for everything else.

  Hidden matrices are the kernels of dense layers and 2-D convolutions, save those of embeddings
  and of outputs over classes or tokens; what puts out a picture is one of them. A convolution's
  [H, W, in, out] is one matrix [H * W * in, out], as in https://kellerjordan.github.io/posts/muon.
  Kernels of blocks that are scanned over are one matrix a block.
  """
  hidden = jax.tree_util.tree_map_with_path(
    lambda path, leaf: "muon" if _is_hidden_matrix(path, leaf) else "adam", params)
  muon = optax.chain(
    scale_by_muon(_MUON_MOMENTUM, _is_stacked),
    optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(
      lambda path, update: _MUON_RMS * math.sqrt(_longer_side(path, update)) * update, updates)))
  return optax.partition({"muon": muon, "adam": _adam(section, params)}, hidden)


def _is_hidden_matrix(path: tuple, leaf: Any) -> bool:
  return (leaf.ndim - _is_stacked(path, leaf) in (2, 4) and _leaf_name(path) == "kernel"
          and not _NOT_HIDDEN.search(path_text(path)))


def _is_stacked(path: tuple, kernel: Any) -> bool:
  """Whether its first axis is the block; of a 1-D convolution it is not."""
  return kernel.ndim in (3, 5) and bool(_SCANNED.search(path_text(path)))


def _longer_side(path: tuple, kernel: Any) -> int:
  """Of the matrix that a kernel is, its output axis last."""
  shape = kernel.shape[_is_stacked(path, kernel):]
  return max(math.prod(shape[:-1]), shape[-1])


def _leaf_name(path: tuple) -> str:
  return path_text(path).rpartition("/")[2]


def unmatched(multipliers: Sequence[tuple[str, float]], params: Any) -> list[str]:
  """The patterns of `multipliers` that no parameter's path fits."""
  paths = [path_text(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  return [p for p, _ in multipliers if not any(re.search(p, path) for path in paths)]


def _factors(multipliers: Sequence[tuple[str, float]], params: Any) -> Any:
  """The learning rate's factor of each parameter."""
  pairs = []
  for pair in multipliers:
    if isinstance(pair, str) or len(pair) != 2:
      raise UserError(f"optimizer.multipliers: {pair!r} is no pair of a regular expression and a"
                      " factor; write (('text_encoder/', 0.1),)")
    pattern, factor = pair
    try:
      pairs.append((re.compile(pattern), float(factor)))
    except re.error as error:
      raise UserError(f"optimizer.multipliers: '{pattern}' is not a regular expression"
                      f" ({error})") from error
    except ValueError as error:
      raise UserError(f"optimizer.multipliers: the factor {factor!r} is no number") from error

  def one(path, leaf):
    return next((f for pattern, f in pairs if pattern.search(path_text(path))), 1.0)

  return jax.tree_util.tree_map_with_path(one, params)


def _check_range(key: str, value: float, low: float, high: float) -> None:
  if not low <= value <= high:
    raise UserError(f"optimizer.{key}={value} is out of range: give a number from {low} to {high}")


def _progress(done, warmup: int, total: int):
  """0 at the warm-up's end, 1 at the run's."""
  return jnp.clip((done - warmup) / max(total - warmup, 1), 0.0, 1.0)


def _cosine(done, warmup, total, final):
  wave = 0.5 * (1 + jnp.cos(jnp.pi * _progress(done, warmup, total)))
  return final + (1 - final) * wave


def _linear(done, warmup, total, final):
  return 1 - (1 - final) * _progress(done, warmup, total)


def _inverse_sqrt(done, warmup, total, final):
  start = max(warmup, 1)
  return jnp.maximum(jnp.sqrt(start / jnp.maximum(done + 1, start)), final)


# (updates done, warm-up, total, final fraction) -> fraction of the rate
_SCHEDULES: dict[str, Callable] = {
  "constant": lambda done, warmup, total, final: jnp.ones_like(done),
  "cosine": _cosine,
  "linear": _linear,
  "inverse_sqrt": _inverse_sqrt,
}

# (section, parameters) -> the part of the chain that turns a gradient into a direction
_DIRECTIONS: dict[str, Callable[[Section, Any], optax.GradientTransformation]] = {
  "adam": _adam,
  "adamw": _adam,
  "adafactor": _adafactor,
  "lion": _lion,
  "muon": _muon,
  "sgd": _sgd,
}
