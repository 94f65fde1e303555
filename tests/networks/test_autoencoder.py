import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.autoencoder import LAST, Decoder, Encoder, last_layer

SMALL = {"latent_channels": 2, "channels": 4, "multipliers": (1, 2, 2), "blocks": 1, "groups": 2}


def filled(shapes, seed=9):
  """Random variables of given shapes; drawing them so compiles nothing."""
  random = np.random.default_rng(seed)

  def draw(path, leaf):
    around = 1.0 if path[-1].key == "scale" else 0.0
    return jnp.asarray(around + 0.3 * random.uniform(-1, 1, leaf.shape), leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def shapes(network, *shape):
  return jax.eval_shape(network.init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize(
  "options, parameters",
  [({}, 83_653_863), ({"latent_channels": 16, "pointwise": False}, 83_819_683)],
  ids=["4 channels", "16 channels"],
)
def test_published_sizes_have_their_numbers_of_parameters(options, parameters):
  channels = options.get("latent_channels", 4)
  both = shapes(Encoder(**options), 1, 64, 64, 3), shapes(Decoder(**options), 1, 8, 8, channels)
  assert sum(x.size for x in jax.tree.leaves(both)) == parameters


@pytest.mark.parametrize("levels, factor", [(1, 1), (3, 4), (4, 8), (5, 16)])
def test_every_level_but_the_first_halves_the_size(levels, factor):
  options = {**SMALL, "multipliers": (1,) * levels}
  encoder, decoder = Encoder(**options), Decoder(**options)
  moments = jax.eval_shape(
    encoder.apply, shapes(encoder, 1, 32, 48, 3), jnp.zeros((3, 32, 48, 3))
  )
  assert moments.shape == (3, 32 // factor, 48 // factor, 4) and moments.dtype == jnp.float32
  small = 1, 32 // factor, 48 // factor, 2
  images = jax.eval_shape(decoder.apply, shapes(decoder, *small), jnp.zeros(small))
  assert images.shape == (1, 32, 48, 3) and images.dtype == jnp.float32


def test_the_last_layer_can_be_applied_by_itself():
  decoder = Decoder(**SMALL)
  latents = jax.random.normal(jax.random.key(0), (2, 2, 2, 2))
  variables = filled(shapes(decoder, 2, 2, 2, 2))
  features = decoder.apply(variables, latents, features=True)
  assert features.shape == (2, 8, 8, 4)
  images = last_layer().apply({"params": variables["params"][LAST]}, features)
  np.testing.assert_array_equal(images, decoder.apply(variables, latents))


def test_levels_attend_where_they_are_told():
  for levels in ((), (1,), (0, 2)):
    for network, shape, way in (
      (Encoder(attention_levels=levels, **SMALL), (1, 8, 8, 3), "down"),
      (Decoder(attention_levels=levels, **SMALL), (1, 2, 2, 2), "up"),
    ):
      params = shapes(network, *shape)["params"]
      found = {name for name in params if name.endswith("attention")}
      blocks = 1 if way == "down" else 2
      expected = {f"{way}_{i}_{j}_attention" for i in levels for j in range(blocks)}
      assert found == expected | {"middle_attention"}
  assert "middle_attention" not in shapes(Encoder(middle_attention=False, **SMALL), 1, 8, 8, 3
                                          )["params"]  # fmt: skip


def test_rematerialisation_changes_neither_names_nor_numbers():
  images = jax.random.normal(jax.random.key(0), (1, 8, 8, 3))
  plain, remat = Encoder(**SMALL), Encoder(remat=True, **SMALL)
  variables = filled(shapes(plain, 1, 8, 8, 3))
  assert jax.tree.structure(shapes(remat, 1, 8, 8, 3)) == jax.tree.structure(variables)
  gradients = [
    jax.jit(jax.grad(lambda v, net=net: jnp.sum(jnp.sin(net.apply(v, images)))))(variables)
    for net in (plain, remat)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), *gradients)


def test_bfloat16_keeps_parameters_moments_and_pictures_in_float32():
  options = {**SMALL, "dtype": jnp.bfloat16}
  for network, shape in ((Encoder(**options), (1, 8, 8, 3)), (Decoder(**options), (1, 2, 2, 2))):
    variables = shapes(network, *shape)
    out = jax.eval_shape(network.apply, variables, jnp.zeros(shape))
    assert {x.dtype for x in jax.tree.leaves((variables, out))} == {jnp.dtype("float32")}
