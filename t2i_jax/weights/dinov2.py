"""Key map of DINOv2, under the names of transformers' files."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError
from t2i_jax.metrics.dinov2 import Config, DINOv2
from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.rules import Layout, Rule, conv, convolution, dense, linear, norm
from t2i_jax.weights.stored import open_weights

_LAYER = "encoder.layer.{i}"
# The class token and the positions have an axis of one picture there.
_token = Layout(lambda x: x.reshape(-1), lambda x: x.reshape(1, 1, -1))
_one = Layout(lambda x: x[0], lambda x: x[None])

_SHARED = [
  Rule("class", "embeddings.cls_token", _token),
  Rule("positions", "embeddings.position_embeddings", _one),
  *convolution("patches", "embeddings.patch_embeddings.projection", conv),
  *norm("layers_{i}/norm_attention", f"{_LAYER}.norm1"),
  *norm("layers_{i}/norm_mlp", f"{_LAYER}.norm2"),
  *[
    rule for name in ("query", "key", "value")
    for rule in dense(f"layers_{{i}}/attention/{name}", f"{_LAYER}.attention.attention.{name}")
  ],
  *dense("layers_{i}/attention/out", f"{_LAYER}.attention.output.dense"),
  Rule("layers_{i}/scale_attention", f"{_LAYER}.layer_scale1.lambda1"),
  Rule("layers_{i}/scale_mlp", f"{_LAYER}.layer_scale2.lambda1"),
  *norm("norm_out", "layernorm"),
]
_PLAIN = [
  *dense("layers_{i}/mlp_in", f"{_LAYER}.mlp.fc1"),
  *dense("layers_{i}/mlp_out", f"{_LAYER}.mlp.fc2"),
]
# The gate and what it gates are one matrix there.
_GATED = [
  rule for index, ours in enumerate(("mlp_gate", "mlp_in")) for rule in (
    Rule(f"layers_{{i}}/{ours}/kernel", f"{_LAYER}.mlp.weights_in.weight", linear, (index, 2)),
    Rule(f"layers_{{i}}/{ours}/bias", f"{_LAYER}.mlp.weights_in.bias", part=(index, 2)),
  )
] + dense("layers_{i}/mlp_out", f"{_LAYER}.mlp.weights_out")


def dinov2_map(gated: bool) -> KeyMap:
  """Names of the model with MLPs, or with gated ones."""
  rules = [*_SHARED, *(_GATED if gated else _PLAIN)]
  # What stands for hidden patches in its training is not used.
  return KeyMap(rules, [r"^(dinov2\.)?embeddings\.mask_token$"], [("", "dinov2.")])


def load_dinov2(folder: str | os.PathLike) -> tuple[Config, dict[str, Any]]:
  """The sizes and the variables of a folder of transformers: config.json and its weights.

  Raises:
    UserError: something is missing or not whole, or of another model.
  """
  folder = Path(folder).expanduser()
  about = folder / "config.json"
  if not about.is_file():
    raise UserError(f"no config.json in '{folder}'; give the folder of a DINOv2 of transformers, "
                    "such as facebook/dinov2-large")
  try:
    config = Config.from_transformers(json.loads(about.read_text(encoding="utf-8")))
  except UserError as error:
    raise UserError(f"{about}: {error}") from error
  except (ValueError, TypeError, AttributeError) as error:
    raise UserError(f"{about} is no config of DINOv2 ({error}); copy it again") from error
  side = config.resolution // config.patch * config.patch
  abstract = jax.eval_shape(
    DINOv2(config).init, jax.random.key(0), jnp.zeros((1, side, side, 3))
  )
  params = dinov2_map(config.gated).load(
    open_weights(folder), abstract["params"], source=str(folder)
  )
  return config, {"params": params}
