import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t2i_jax.errors import UserError
from t2i_jax.parallel import mesh as mesh_lib
from t2i_jax.parallel import sharding


@pytest.fixture(name="mesh", scope="module")
def _mesh():
  return mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def _spec(rule, shape, mesh):
  tree = {"x": jax.ShapeDtypeStruct(shape, jnp.float32)}
  return sharding.shardings(tree, sharding.parse_rules([(".*", rule)]), mesh)["x"].spec


@pytest.mark.parametrize(
  ("rule", "shape", "expected"),
  [
    ("replicate", (256, 256), (None, None)),
    ("fsdp", (256, 512), (None, "fsdp")),
    ("fsdp", (512, 256), ("fsdp", None)),
    ("fsdp", (3, 3, 64, 64), (None, None, None, "fsdp")),
    ("fsdp", (513, 256), (None, "fsdp")),  # the largest does not divide
    ("fsdp", (513, 257), (None, None)),
    ("fsdp", (64, 64), (None, None)),  # below the least size
    ("fsdp", (), ()),
    ("tensor(-1)", (4, 6), (None, "tensor")),
    ("tensor(0)", (4, 6), ("tensor", None)),
    ("tensor(-1)", (4, 5), (None, None)),
    ("tensor(-2)", (4,), (None,)),  # an axis that the shape lacks
    ("tensor(-1)", (), ()),
    ("tensor(-1)+fsdp", (256, 512), ("fsdp", "tensor")),
    ("tensor(-1) + fsdp", (512, 256), ("fsdp", "tensor")),
    ("fsdp+tensor(-1)", (256, 512), (None, "fsdp")),  # the axis is taken
    ("tensor(-1)+fsdp", (2**15,), ("tensor",)),
  ],
)
def test_rules(rule, shape, expected, mesh):
  assert _spec(rule, shape, mesh) == PartitionSpec(*expected)


def test_rules_do_nothing_on_axes_of_size_one():
  mesh = mesh_lib.make_mesh({"data": -1})
  assert _spec("tensor(-1)+fsdp", (512, 512), mesh) == PartitionSpec(None, None)


def test_first_match_wins_and_no_match_replicates(mesh):
  rules = sharding.parse_rules(
    [("attention/.*kernel$", "tensor(-1)"), ("kernel", "tensor(0)"), ("", "replicate")]
  )
  tree = {
    "g": {"attention": {"query": {"kernel": jnp.zeros((4, 4))}}, "out": {"kernel": jnp.zeros(4)}}
  }
  specs = sharding.shardings(tree, rules, mesh)["g"]
  assert specs["attention"]["query"]["kernel"].spec == PartitionSpec(None, "tensor")
  assert specs["out"]["kernel"].spec == PartitionSpec("tensor")
  assert sharding.shardings(tree, (), mesh)["g"]["out"]["kernel"].spec == PartitionSpec(None)


def test_optimizer_states_follow_their_parameters(mesh):
  params = {"block": {"kernel": jnp.zeros((128, 256)), "bias": jnp.zeros((256,))}}
  rules = sharding.parse_rules([("block/kernel$", "tensor(-1)+fsdp")])
  expected = PartitionSpec("fsdp", "tensor")

  adam = jax.eval_shape(optax.adamw(1e-3).init, params)
  state = sharding.shardings(adam, rules, mesh)
  assert state[0].mu["block"]["kernel"].spec == expected
  assert state[0].nu["block"]["kernel"].spec == expected
  assert state[0].nu["block"]["bias"].spec == PartitionSpec(None)
  assert state[0].count.spec == PartitionSpec()

  # Adafactor keeps a row, a column and placeholders of one element.
  factored = jax.eval_shape(optax.adafactor(1e-3).init, params)
  state = sharding.shardings(factored, rules, mesh)
  placed = jax.tree.map(
    lambda leaf, where: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), where), factored, state
  )
  assert jax.tree.structure(placed) == jax.tree.structure(factored)


@pytest.mark.parametrize(
  ("pairs", "words"),
  [
    ([("(", "fsdp")], ["'('", "bad regex"]),
    ([(".*", "fdsp")], ["'fdsp'", "did you mean 'fsdp'"]),
    ([(".*", "tensor")], ["'tensor'", "tensor(axis)"]),
    ([(".*", "tensor()")], ["tensor(axis)"]),
    ([(".*", "fsdp(1)")], ["fsdp(1)"]),
    ([(".*", "tensor(x)")], ["tensor(x)"]),
    ([(".*", "replicate+fsdp")], ["replicate alone"]),
    ([(".*", "fsdp+fsdp")], ["once"]),
    ([(".*",)], ["(regex, rule)"]),
    ([".*"], ["(regex, rule)"]),
  ],
)
def test_bad_rules_are_named(pairs, words):
  with pytest.raises(UserError) as error:
    sharding.parse_rules(pairs)
  assert all(word in str(error.value) for word in words), str(error.value)


def test_logical_is_the_identity_without_a_mesh():
  x = jnp.ones((8, 4, 6))
  jaxpr = jax.make_jaxpr(lambda x: sharding.logical(x, "batch", "length", "mlp"))(x)
  assert not jaxpr.eqns
  with jax.set_mesh(mesh_lib.make_mesh({}, jax.devices()[:1])):
    jaxpr = jax.make_jaxpr(lambda x: sharding.logical(x, "batch", "length", "mlp"))(x)
  assert not jaxpr.eqns


def test_logical_constrains_inside_jit(mesh):
  x = jnp.ones((8, 4, 6))
  with jax.set_mesh(mesh):
    y = jax.jit(lambda x: sharding.logical(x, "batch", "length", "mlp"))(x)
    assert sharding.logical(x, "batch", "length", "mlp") is x
  expected = PartitionSpec(("slice", "data", "fsdp"), None, "tensor")
  assert y.sharding.is_equivalent_to(NamedSharding(mesh, expected), 3)
  assert y.addressable_shards[0].data.shape == (2, 4, 3)


def test_logical_leaves_what_does_not_divide(mesh):
  with jax.set_mesh(mesh):
    mark = jax.jit(lambda x: sharding.logical(x, "batch", "length", "mlp"))
    assert mark(jnp.ones((6, 4, 6))).addressable_shards[0].data.shape[2] == 3
    jaxpr = jax.make_jaxpr(lambda x: sharding.logical(x, "batch", None))(jnp.ones((6, 4)))
    assert not jaxpr.eqns


def test_logical_under_grad_vmap_and_shard_map(mesh):
  def loss(w, x):
    return jnp.sum(sharding.logical(x @ w, "batch", "mlp") ** 2)

  w, x = jnp.ones((4, 6)), jnp.arange(32.0).reshape(8, 4)
  plain = jax.grad(loss)(w, x)
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(w, x), plain)
    mapped = jax.jit(jax.vmap(loss, (None, 0)))(w, x.reshape(2, 4, 4))
    per_shard = jax.shard_map(
      lambda x: sharding.logical(x * 2, "batch", "mlp"),
      in_specs=PartitionSpec("data"),
      out_specs=PartitionSpec("data"),
    )
    np.testing.assert_array_equal(jax.jit(per_shard)(x), x * 2)
  assert mapped.sum() == loss(w, x)


def test_logical_wants_a_name_for_every_dimension(mesh):
  with pytest.raises(ValueError, match="2 names"):
    sharding.logical(jnp.ones((8, 4, 6)), "batch", "mlp")


def test_put(mesh):
  batch = {"image": np.arange(8 * 3, dtype=np.uint8).reshape(8, 3), "label": np.arange(8)}
  placed = sharding.put(batch, mesh_lib.batch_sharding(mesh))
  assert placed["image"].dtype == np.uint8
  assert placed["image"].addressable_shards[0].data.shape == (2, 3)
  np.testing.assert_array_equal(placed["image"], batch["image"])


def test_sharded_step_equals_one_device(mesh):
  key = jax.random.key(0)
  params = {
    "up": {"kernel": jax.random.normal(key, (128, 256))},
    "down": {"kernel": jax.random.normal(key, (256, 128))},
  }
  x = np.asarray(jax.random.normal(key, (8, 128)))

  def loss(params, x):
    h = sharding.logical(jax.nn.gelu(x @ params["up"]["kernel"]), "batch", "mlp")
    return jnp.mean((h @ params["down"]["kernel"]) ** 2)

  rules = sharding.parse_rules([("up/kernel", "tensor(-1)+fsdp"), ("down/", "tensor(0)+fsdp")])
  where = sharding.shardings(params, rules, mesh)
  expected, expected_grads = jax.value_and_grad(loss)(params, x)
  with jax.set_mesh(mesh):
    step = jax.jit(jax.value_and_grad(loss), out_shardings=(mesh_lib.replicated(mesh), where))
    value, grads = step(
      jax.device_put(params, where), sharding.put(x, mesh_lib.batch_sharding(mesh))
    )
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert grads["up"]["kernel"].addressable_shards[0].data.shape == (64, 128)
  np.testing.assert_allclose(
    grads["up"]["kernel"], expected_grads["up"]["kernel"], rtol=1e-4,
    atol=2e-5 * np.abs(expected_grads["up"]["kernel"]).max(),  # sums in another order
  )
