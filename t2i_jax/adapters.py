"""`python -m t2i_jax.adapters`: LoRA files in and out, and adapters merged into their base."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from t2i_jax import command
from t2i_jax import config as configs
from t2i_jax.errors import UserError

WHAT = ("load", "merge", "save")
DTYPES = ("float32", "float16", "bfloat16")
# The flags of each, the first ones required.
_FLAGS = {
  "load": (("base", "source", "output"), ()), "merge": (("export", "output"), ("strength",)),
  "save": (("export", "output"), ("dtype",)),
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.adapters",
    "Low-rank adapters (LoRA) of a trained system.\n"
    "load:  makes an export of a base and a public file of adapters (diffusers, peft, kohya),\n"
    "       which is sampled, merged, saved and trained further (init_from) as any other.\n"
    "merge: makes an export of the base's own system, the adapters added to its parameters.\n"
    "save:  writes the adapters of an export as diffusers and peft read them.\n"
    "configs/lora.py trains adapters.",
    "python -m t2i_jax.adapters load --base=sd15 --source=pytorch_lora_weights.safetensors "
    "--output=adapted",
    "python -m t2i_jax.adapters merge --export=runs/lora/export --output=merged --strength=0.8",
    "python -m t2i_jax.adapters save --export=runs/lora/export --output=lora.safetensors",
  )
  parser.add_argument("what", metavar="|".join(WHAT))
  parser.add_argument("--base", help="load: the export of the system that is adapted")
  parser.add_argument("--source", help="load: the file of adapters, or its folder")
  parser.add_argument("--export", help="merge, save: an export of the system lora")
  parser.add_argument("--output", help="the export, replaced if it exists; of save the "
                      ".safetensors file")
  parser.add_argument("--strength", type=float,
                      help="merge: multiplies what is added (1); negative takes away")
  parser.add_argument("--dtype", metavar="|".join(DTYPES),
                      help="save: type of the numbers (float32)")
  command.run(parser, argv, _adapters)


def _adapters(flags) -> None:
  configs.choose("what to do with adapters", flags.what, dict.fromkeys(WHAT))
  required, optional = _FLAGS[flags.what]
  for name in required:
    if not getattr(flags, name):
      raise UserError(f"{flags.what} needs --{name}; see python -m t2i_jax.adapters --help")
  for name in ("base", "source", "export", "strength", "dtype"):
    if name not in (*required, *optional) and getattr(flags, name) is not None:
      raise UserError(f"--{name} is not of {flags.what}; leave it out")
  print({"load": load, "merge": merge, "save": save}[flags.what](flags))


def load(flags) -> Path:
  """Writes an export of the system lora; the flags are the command's."""
  from t2i_jax import assembly, export, recipe
  from t2i_jax.networks.layers import lora
  from t2i_jax.systems import trees
  from t2i_jax.systems.adapters.lora import ADAPTERS, ALPHAS, BASE
  from t2i_jax.weights import lora as files

  export.check_replaceable(flags.output)
  config = recipe.base("lora", "scenes")
  with config.unlocked():
    config.components[BASE] = str(flags.base)
  components = assembly.load_components(config)
  about = components.about[BASE]
  theirs = configs.from_json(json.dumps(about["config"]))
  with config.unlocked():
    for section in ("data", "evaluate", "sharding"):
      config[section] = theirs[section]
  assembly.take_sampling_options(config, components)
  params = components.variables["params"][BASE]
  found = files.load(flags.source, lora.kernels(params), parts_of(components.systems[BASE]))
  config.model.update(_options_of(found, assembly.build_system(config, components.systems), params))
  own = {
    "params": {ADAPTERS: trees.unflatten({
      f"{path}/{name}": getattr(adapter, name)
      for path, adapter in found.items() for name in ("down", "up")
    })},
    ALPHAS: {ADAPTERS: trees.unflatten({
      f"{path}/alpha": np.float32(adapter.alpha) for path, adapter in found.items()
    })},
  }  # fmt: skip
  variables = trees.merge(components.variables, own)
  return export.write(
    flags.output, config, 0, variables, components.tokenizers[BASE], components.about, ema=False,
    notes=f"Its {len(found)} adapters are those of `{Path(flags.source).name}`.",
  )


def _options_of(found: Mapping[str, Any], system: Any, params: Any) -> dict[str, Any]:
  """Options of a system lora that has just these adapters: by their targets, else one by one."""
  ranks = {path: len(adapter.up) for path, adapter in found.items()}
  rank, alpha = next(iter(ranks.values())), next(iter(found.values())).alpha
  short = {
    "groups": tuple(sorted({path.partition("/")[0] for path in found})), "rank": rank,
    "alpha": alpha,
  }  # fmt: skip
  try:
    if dataclasses.replace(system, **short).ranks(params) == ranks:
      return short
  except UserError:
    pass  # none of a group's layers are among the targets
  return {"layers": tuple(ranks.items()), "alpha": alpha}


def merge(flags) -> Path:
  """Writes an export of the base's system; the flags are the command's."""
  from t2i_jax import assembly, export
  from t2i_jax.systems.adapters.lora import BASE

  export.check_replaceable(flags.output)
  exported = _read(flags.export)
  about = exported.components[BASE]
  system = assembly.build_with(exported.config, exported.components)
  strength = 1.0 if flags.strength is None else flags.strength
  variables = system.merged(exported.variables, strength)
  at = "" if strength == 1.0 else f", {strength:g} times"
  return export.write(
    flags.output, configs.from_json(json.dumps(about["config"])),
    about["step"] + exported.step, variables, exported.tokenizers, about["components"],
    notes=f"Adapters of {len(system.ranks(exported.variables['params'][BASE]))} layers are merged "
    f"into its parameters{at}.",
  )


def save(flags) -> Path:
  """Writes a file of adapters; the flags are the command's."""
  import jax.numpy as jnp

  from t2i_jax import assembly
  from t2i_jax.networks.layers import lora
  from t2i_jax.systems import trees
  from t2i_jax.systems.adapters.lora import ADAPTERS, ALPHAS, BASE
  from t2i_jax.weights import lora as files
  from t2i_jax.weights.safetensors_file import write_safetensors

  dtype = flags.dtype or DTYPES[0]
  configs.choose("--dtype", dtype, dict.fromkeys(DTYPES))
  path = Path(flags.output).expanduser()
  if path.suffix != ".safetensors" or path.is_dir():
    raise UserError(f"--output={flags.output} is no .safetensors file; name one")
  exported = _read(flags.export)
  system = assembly.build_with(exported.config, exported.components)
  shapes = lora.kernels(exported.variables["params"][BASE])
  flat = trees.flatten(exported.variables["params"][ADAPTERS])
  adapters = {
    name.removesuffix("/alpha"): files.Adapter(
      *(flat[name.replace("/alpha", f"/{which}")] for which in ("down", "up")), float(alpha)
    )
    for name, alpha in trees.flatten(exported.variables[ALPHAS][ADAPTERS]).items()
  }
  tensors, header = files.save(adapters, shapes, parts_of(system.adaptee), jnp.dtype(dtype))
  path.parent.mkdir(parents=True, exist_ok=True)
  write_safetensors(path, tensors, header)
  return path


def _read(path: str) -> Any:
  from t2i_jax import export

  exported = export.read(path)
  if exported.config.system != "lora":
    raise UserError(f"{path} is an export of {exported.config.system}, which has no adapters; name "
                    "one of lora")
  return exported


def parts_of(system: Any) -> list[Any]:
  """The networks of a system whose layers public files name: its U-Net and its text encoders.

  Raises:
    UserError: for a system of other networks.
  """
  from t2i_jax.networks.unet import UNet
  from t2i_jax.systems.text.pretrained import ENCODER, PretrainedText
  from t2i_jax.weights import text_encoders as maps
  from t2i_jax.weights.lora import Part
  from t2i_jax.weights.unet import diffusers_map
  from t2i_jax.weights.unet_config import linear_projections
  from t2i_jax.weights.unet_single_file import single_file_map

  network = getattr(system, "network", None)
  if not isinstance(network, UNet) or network.attention not in ("block", "transformer"):
    raise UserError(f"the layers of {type(system).__name__} have no public names: files are read "
                    "and written for U-Nets as diffusers has them (model.attention=transformer or "
                    "block)")
  options = {field.name: getattr(network, field.name) for field in dataclasses.fields(network)
             if field.name not in ("parent", "name")}
  convolutions = not linear_projections(options)
  parts = [Part("denoiser/", "unet", (
    diffusers_map(options, convolutions), single_file_map(options, convolutions)
  ))]  # fmt: skip
  kinds = {"clip": maps.CLIP_TEXT, "t5": maps.T5, "bert": maps.BERT, "ldm": maps.LDM_TEXT}
  for name, encoder in system.text.components.items():
    if isinstance(encoder, PretrainedText):
      parts.append(Part(f"{name}/{ENCODER}/", name, (kinds[encoder.kind],)))
  return parts


if __name__ == "__main__":
  main()
