import math
import types

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from t2i_jax.parallel import flops, mesh


def _ones(*shape):
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_dense():
  assert flops.count(jnp.dot, _ones(8, 16), _ones(16, 32)) == 2 * 8 * 16 * 32
  assert flops.count(jnp.matmul, _ones(5, 8, 16), _ones(5, 16, 4)) == 2 * 5 * 8 * 16 * 4


def test_elementwise_work_is_not_counted():
  assert flops.count(lambda x: jax.nn.gelu(x).sum() + jnp.sort(x)[0], _ones(64)) == 0


def _conv(x, kernel, stride=1, padding="SAME", **options):
  return lax.conv_general_dilated(
    x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
  )


@pytest.mark.parametrize(
  ("options", "kernel", "expected"),
  [
    ({}, (3, 3, 6, 10), 16 * 16 * 9 * 6 * 10),
    ({"padding": "VALID"}, (3, 3, 6, 10), 14 * 14 * 9 * 6 * 10),
    ({"stride": 2}, (3, 3, 6, 10), 8 * 8 * 9 * 6 * 10),
    ({"stride": 4, "padding": "VALID"}, (4, 4, 6, 10), 4 * 4 * 16 * 6 * 10),
    ({"rhs_dilation": (2, 2)}, (3, 3, 6, 10), 16 * 16 * 9 * 6 * 10),
    ({"feature_group_count": 2}, (3, 3, 3, 10), 16 * 16 * 9 * 3 * 10),
    ({"feature_group_count": 6}, (3, 3, 1, 6), 16 * 16 * 9 * 6),
  ],
)
def test_convolution_and_its_gradients(options, kernel, expected):
  def forward(x, kernel):
    return _conv(x, kernel, **options)

  def backward(x, kernel, argnum):
    return jax.grad(lambda *args: forward(*args).sum(), argnum)(x, kernel)

  x = _ones(2, 16, 16, 6)
  assert flops.count(forward, x, _ones(*kernel)) == 2 * 2 * expected
  # A gradient is a convolution of as many products, strides and groups or not.
  if options.get("padding") != "VALID" or options.get("stride") == kernel[0]:
    for argnum in (0, 1):
      got = flops.count(lambda x, k, i=argnum: backward(x, k, i), x, _ones(*kernel))
      # The forward's value is not needed, but it is in the jaxpr.
      assert got == 2 * 2 * 2 * expected


@pytest.mark.parametrize(("size", "stride"), [(4, 2), (2, 2), (3, 1)])
def test_transposed_convolution(size, stride):
  def forward(x, kernel):
    return lax.conv_transpose(
      x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  # Every input pixel meets every tap once, in every output channel.
  expected = 2 * 2 * 8 * 8 * size * size * 6 * 10
  assert flops.count(forward, _ones(2, 8, 8, 6), _ones(size, size, 6, 10)) == expected
  both = jax.grad(lambda *args: forward(*args).sum(), (0, 1))
  assert flops.count(both, _ones(2, 8, 8, 6), _ones(size, size, 6, 10)) == 3 * expected


def test_loops():
  x = _ones(4, 4)
  matmul = 2 * 4**3

  def scanned(x):
    return lax.scan(lambda c, _: (c @ c, c @ c @ c), x, None, length=7)

  assert flops.count(scanned, x) == 7 * 3 * matmul
  assert flops.count(lambda x: lax.fori_loop(0, 5, lambda i, c: c @ c, x), x) == 5 * matmul
  assert flops.count(lambda x: lax.map(lambda r: r @ x, x), x) == matmul

  def unknown(x):
    return lax.while_loop(lambda c: c[0, 0] < 9, lambda c: c @ c, x)

  assert flops.count(unknown, x) == matmul


def test_nested_calls():
  x = _ones(4, 4)

  @jax.custom_vjp
  def square(x):
    return x @ x

  square.defvjp(lambda x: (x @ x, x), lambda x, g: (g @ x.T + x.T @ g,))
  inner = jax.jit(lambda x: jax.nn.relu(square(x)))
  nested = jax.jit(lambda x: lax.scan(lambda c, _: (inner(c), None), x, None, length=3)[0])
  assert flops.count(nested, x) == 3 * 2 * 4**3
  assert flops.count(jax.grad(lambda x: nested(x).sum()), x) == 3 * 3 * 2 * 4**3
  assert flops.count(nested.trace(jnp.ones((4, 4))).jaxpr) == 3 * 2 * 4**3


def test_shard_map_counts_every_device():
  devices = mesh.make_mesh({"data": 4, "fsdp": 2})
  sharded = jax.shard_map(
    lambda x, w: x @ w,
    mesh=devices,
    in_specs=(PartitionSpec(("data", "fsdp")), PartitionSpec()),
    out_specs=PartitionSpec(("data", "fsdp")),
    axis_names={"data", "fsdp"},
  )
  assert flops.count(sharded, _ones(16, 4), _ones(4, 8)) == 2 * 16 * 4 * 8


def test_pallas_kernel():
  def matmul(a, b, out):
    out[...] = a[...] @ b[...]

  def call(estimate=None):
    return pl.pallas_call(
      matmul,
      out_shape=_ones(32, 32),
      grid=(2, 2),
      in_specs=[
        pl.BlockSpec((16, 8), lambda i, j: (i, 0)),
        pl.BlockSpec((8, 16), lambda i, j: (0, j)),
      ],
      out_specs=pl.BlockSpec((16, 16), lambda i, j: (i, j)),
      cost_estimate=estimate,
      interpret=True,
    )

  assert flops.count(call(), _ones(32, 8), _ones(8, 32)) == 2 * 32 * 32 * 8
  estimate = pl.CostEstimate(flops=77, transcendentals=0, bytes_accessed=0)
  assert flops.count(call(estimate), _ones(32, 8), _ones(8, 32)) == 77


def test_cond_counts_the_dearest_branch():
  def switch(i, x):
    return lax.switch(i, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x)

  def cond(x):
    return lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x @ x @ x, x)

  assert flops.count(cond, _ones(4, 4)) == 2 * 2 * 4**3
  index = jax.ShapeDtypeStruct((), jnp.int32)
  assert flops.count(jax.jit(switch), index, _ones(4, 4)) == 2 * 2 * 4**3


def test_every_divides_by_its_cadence():
  x, step = _ones(4, 4), jax.ShapeDtypeStruct((), jnp.int32)
  matmul = 2 * 4**3

  def penalty(x, step):
    return flops.every(16, step % 16 == 0, lambda x: (x @ x).sum(), lambda x: 0.0, x)

  assert flops.count(penalty, x, step) == matmul / 16
  # value, and two products in the gradient
  assert flops.count(jax.jit(jax.grad(penalty)), x, step) == 3 * matmul / 16

  def both(x, step):
    return flops.every(4, step % 4 == 0, lambda x: x @ x @ x, lambda x: x @ x, x)

  assert flops.count(both, x, step) == (2 + 3 * 1) * matmul / 4

  def nested(x, step):
    due = lambda x: lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x, x)  # noqa: E731
    return flops.every(16, step % 16 == 0, due, lambda x: x, x)

  assert flops.count(nested, x, step) == matmul / 16

  def scoped(x, step):
    with jax.named_scope("every_100_steps"):
      return lax.cond(x.sum() > 0, lambda x: x @ x, lambda x: x, x)

  assert flops.count(scoped, x, step) == matmul


def test_every_is_cond():
  run = jax.jit(
    lambda x, step: flops.every(2, step % 2 == 0, lambda x, y: x + y, lambda x, y: x, x, 1.0)
  )
  assert run(3.0, 0) == 4.0
  assert run(3.0, 1) == 3.0


def _dense_net(params, x):
  for kernel in params:
    x = jnp.tanh(x @ kernel)
  return jnp.mean(x**2)


def test_gradient_of_a_dense_net():
  widths = (16, 32, 64, 8)
  params = [_ones(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]
  forward = sum(2 * 4 * i * o for i, o in zip(widths[:-1], widths[1:], strict=True))
  assert flops.count(_dense_net, params, _ones(4, 16)) == forward
  # The first layer's input needs no gradient.
  expected = 3 * forward - 2 * 4 * 16 * 32
  assert flops.count(jax.value_and_grad(_dense_net), params, _ones(4, 16)) == expected


@pytest.mark.parametrize("policy", [None, jax.checkpoint_policies.dots_saveable])
@pytest.mark.parametrize("scanned", [False, True])
def test_recomputation_is_not_counted(scanned, policy):
  def layer(x, kernel):
    return jnp.tanh(jax.jit(jnp.dot)(jnp.sin(x @ kernel), kernel))

  def loss(params, x, layer):
    if scanned:
      x, _ = lax.scan(lambda x, kernel: (layer(x, kernel), None), x, params)
    else:
      for i in range(3):
        x = layer(x, params[i])
    return x.sum()

  checkpointed = jax.checkpoint(layer, policy=policy)
  params, x = _ones(3, 16, 16), _ones(4, 16)
  for argnums in (0, (0, 1)):
    step = jax.grad(loss, argnums)
    plain = flops.count(lambda p, x, step=step: step(p, x, layer), params, x)
    assert plain > 0
    assert flops.count(lambda p, x, step=step: step(p, x, checkpointed), params, x) == plain
  forward = 3 * 2 * 2 * 4 * 16 * 16
  assert flops.count(lambda p, x: loss(p, x, checkpointed), params, x) == forward


def test_attention():
  query, key = _ones(2, 64, 4, 32), _ones(2, 48, 4, 32)
  forward = 2 * 2 * 4 * 64 * 48 * (32 + 32)

  def attend(q, k):
    return jax.nn.dot_product_attention(q, k, k).sum()

  assert flops.count(attend, query, key) == forward
  assert flops.count(jax.grad(attend, (0, 1)), query, key) == 3 * forward


@pytest.mark.parametrize("layout", [0, 1])
def test_fused_attention_counts_like_the_products_it_replaces(layout):
  def swap(shape):
    return (shape[0], shape[2], shape[1], shape[3]) if layout else shape

  # The primitive exists on a GPU only; the rule reads shapes and layout.
  operands = [_ones(*swap(shape)) for shape in ((2, 64, 4, 32), (2, 48, 4, 32), (2, 48, 4, 16))]
  eqn = types.SimpleNamespace(
    primitive=types.SimpleNamespace(name="dot_product_attention_fwd_wrapper"),
    source_info=types.SimpleNamespace(name_stack=""),
    params={"layout": layout},
    invars=[types.SimpleNamespace(aval=x) for x in operands],
  )
  forward = 2 * 2 * 4 * 64 * 48 * (32 + 16)
  assert flops.count(types.SimpleNamespace(eqns=[eqn])) == forward
  eqn.primitive.name = "dot_product_attention_bwd_wrapper"
  assert flops.count(types.SimpleNamespace(eqns=[eqn])) == 2 * forward


@pytest.mark.parametrize(
  ("kind", "peak"),
  [
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", None),
    ("NVIDIA H200", 989e12),
    ("cpu", None),
  ],
)
def test_peak_flops(kind, peak):
  assert flops.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


def test_counts_agree_with_the_compiler():
  """Where XLA's convention is ours (no padding, no loop), the figures are equal
  but for elementwise work."""

  def net(x, kernel, dense):
    x = _conv(x, kernel, padding="VALID")
    return jnp.tanh(x.reshape(x.shape[0], -1) @ dense)

  args = (_ones(4, 10, 10, 16), _ones(3, 3, 16, 32), _ones(8 * 8 * 32, 64))
  compiled = jax.jit(net).lower(*args).compile().cost_analysis()
  assert math.isclose(flops.count(net, *args), compiled["flops"], rel_tol=0.01)
