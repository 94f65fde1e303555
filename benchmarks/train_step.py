"""A training step of DiT-S/2 against diffusers' on PyTorch.

  python benchmarks/train_step.py            # needs the extra "parity"
  python benchmarks/train_step.py --profile  # where our step's time goes

The step that `t2i_jax.main` runs, with AdamW and a moving average, on one batch of stored latents
(side 32, so 256 tokens) with labels; float32. The reference, eager and by `torch.compile`, has the
same network with the same weights, which are checked to give the same output, and does the same:
draws latents, times and noise, AdamW (fused), the average. Rounds in turns, all sides warm.

Neither side learns the variance. diffusers embeds the time and the label once more in every block,
with weights of the block's own; here its blocks share them, as DiT's do. `--config.KEY=VALUE` sets
what is ours, such as --config.model.scan=False.
"""

import argparse
import os
import statistics
from functools import partial
from typing import Any

from t2i_jax import command

RATE, DECAY, WEIGHT_DECAY = 1e-4, 0.9999, 0.01
CLASSES = 1000
# Width, depth, heads, and side of the pictures; "tiny" is to try the script.
SIZES = {"S/2": (384, 12, 6, 256), "tiny": (48, 2, 2, 64)}
SETTINGS = {
  "optimizer.name": "adamw", "optimizer.learning_rate": str(RATE), "optimizer.warmup": "0",
  "optimizer.weight_decay": str(WEIGHT_DECAY), "optimizer.clip_norm": "0.0",
  "ema.decay": str(DECAY), "model.learned_variance": "False", "model.label_drop": "0.0",
  "model.remat": "none", "precision.compute": "float32",
}  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--batch-size", type=int, default=8)
  parser.add_argument("--size", choices=list(SIZES), default="S/2")
  parser.add_argument("--threads", type=int, default=2, help="of both sides")
  parser.add_argument("--eager", action="store_true", help="leave torch.compile out")
  parser.add_argument("--profile", action="store_true",
                      help="times of our step's parts, and PyTorch's own profile of its step")
  settings, rest = command.split_settings(None)
  flags = parser.parse_args(rest)
  # XLA takes as many threads as the process has cores.
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: flags.threads])
  command.run(parser, rest, lambda flags: benchmark(flags, command.overrides(settings)))


def benchmark(flags: argparse.Namespace, settings: dict[str, str]) -> None:
  import jax
  import torch
  from parts import Part, in_turns, profile, reference_profile

  from t2i_jax.parallel.host_memory import keep_freed_memory

  keep_freed_memory()  # as training does; for both sides
  torch.set_num_threads(flags.threads)
  reference = reference_network(*SIZES[flags.size])
  ours = Ours(flags, settings, reference)
  ours.check(reference)
  flops = ours.step.flops(ours.state, ours.batch)
  print(f"DiT-{flags.size}, {ours.parameters:,} parameters, batch {flags.batch_size}, "
        f"{flops / 1e9:.1f} GFLOP a step, medians of {flags.rounds} rounds, {flags.threads} "
        f"threads, jax {jax.__version__}, torch {torch.__version__}", flush=True)
  if flags.profile:
    parts = [Part(name, *part) for name, part in ours.parts().items()]
    print(profile(parts, ours.function, (ours.state, ours.batch), flags.rounds))
    print(reference_profile(reference_training(reference, reference, ours.batch)))
    return
  sides = {"t2i_jax": ours.run, "eager": reference_training(reference, reference, ours.batch)}
  compiled = None if flags.eager else compiled_training(reference, ours.batch)
  if compiled:
    sides["compiled"] = compiled
  times = dict(zip(sides, map(statistics.median, in_turns(*sides.values(), rounds=flags.rounds)),
                   strict=True))
  for name, seconds in times.items():
    ratio = f", ours takes {times['t2i_jax'] / seconds:.2f} of it" * (name != "t2i_jax")
    print(f"{name:9} {seconds:.4f} s a step, {flops / seconds / 1e9:.1f} GFLOP/s{ratio}")


def reference_network(width: int, depth: int, heads: int, resolution: int) -> Any:
  """diffusers' network, with DiT's waves and epsilon and one embedding for all blocks."""
  import torch
  from diffusers import DiTTransformer2DModel

  model = DiTTransformer2DModel(
    num_attention_heads=heads, attention_head_dim=width // heads, num_layers=depth,
    sample_size=resolution // 8, in_channels=4, out_channels=4, num_embeds_ada_norm=CLASSES,
    norm_eps=1e-6,
  )  # fmt: skip
  embedder = model.transformer_blocks[0].norm1.emb
  embedder.time_proj.downscale_freq_shift = 0
  embedder.class_embedder.dropout_prob = 0.0
  for block in model.transformer_blocks:
    block.norm1.emb = embedder
  # The published initialization opens no block: nothing would be compared.
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0, 0.03, generator=generator)
  return model


class Ours:
  """The compiled step on the reference's weights, and a batch that lies on the device.

  Attributes:
    step: compiled; donates its state.
    function: the same, not compiled.
    state, batch: its arguments.
    parameters: how many are trained.
  """

  def __init__(self, flags: argparse.Namespace, settings: dict[str, str], reference: Any):
    import jax
    import numpy as np

    from t2i_jax import config_files
    from t2i_jax.parallel.mesh import batch_sharding, make_mesh
    from t2i_jax.parallel.sharding import put
    from t2i_jax.planning import report
    from t2i_jax.restore import Plan
    from t2i_jax.training.compiled import CompiledStep
    from t2i_jax.training.step import StepOptions, make_step
    from t2i_jax.weights.dit import diffusers_map
    from t2i_jax.weights.stored import Stored

    width, depth, heads, resolution = SIZES[flags.size]
    config = config_files.load_config(
      "configs/dit.py:size=S/2,labels=yes", {**SETTINGS, **settings}
    )
    with config.unlocked():
      config.model.update(width=width, depth=depth, heads=heads, resolution=resolution,
                          classes=(("class", CLASSES),))
      config.train.batch_size = flags.batch_size
    self.system = report.build(config, {"first_stage": "kl-f8c4"}, encode=False).system
    self.mesh = make_mesh(config.mesh.to_dict())
    random = np.random.default_rng(0)
    fields = self.system.batch_spec()
    batch = {
      "latent": random.normal(size=(flags.batch_size, *fields["latent"].shape)).astype("f2"),
      "label": random.integers(0, CLASSES, (flags.batch_size, 1), "i4"),
    }
    assert set(batch) == set(fields), set(fields)
    stored = {
      name: Stored(tuple(x.shape), np.dtype("float32"), lambda x=x: x.detach().numpy())
      for name, x in reference.state_dict().items()
    }
    with jax.set_mesh(self.mesh):
      plan = Plan.make(config, self.mesh, self.system, {}, 10**6, lambda value, key: 0)
      self.batch = put(batch, batch_sharding(self.mesh))
      state = plan.create(self.batch, {})
      options = {**self.system.network_options(), "patch": self.system.patch}
      names = diffusers_map(options)
      params = names.load(stored, jax.eval_shape(lambda: state.params["denoiser"]),
                          source="the reference")
      copied = partial(jax.tree.map, jax.numpy.array)
      self.state = state.replace(params={"denoiser": copied(params)},
                                 ema={"denoiser": copied(params)})
      self.function = make_step(self.system, plan.optimizers, StepOptions(ema_decay=DECAY))
      self.optimizer = plan.optimizers["denoiser"]
      self.step = CompiledStep(self.function, plan.shardings)
    self.parameters = sum(x.size for x in jax.tree.leaves(params))

  def run(self) -> None:
    import jax

    with jax.set_mesh(self.mesh):
      self.state, metrics = self.step(self.state, self.batch)
      jax.block_until_ready((self.state, metrics))

  def check(self, reference: Any) -> None:
    """Prints by how much the outputs of both networks differ; they must not by much."""
    import jax
    import numpy as np
    import torch

    random = np.random.default_rng(1)
    x = random.normal(size=(len(self.batch["label"]), *self.system.shape)).astype("f4")
    t = random.integers(0, 1000, len(x))
    params = {"params": self.state.params["denoiser"]}
    label = np.asarray(self.batch["label"])
    ours = np.asarray(jax.jit(self.system.network.apply)(params, x, t.astype("f4"), label=label))
    with torch.inference_mode():
      theirs = reference(
        torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(t),
        torch.from_numpy(label[:, 0].astype("i8")),
      ).sample  # fmt: skip
    theirs = theirs.numpy().transpose(0, 2, 3, 1)
    error = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"outputs differ by at most {error:.2g} of the largest, {np.abs(theirs).max():.3g}")
    assert error < 1e-4
    theirs = sum(x.numel() for x in reference.parameters())
    assert theirs == self.parameters, (theirs, self.parameters)

  def parts(self) -> dict[str, tuple]:
    """What a step consists of, each by itself: (function, arguments)."""
    import jax
    import optax

    player, key = self.system.players[0], jax.random.key(0)

    def forward(state, batch):
      return player.loss(state.variables(), batch, key, state.step)[0]

    def gradients(state, batch):
      return player.gradients(state.variables(), batch, key, state.step)

    def update(gradients, state):
      updates, held = self.optimizer.update(gradients, state.optimizer[player.name], state.params)
      params = optax.apply_updates(state.params, updates)
      average = jax.tree.map(lambda old, new: old + (1 - DECAY) * (new - old), state.ema, params)
      return params, held, average

    return {
      "forward": (forward, (self.state, self.batch)),
      "forward and backward": (gradients, (self.state, self.batch)),
      "AdamW and average": (update, (self.state.params, self.state)),
    }


def reference_training(reference: Any, forward: Any, batch: dict[str, Any]):
  """A step of the reference; `forward` is it, or what it was compiled to."""
  import numpy as np
  import torch

  reference.train()
  parameters = list(reference.parameters())
  average = [parameter.detach().clone() for parameter in parameters]
  optimizer = torch.optim.AdamW(parameters, RATE, weight_decay=WEIGHT_DECAY, fused=True)
  moments = torch.from_numpy(np.asarray(batch["latent"]).transpose(0, 3, 1, 2).copy())
  label = torch.from_numpy(np.asarray(batch["label"])[:, 0].astype("i8"))
  survival = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)

  def run() -> None:
    mean, log_variance = moments.float().chunk(2, dim=1)
    x = 0.18215 * (mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean))
    t, noise = torch.randint(0, 1000, (len(x),)), torch.randn_like(x)
    signal = survival[t][:, None, None, None]
    noised = signal.sqrt() * x + (1 - signal).sqrt() * noise
    optimizer.zero_grad(set_to_none=True)
    output = forward(noised, t, label, return_dict=False)[0]
    torch.nn.functional.mse_loss(output, noise).backward()
    optimizer.step()
    with torch.no_grad():
      torch._foreach_lerp_(average, parameters, 1 - DECAY)

  return run


def compiled_training(reference: Any, batch: dict[str, Any]):
  """The same by `torch.compile`, or None, with a line that says why."""
  import torch

  run = reference_training(reference, torch.compile(reference), batch)
  try:
    run()
  except Exception as error:  # inductor needs a C++ compiler and Python's headers
    line = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
    print(f"torch.compile does not work here: {line[:200]}")
    return None
  return run


if __name__ == "__main__":
  main()
