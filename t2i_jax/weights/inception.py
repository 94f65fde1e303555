"""Key map of the Frechet distance's Inception, under the names of its public files."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from t2i_jax.errors import UserError
from t2i_jax.metrics.inception import Inception
from t2i_jax.weights.key_map import KeyMap
from t2i_jax.weights.rules import Rule, conv, linear
from t2i_jax.weights.stored import open_weights

# Each file of the same numbers, and where it is published.
FILES = {
  "pt_inception-2015-12-05-6726825d.pth": "https://github.com/mseitzer/pytorch-fid/releases",
  "weights-inception-2015-12-05-6726825d.pth": "https://github.com/toshas/torch-fidelity/releases",
}


def _normalised(ours: str, theirs: str) -> list[Rule]:
  """The convolutions' and their batch norms'; statistics lie in a collection of their own."""
  return [
    Rule(f"params/{ours}/conv/kernel", f"{theirs}.conv.weight", conv),
    Rule(f"params/{ours}/bn/scale", f"{theirs}.bn.weight"),
    Rule(f"params/{ours}/bn/bias", f"{theirs}.bn.bias"),
    Rule(f"batch_stats/{ours}/bn/mean", f"{theirs}.bn.running_mean"),
    Rule(f"batch_stats/{ours}/bn/var", f"{theirs}.bn.running_var"),
  ]


INCEPTION = KeyMap(
  [
    *_normalised("Conv2d_{name}", "Conv2d_{name}"),
    *_normalised("Mixed_{block}_branch{name}", "Mixed_{block}.branch{name}"),
    # (pytorch-fid's network leaves the last layer out; the file has it.)
    Rule("params/fc/kernel", "fc.weight", linear),
  ],
  # No score reads the last bias: the Inception Score is of logits without it.
  [r"\.num_batches_tracked$", r"^fc\.bias$"],
)  # fmt: skip


def load_inception(path: str | os.PathLike, divisor: int = 1) -> dict[str, Any]:
  """The network's variables, of one of `FILES` or of safetensors under the same names.

  Args:
    path: the file.
    divisor: of `Inception`.

  Raises:
    UserError: there is no such file, with where it is published; it is not whole; or it holds
      another network, such as torchvision's, whose tensors are named.
  """
  path = Path(path).expanduser()
  if not path.exists():
    published = "; ".join(f"{name} of {where}" for name, where in FILES.items())
    raise UserError(f"no Inception at '{path}'; it is published as {published}, and nothing is "
                    "downloaded: put it there")
  abstract = jax.eval_shape(
    Inception(divisor).init, jax.random.key(0), jnp.zeros((1, 75, 75, 3))
  )
  return INCEPTION.load(open_weights(path), abstract, source=str(path))
