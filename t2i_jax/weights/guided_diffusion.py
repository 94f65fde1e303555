"""What the files of guided diffusion are: ADM's U-Nets and its noisy classifiers.

Dhariwal and Nichol 2021. A file is one network's tensors and says nothing else. Options are seen by
names and shapes as far as they have one; the others are flags of the release, `flags_of`, which
go by the side of the pictures.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from t2i_jax.errors import UserError
from t2i_jax.weights import unet_single_file as unets
from t2i_jax.weights.stored import Stored

UNET, CLASSIFIER = "adm", "noisy_classifier"  # our systems
Tensors = Mapping[str, Stored]
# Sides of the pictures of the published networks, by their multipliers.
SIDES = {
  (1, 2, 3, 4): 64, (1, 1, 2, 3, 4): 128, (1, 1, 2, 2, 4, 4): 256, (0.5, 1, 1, 2, 2, 4, 4): 512,
}  # fmt: skip
_FIRST = "input_blocks.0.0.weight"


def kind_of(tensors: Tensors) -> str:
  """`UNET` or `CLASSIFIER`, or "" for a file of anything else."""
  if _FIRST not in tensors or "time_embed.0.weight" not in tensors:
    return ""
  return UNET if any(name.startswith("output_blocks.") for name in tensors) else CLASSIFIER


def flags_of(kind: str, resolution: int) -> dict[str, Any]:
  """Options of a system that no file says, as published for pictures of this side."""
  heads = {"heads": 4 if resolution == 128 else 0} if kind == UNET else {}
  return {"schedule": "cosine" if resolution == 64 else "linear", "head_channels": 64, **heads}


def in_new_order(kind: str, resolution: int) -> bool:
  """Whether fused projections are all queries, all keys, all values; see `single_file_map`."""
  return kind == UNET and resolution == 64


def options_of(kind: str, tensors: Tensors, source: str, resolution: int = 0) -> dict[str, Any]:
  """Options of a system of ours by the names and shapes of a file.

  Args:
    kind: of `kind_of`.
    tensors: of `open_weights`.
    source: the file, for errors.
    resolution: side of the pictures; 0 for what the tensors or the release say.

  Raises:
    UserError: it is not whole, is another kind of model, or does not say its resolution.
  """
  try:
    found = _unet(tensors, source) if kind == UNET else _classifier(tensors, source)
  except (KeyError, IndexError, ValueError) as error:
    raise UserError(f"the network in '{source}' is not whole ({error}); copy it again") from error
  seen = found.pop("seen", 0)
  if seen and resolution not in (0, seen):
    raise UserError(f"--resolution={resolution}: the classifier in '{source}' has positions for "
                    f"pictures of {seen} px; leave --resolution out")
  resolution = resolution or seen or SIDES.get(found["multipliers"], 0)
  if not resolution:
    raise UserError(f"'{source}' does not say for which pictures it is, and no published network "
                    f"has its multipliers {found['multipliers']}: give their side with "
                    "--resolution=PIXELS")
  return {**found, "resolution": resolution, **flags_of(kind, resolution)}


def _unet(tensors: Tensors, source: str) -> dict[str, Any]:
  if "middle_block.1.proj_in.weight" in tensors:
    raise UserError(f"'{source}' holds the U-Net of a latent diffusion model alone, without its "
                    "autoencoder and text encoder; give the file of the whole model")
  found = unets.options_of(tensors)
  channels, outputs = found["in_channels"], found["out_channels"]
  if channels == 6:
    raise UserError(f"'{source}' holds an upsampler of guided diffusion, which also reads a small "
                    "picture; only its models that draw from noise alone are known")
  if channels != 3 or outputs not in (3, 6):
    raise UserError(f"'{source}' holds a U-Net from {channels} channels to {outputs}, which is "
                    "none of guided diffusion's: from 3 to 3, or to 6 with learned variances")
  _check_resampling(found["block_resample"], source)
  kept = ("channels", "multipliers", "blocks", "attention", "attention_levels", "groups", "epsilon",
          "scale_shift", "block_resample")  # fmt: skip
  labels = (("class", found["classes"]),) if found["classes"] else ()
  return {
    **{name: found[name] for name in kept}, "classes": labels, "learned_variance": outputs == 6
  }


def _classifier(tensors: Tensors, source: str) -> dict[str, Any]:
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  numbers = {name: int(m[1]) for name in shapes if (m := re.match(r"input_blocks\.(\d+)\.", name))}
  total = len(set(numbers.values()))
  resampled = not any(name.endswith(".0.op.weight") for name in numbers)
  _check_resampling(resampled, source)
  attending = {number for name, number in numbers.items() if name.endswith(".1.norm.weight")}
  # The coarsest level's blocks are the last, and no block that halves the size attends.
  blocks = next(n for n in range(total) if total - 1 - n not in attending)
  if not blocks or set(numbers.values()) != set(range(total)) or total % (blocks + 1):
    raise ValueError("its levels cannot be told from one another by where it attends")
  levels = total // (blocks + 1)
  first = [1 + i * (blocks + 1) for i in range(levels)]
  channels = shapes["time_embed.0.weight"][1]
  widths = [shapes[f"input_blocks.{number}.0.in_layers.2.weight"][0] for number in first]
  condition = shapes["middle_block.0.emb_layers.1.weight"][0]
  pool, classes, places = _pool(shapes, source)
  return {
    "channels": channels,
    "multipliers": tuple(w // channels if w % channels == 0 else w / channels for w in widths),
    "blocks": blocks,
    "attention": "block",
    "attention_levels": tuple(i for i, number in enumerate(first) if number in attending),
    "groups": 32,
    "epsilon": 1e-5,
    "scale_shift": condition == 2 * shapes["middle_block.0.in_layers.2.weight"][0],
    "block_resample": resampled,
    "pool": pool,
    "classes": (("class", classes),),
    "seen": math.isqrt(places) * 2 ** (levels - 1),
  }


def _pool(shapes: Mapping[str, tuple[int, ...]], source: str) -> tuple[str, int, int]:
  """The pool, the classes, and the positions that it reads (0 of those that read any number)."""
  if "out.2.c_proj.weight" in shapes:
    places = shapes["out.2.positional_embedding"][1] - 1  # the mean has one too
    return "attention", shapes["out.2.c_proj.weight"][0], places
  if len(shapes["out.0.weight"]) == 1:
    return "adaptive", shapes["out.3.weight"][0], 0
  if "out.2.weight" not in shapes:
    raise UserError(f"'{source}' holds a classifier whose pool is spatial_v2, which is not known")
  return "spatial", shapes["out.2.weight"][0], 0


def _check_resampling(blocks: bool, source: str) -> None:
  # What the release's flags say is then not known, such as the number of the process's steps.
  if not blocks:
    raise UserError(f"'{source}' changes the size by convolutions, as the older models of improved "
                    "diffusion do, and guided diffusion's by residual blocks; only these are known")
