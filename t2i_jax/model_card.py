"""The README of an export: what the model is, what it was trained on, and how it is used."""

import math
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from t2i_jax import systems


def model_card(
  config: ConfigDict, step: int, flat: Mapping[str, Any], ema: bool, notes: str
) -> str:
  """The export's README.

  Args:
    config: of the run.
    step: of the training; 0 for what was converted.
    flat: the variables, by path.
    ema: whether the parameters are moving averages.
    notes: Markdown at its end, such as scores.
  """
  parameters = sum(math.prod(v.shape) for k, v in flat.items() if k.startswith("params/"))
  if config.system == "pretrained_text":
    model = config.model
    return f"""# A text encoder of kind {model.kind}, converted

| | |
|---|---|
| tokens a caption | {config.text.length} |
| sequence | {"masked" if model.masked else "padding in sight"}{
               f", of layer {model.layer}" if model.kind == "clip" else ""} |
| parameters | {parameters:,} |

Train on it, frozen:

    python -m t2i_jax.main --config=configs/ddpm.py --workdir=RUN \\
      --config.text.encoder=component --config.components.text_encoder=PATH

{notes}"""
  draws = systems.load(config.system).Options is not None
  use = """Draw pictures with it:

    python -m t2i_jax.sample --export=PATH --prompt="..."
""" if draws else """Build another system on it, in which it is frozen:

    python -m t2i_jax.main --config=CONFIG --workdir=RUN --config.components.NAME=PATH
"""
  if not step:
    return f"""# {config.system}, converted

| | |
|---|---|
| system | `{config.system}` |
| parameters | {parameters:,} |

{use}
{notes}"""
  return f"""# {config.system}, trained on {config.data.name}

| | |
|---|---|
| system | `{config.system}` |
| data set | `{config.data.name}` {dict(config.data.options)} |
| steps | {step} of batch {config.train.batch_size} |
| parameters | {parameters:,} |
| weights | {f"moving average, decay {config.ema.decay}" if ema and config.ema.decay
             else "of the last step, not averaged"} |

{use}
{notes}"""
