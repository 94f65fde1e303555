"""A small U-Net against diffusers' on PyTorch: a training step, and 20 steps of sampling.

  python benchmarks/unet.py            # needs the extra "parity"
  python benchmarks/unet.py --profile  # where the training step's time goes

The same network (64, 128, 128 channels, 32 px, 16 pictures at a time) with the same weights, which
are checked to give the same output; float32; rounds in turns, both sides warm.
"""

import argparse
import dataclasses
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax
from parts import Part, in_turns, profile, reference_profile

from t2i_jax.networks.unet import UNet
from t2i_jax.parallel.compiler_flags import compiler_options
from t2i_jax.weights.stored import Stored
from t2i_jax.weights.unet import diffusers_map
from t2i_jax.weights.unet_config import from_diffusers

RATE = 1e-4


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__,
                                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=10)
  parser.add_argument("--batch-size", type=int, default=16)
  parser.add_argument("--resolution", type=int, default=32)
  parser.add_argument("--profile", action="store_true",
                      help="times of our step's parts, and PyTorch's own profile of its step")
  flags = parser.parse_args()
  import torch

  reference = reference_network(flags.resolution)
  options = from_diffusers({**reference.config, "_class_name": type(reference).__name__})
  fields = {field.name for field in dataclasses.fields(UNet)}
  network = UNet(**{name: value for name, value in options.items() if name in fields})
  shape = (flags.batch_size, flags.resolution, flags.resolution, 3)
  abstract = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(flags.batch_size)
  )["params"]
  stored = {
    name: Stored(tuple(x.shape), np.dtype("float32"), lambda x=x: x.detach().numpy())
    for name, x in reference.state_dict().items()
  }
  params = diffusers_map(options).load(stored, abstract, source="the reference")
  random = np.random.default_rng(0)
  x, noise = (random.normal(size=shape).astype(np.float32) for _ in range(2))
  t = random.integers(0, 1000, flags.batch_size)
  check(network, params, reference, x, t)
  print(f"{sum(v.size for v in jax.tree.leaves(params)):,} parameters, {shape}, medians of "
        f"{flags.rounds} rounds, {torch.get_num_threads()} threads, jax {jax.__version__}, torch "
        f"{torch.__version__}")
  if flags.profile:
    print(profile(*parts_of(network, params, x, noise, t), flags.rounds))
    print(reference_profile(reference_training(reference, x, noise, t)))
    return
  ours, theirs = training(network, params, x, noise, t), reference_training(reference, x, noise, t)
  report("training step", *in_turns(ours, theirs, rounds=flags.rounds))
  ours, theirs = sampling(network, params, x), reference_sampling(reference, x)
  report("20 sampling steps", *in_turns(ours, theirs, rounds=max(flags.rounds // 3, 3)))


def reference_network(resolution: int):
  """diffusers' network of the same architecture."""
  import torch
  from diffusers import UNet2DModel

  torch.manual_seed(0)
  return UNet2DModel(
    sample_size=resolution, block_out_channels=(64, 128, 128), layers_per_block=2,
    down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"), attention_head_dim=32,
    norm_num_groups=32,
  )  # fmt: skip


def check(network, params, reference, x, t) -> None:
  import torch

  ours = network.apply({"params": params}, x, t)
  with torch.inference_mode():
    theirs = reference(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(t)).sample
  theirs = theirs.numpy().transpose(0, 2, 3, 1)
  error = np.abs(ours - theirs).max() / np.abs(theirs).max()
  print(f"outputs differ by at most {error:.2g} of the largest")
  assert error < 1e-4


def functions(network):
  """The optimizer; and of the parameters and a batch: loss, and a step of AdamW."""
  optimizer = optax.adamw(RATE)

  def loss(params, x, noise, t):
    return jnp.mean(jnp.square(network.apply({"params": params}, x, t, train=True) - noise))

  def step(params, state, x, noise, t):
    gradients = jax.grad(loss)(params, x, noise, t)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return optimizer, loss, step


def training(network, params, x, noise, t):
  """A step: forward, backward, AdamW."""
  optimizer, _, step = functions(network)
  step = jax.jit(step, donate_argnums=(0, 1), compiler_options=compiler_options("cpu"))
  held = [jax.tree.map(jnp.copy, params)]
  held.append(optimizer.init(held[0]))

  def run():
    held[:] = step(*held, x, noise, t)
    jax.block_until_ready(held)

  return run


def parts_of(network, params, x, noise, t):
  """What `parts.profile` takes of a step: its parts, itself, and its arguments."""
  optimizer, loss, step = functions(network)
  state, batch = optimizer.init(params), (x, noise, t)

  def update(gradients, state, params):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  return [
    Part("forward", loss, (params, *batch)),
    Part("forward and backward", jax.value_and_grad(loss), (params, *batch)),
    Part("AdamW", update, (params, state, params)),
  ], step, (params, state, *batch)


def reference_training(reference, x, noise, t):
  import torch

  optimizer = torch.optim.AdamW(reference.parameters(), RATE)
  x, noise = (torch.from_numpy(v.transpose(0, 3, 1, 2).copy()) for v in (x, noise))
  t = torch.from_numpy(t)

  def run():
    optimizer.zero_grad(set_to_none=True)
    torch.nn.functional.mse_loss(reference(x, t).sample, noise).backward()
    optimizer.step()

  return run


def sampling(network, params, x):
  """20 evaluations in one compiled loop, each moving the picture a little."""

  def draw(params, x):
    def body(x, t):
      return x - 0.05 * network.apply({"params": params}, x, jnp.full(len(x), t)), None

    return jax.lax.scan(body, x, jnp.arange(950, -50, -50))[0]

  draw = jax.jit(draw, compiler_options=compiler_options("cpu"))
  return lambda: jax.block_until_ready(draw(params, x))


def reference_sampling(reference, x):
  import torch

  start = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())

  def run():
    x = start
    with torch.inference_mode():
      for t in range(950, -50, -50):
        x = x - 0.05 * reference(x, torch.tensor(t)).sample

  return run


def report(what: str, ours: list[float], theirs: list[float]) -> None:
  ratio = statistics.median(ours) / statistics.median(theirs)
  print(f"{what:18} t2i_jax {statistics.median(ours):.3f} s, diffusers "
        f"{statistics.median(theirs):.3f} s, ratio of the times {ratio:.2f}", flush=True)


if __name__ == "__main__":
  main()
