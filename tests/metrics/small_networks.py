"""Networks so small that tests of what is around them are quick."""

import jax
import jax.numpy as jnp
import numpy as np

from t2i_jax.errors import UserError
from t2i_jax.metrics.network import Features, Network
from t2i_jax.metrics.registry import FEATURE_NET, INCEPTION, TOWERS
from t2i_jax.parallel.mesh import make_mesh

WIDTH, SIDE = 6, 12


def _outputs(variables, images):
  x = images.astype(jnp.float32).reshape(len(images), -1, 3)
  x = jnp.concatenate([x.mean(1), jnp.square(x / 64).mean(1), x[:, 0]], axis=-1) / 255
  features = jnp.tanh(x @ variables["kernel"])
  return {"features": features, "logits": 3 * features[:, :4]}


def _distances(variables, a, b):
  a, b = (_outputs(variables, x)["features"] for x in (a, b))
  return jnp.sum(jnp.square(a - b), axis=1)


def network(kind=INCEPTION, seed=0, preprocessing="as it is", **options):
  kernel = np.random.default_rng(seed).normal(size=(9, WIDTH)).astype("f4")
  return Network(
    kind, "small", preprocessing, {"kernel": kernel}, _outputs, distances=_distances,
    texts=lambda variables, ids: jnp.tanh(ids @ variables["kernel"]),
    tokens=lambda captions: np.array(
      [np.random.default_rng(list(c.encode())).normal(size=9) for c in captions], "f4"
    ), **options,
  )  # fmt: skip


def features(devices=1, batch_size=8, **options):
  mesh = make_mesh({"data": -1}, jax.devices()[:devices])
  return Features(network(**options), mesh, batch_size)


class Networks:
  """All kinds, of the same numbers."""

  def __init__(self, kinds=(INCEPTION, TOWERS, FEATURE_NET, "lpips-vgg"), **options):
    self.found = {kind: features(kind=kind, **options) for kind in kinds}

  def has(self, kind):
    return kind in self.found

  def of(self, kind, preprocessing=""):
    if kind not in self.found:
      raise UserError(f"no network {kind} was given")
    return self.found[kind]


def pictures(n, seed=0, side=SIDE):
  random = np.random.default_rng(seed)
  base = random.integers(0, 256, (n, 1, 1, 3))
  noise = random.integers(-40, 40, (n, side, side, 3))
  return np.clip(base + noise, 0, 255).astype(np.uint8)
