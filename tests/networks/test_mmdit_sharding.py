"""What chips send each other for a multimodal transformer whose parameters are spread over them."""

import re

import jax
import jax.numpy as jnp
import pytest

from t2i_jax import recipe
from t2i_jax.networks.mmdit import MMDiT
from t2i_jax.parallel.mesh import batch_sharding, make_mesh
from t2i_jax.parallel.sharding import parse_rules, shardings

TEXT, WIDTH = 29, 128  # a length that nothing else has
COLLECTIVE = re.compile(
  r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)


@pytest.mark.full
def test_no_chip_sends_tokens_of_a_picture_or_a_text():
  """Parameters are gathered, their gradients summed, and the batch stays where it is."""
  network = MMDiT(width=WIDTH, depth=3, heads=2, grid=4, largest=8)
  mesh = make_mesh({"fsdp": 8})
  shapes = {"x": (16, 12, 20, 4), "t": (16,), "context": (16, TEXT, 96), "pooled": (16, 32)}
  abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(mesh))
              for name, shape in shapes.items()}
  params = jax.eval_shape(lambda given: network.init(jax.random.key(0), **given), abstract)
  placed = shardings(params, parse_rules(recipe.TRANSFORMER_RULES), mesh)
  params = jax.tree.map(
    lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), params, placed
  )

  def loss(params, given):
    return jnp.mean(jnp.square(network.apply(params, **given)))

  with jax.set_mesh(mesh):
    program = jax.jit(jax.grad(loss), out_shardings=placed).lower(params, abstract).compile()
  sent = [found[1] for found in map(COLLECTIVE.search, program.as_text().splitlines()) if found]
  assert sent
  tokens = (TEXT, 6 * 10, TEXT + 6 * 10)
  of_tokens = [shape for shape in sent
               if any(re.search(rf"[\[,]{number}[,\]]", shape) for number in tokens)]
  assert not of_tokens
