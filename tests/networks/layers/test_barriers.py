import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from t2i_jax.networks.dit import DiTBlock
from t2i_jax.networks.layers import barriers
from t2i_jax.networks.layers.stack import run_blocks
from t2i_jax.parallel.compiler_flags import options_of


class Blocks(nn.Module):
  """Of a DiT, one by one."""

  depth: int

  @nn.compact
  def __call__(self, x):
    make = partial(DiTBlock, 1, 16)
    return run_blocks(lambda name: make(name=name), "block", self.depth, x, (x[:, 0],),
                      scan=False)[0]


def largest_fusion(network) -> int:
  """Operations in the largest fusion of a gradient, compiled as training compiles."""
  x = jnp.ones((2, 4, 8))
  variables = network.init(jax.random.key(0), x)

  def loss(variables, x):
    return sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(network.apply(variables, x)))

  step = jax.jit(jax.grad(loss), compiler_options=options_of(jax.devices()[0]))
  text = step.lower(variables, x).compile().as_text()
  bodies = re.findall(r"^%?\S*fused_computation\S* \(.*?\n\}", text, re.MULTILINE | re.DOTALL)
  return max(body.count("\n") for body in bodies)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA for CPUs")
def test_fusions_do_not_grow_with_the_number_of_blocks():
  assert largest_fusion(Blocks(6)) <= largest_fusion(Blocks(3))


def test_compilers_for_other_devices_get_no_barrier(monkeypatch):
  def barriers_in(x):
    return str(jax.make_jaxpr(lambda x: barriers.computed_once(x))(x)).count("optimization_barrier")

  assert barriers_in(jnp.ones(3)) == 1
  for platform in ("tpu", "gpu"):
    monkeypatch.setattr(barriers, "platform", lambda platform=platform: platform)
    assert not barriers_in(jnp.ones(3))
