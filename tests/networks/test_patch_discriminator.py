import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.networks.patch_discriminator import PatchDiscriminator


def shapes(network, side):
  image = jnp.zeros((1, side, side, 3))
  return jax.eval_shape(lambda: network.init(jax.random.key(0), image, True))


def test_published_size_has_its_number_of_parameters():
  found = shapes(PatchDiscriminator(), 256)["params"]
  # 2,768,705 of pix2pix's, which sees two pictures, less the first layer's kernels for one.
  assert sum(x.size for x in jax.tree.leaves(found)) == 2_768_705 - 4 * 4 * 3 * 64


@pytest.mark.parametrize(
  "layers, side, logits", [(3, 256, 30), (3, 24, 1), (2, 64, 14), (1, 16, 6)]
)
def test_one_logit_a_patch(layers, side, logits):
  network = PatchDiscriminator(4, layers)
  found = jax.eval_shape(
    lambda v: network.apply(v, jnp.zeros((2, side, side, 3)), False), shapes(network, side)
  )
  assert found.shape == (2, logits, logits) and found.dtype == jnp.float32


@pytest.mark.parametrize("layers, patch", [(3, 70), (2, 34)])
def test_a_logit_sees_its_patch_and_nothing_else(layers, patch):
  side = 2 * patch + 20
  network = PatchDiscriminator(2, layers)
  image = jax.random.normal(jax.random.key(0), (1, side, side, 3))
  variables = network.init(jax.random.key(1), image, False)
  middle = lambda x: network.apply(variables, x, False)[0][9, 9]  # noqa: E731
  seen = np.abs(jax.jit(jax.grad(middle))(image)[0]).sum(axis=-1) > 0
  rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
  for found in (rows, columns):
    assert found[-1] - found[0] + 1 == patch


def test_statistics_are_state_and_start_as_published():
  network = PatchDiscriminator(8, 2)
  image = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
  variables = network.init(jax.random.key(1), image, True)
  params = variables["params"]
  assert set(params) == {"conv_0", "conv_1", "conv_2", "norm_1", "norm_2", "score"}
  assert "bias" in params["conv_0"] and "bias" not in params["conv_1"]
  assert 0.015 < np.std(params["conv_2"]["kernel"]) < 0.025
  assert 0.0 < np.std(params["norm_2"]["scale"]) < 0.04
  _, new = network.apply(variables, image, True, mutable=["batch_stats"])
  assert np.abs(new["batch_stats"]["norm_1"]["mean"]).max() > 0
  with_own = network.apply(variables, image, True, mutable=["batch_stats"])[0]
  assert np.abs(with_own - network.apply(variables, image, False)).max() > 1e-3
