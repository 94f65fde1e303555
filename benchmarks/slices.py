"""The training steps of Stable Diffusion 1 and XL, compiled for TPU slices: bytes a chip.

  python benchmarks/slices.py sd1 --topology=v5e:4x4 --batch-size=64     # needs jax[tpu]
  python benchmarks/slices.py sdxl --topology=v5p:2x2x2 --search

The config's own step (AdamW, moving average, bfloat16 compute, rematerialised blocks) on latents
and text features that are stored, as on a pod; parameters, their average and the optimizer's state
are spread over all chips. `--search` doubles the batch while it fits, then halves the last
interval.
"""

import argparse
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax import assembly, systems
from t2i_jax import config as configs
from t2i_jax.parallel.mesh import batch_sharding
from t2i_jax.parallel.topology import CHIP_MEMORY, bytes_a_chip, slice_mesh
from t2i_jax.restore import Plan
from t2i_jax.systems import base
from t2i_jax.training.compiled import CompiledStep
from t2i_jax.training.step import StepOptions, make_step

# Of CLIP L and OpenCLIP bigG, as their configs say.
CLIP_L = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
              projection_dim=768, hidden_act="quick_gelu", vocab_size=49408,
              max_position_embeddings=77, eos_token_id=2)  # fmt: skip
CLIP_BIGG = dict(CLIP_L, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32,
                 num_attention_heads=20, projection_dim=1280, hidden_act="gelu")  # fmt: skip
CASES = {
  "sd1": ("configs/stable_diffusion.py", {"text_encoder": (CLIP_L, {})}),
  "sdxl": ("configs/sdxl.py", {
    "text_encoder": (CLIP_L, dict(layer=-2, final_norm=False)),
    "text_encoder_2": (CLIP_BIGG, dict(layer=-2, final_norm=False, project=True)),
  }),
}  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("case", choices=tuple(CASES))
  parser.add_argument("--topology", default="v5e:4x4")
  parser.add_argument("--batch-size", type=int, default=0, help="of all chips; one a chip if 0")
  parser.add_argument("--search", action="store_true")
  flags = parser.parse_args()
  mesh = slice_mesh(flags.topology, {"fsdp": -1})
  chips = mesh.size
  memory = CHIP_MEMORY[flags.topology.partition(":")[0]]
  a_chip = max(flags.batch_size // chips, 1)
  fits = compiled(flags, mesh, a_chip * chips, memory)
  if not flags.search:
    return
  low, high = (a_chip, None) if fits else (0, a_chip)
  while high is None or high - low > max(low // 4, 1):
    middle = 2 * low if high is None else (low + high) // 2
    if compiled(flags, mesh, middle * chips, memory):
      low = middle
    else:
      high = middle
  print(f"{flags.case} on {flags.topology}: {low} pictures a chip fit, {high} do not")


def build(case: str, batch_size: int):
  """The config and system of a case, its components without any numbers."""
  path, encoders = CASES[case]
  config = configs.load_config(path, {"train.batch_size": str(batch_size),
                                      "precision.compute": "bfloat16"})  # fmt: skip
  components, null = {}, {}
  for name, (published, options) in encoders.items():
    sections = systems.default_sections("pretrained_text")
    text = sections["text"].to_dict() | {"length": 77}
    model = sections["model"].to_dict() | options | {
      "published": json.dumps(published), "null": (0,) * 77
    }  # fmt: skip
    components[name] = systems.build(
      {"system": "pretrained_text", "model": model, "text": text}, dtype=jnp.bfloat16
    )
    found = jax.eval_shape(
      lambda system=components[name]: system.encode(
        system.init(jax.random.key(0), {}),
        {"ids": jnp.zeros((1, 77), jnp.int32), "mask": jnp.ones((1, 77), bool)},
      )
    )
    null[name] = {
      field: np.zeros(value.shape, jnp.bfloat16)
      for field in ("sequence", "pooled") if (value := getattr(found, field)) is not None
    }  # fmt: skip
  stage = systems.default_sections("kl_autoencoder")
  components["first_stage"] = systems.build(
    {"system": "kl_autoencoder", "model": stage["model"].to_dict() | {
      "resolution": config.model.resolution, "adversarial_weight": 0.0, "perceptual_weight": 0.0,
    }, "text": stage["text"].to_dict()},
    dtype=jnp.bfloat16,
  )  # fmt: skip
  height, width, channels = components["first_stage"].latent_shape(config.model.resolution)
  latent = base.Field((height, width, 2 * channels), "float32")
  return config, systems.build(config, components, jnp.bfloat16, null, latent)


def compiled(flags, mesh, batch_size: int, memory: int) -> bool:
  """Compiles the step for a batch, prints what it needs, and says whether that fits."""
  config, system = build(flags.case, batch_size)

  def steps_of(value, key):
    return configs.steps_of(value, key, batch_size, None, 100_000)

  started = time.perf_counter()
  with jax.set_mesh(mesh):
    plan = Plan.make(config, mesh, system, {}, 100_000, steps_of)
    batch = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh)),
      assembly.abstract_batch(system, batch_size),
    )
    step = CompiledStep(
      make_step(system, plan.optimizers, StepOptions(0, 1, config.ema.decay, True)), plan.shardings
    )
    try:
      program = step.program(plan.abstract_state, batch)
    except Exception as error:  # the compiler refuses what does not fit
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      line = next(line for line in str(error).splitlines() if "RESOURCE_EXHAUSTED" in line)
      print(f"{flags.case} on {flags.topology}, batch {batch_size}: does not fit: {line[:200]}",
            flush=True)
      return False
    flops = step.flops(plan.abstract_state, batch)
  needed = bytes_a_chip(program)
  parameters = sum(x.size for x in jax.tree.leaves(plan.abstract_state.params))
  print(f"{flags.case} on {flags.topology}, {parameters:,} parameters, batch {batch_size} "
        f"({batch_size // mesh.size} a chip), {flops:.3g} FLOPs a step: "
        + ", ".join(f"{name} {size / 2**30:.2f} GiB" for name, size in needed.items())
        + f" of {memory / 2**30:.0f} GiB a chip; compiled in {time.perf_counter() - started:.0f} s",
        flush=True)
  return needed["peak"] <= memory


if __name__ == "__main__":
  main()
