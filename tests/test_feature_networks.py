"""Networks from the files that a user gives, and metrics of pictures through them."""

import jax
import numpy as np
import pytest
from runs import ROOT, config_of

from t2i_jax import assembly, batch_spec, export, feature_networks
from t2i_jax.errors import UserError
from t2i_jax.feature_networks import Networks
from t2i_jax.metrics import registry
from t2i_jax.metrics.reference import Reference
from t2i_jax.parallel.mesh import make_mesh
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.text.tokenizer import Tokenizers, train_tokenizer

SIDE = 16


def pictures(n, seed=0, side=SIDE):
  return np.random.default_rng(seed).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def written(folder, name, tokenizers):
  """An untrained export."""
  config = config_of(ROOT / f"configs/{name}.py")
  system = assembly.build_system(config)
  shapes = batch_spec.abstract_batch(system, 1)
  batch = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  variables = jax.jit(system.init)(jax.random.key(0), batch)
  export.write(folder, config, 0, variables, tokenizers)
  return system, variables


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled_programs):
  return tmp_path_factory.mktemp("networks")


@pytest.fixture(scope="module")
def mesh():
  return make_mesh({"data": -1}, jax.devices()[:2])


@pytest.fixture(scope="module")
def feature_net(folder):
  return folder / "feature_net", *written(folder / "feature_net", "feature_net", Tokenizers({}))


@pytest.fixture(scope="module")
def towers(folder):
  system, variables = None, None
  tokenizer = train_tokenizer([f"a ring {i}" for i in range(9)], 300, 40)
  system, variables = written(folder / "towers", "clip", Tokenizers({"encoder": tokenizer}))
  return folder / "towers", system, variables, tokenizer


def test_a_feature_net_measures_distances_called_by_its_data_set(feature_net, mesh):
  path, system, variables = feature_net
  networks = Networks({"feature-net": path}, mesh, batch_size=8)
  features, images = networks.of("feature-net"), pictures(20)
  expected = system.features(variables, normalize_images(images))
  np.testing.assert_allclose(features.of(images)["features"], expected, atol=1e-4)
  others = pictures(20, 1)
  distances = system.distance(variables, *map(normalize_images, (images, others)))
  np.testing.assert_allclose(features.distance(images, others), distances, rtol=1e-3)

  names = ["fd_feature_net", "feature_net_diversity"]
  found = registry.reference_networks(names, networks)
  reference = Reference.measure(found["feature-net"], [pictures(30, 2)], "noise")
  scores = registry.make(names, networks, {"feature-net": reference})
  scores.update(images, captions=["one"] * 10 + ["two"] * 10)
  results = scores.results()
  assert list(results) == ["fd_scenes", "feature_net_diversity"]
  for result in results.values():
    assert "small classifier of scenes" in result.line()
    assert result.about["digest"] == features.digest
  assert results["feature_net_diversity"].about["pairs"] == 90


def test_what_a_network_cannot_measure_is_known_before_any_picture(feature_net, mesh):
  networks = Networks({"feature-net": feature_net[0]}, mesh)
  scores = registry.make(["feature_net_distance"], networks)
  with pytest.raises(UserError, match="feature_net: a side of 18 pixels does not divide"):
    scores.check((18, 18))
  scores.check((SIDE, SIDE))


def test_towers_read_pictures_and_captions(towers, mesh):
  path, system, variables, tokenizer = towers
  networks = Networks({"clip-vit": path}, mesh, batch_size=4)
  features = networks.of("clip-vit")
  assert features is networks.of("clip-vit") and features.name == "clip-vit-16x1-8@16"
  captions, images = ["a ring", "two rings", "no ring"], pictures(3)
  seen = system.embed_images(variables, normalize_images(images))
  read = system.embed_text(variables, tokenizer.encode(captions))
  np.testing.assert_allclose(features.of(images)["features"], seen, atol=1e-4)
  np.testing.assert_allclose(features.read(captions), read, atol=1e-4)
  # CMMD's pictures are resized in another way, and its references say so.
  other = networks.of("clip-vit", "cmmd")
  large = pictures(3, side=40)
  assert other.digest == features.digest and other.preprocessing != features.preprocessing
  assert np.abs(other.of(large)["features"] - features.of(large)["features"]).max() > 1e-4
  assert set(registry.reference_networks(["cmmd"], networks).values()) == {other}
  scores = registry.make(["clip_cosine", "clip_score"], networks)
  scores.update(images, captions=captions)
  cosines = np.sum(np.asarray(seen) * np.asarray(read), axis=1)
  np.testing.assert_allclose(scores.results()["clip_cosine"].value, 100 * cosines.mean(), atol=0.01)


def test_what_was_not_given_or_is_something_else_is_one_line(feature_net, towers, mesh, tmp_path):
  with pytest.raises(UserError, match="unknown kind of network 'inceptoin'; did you mean"):
    Networks({"inceptoin": "x"}, mesh)
  with pytest.raises(UserError, match="unknown preprocessing of the Inception 'tf'"):
    Networks({}, mesh, preprocessing="tf")
  networks = Networks({
    "inception": tmp_path / "none.pth", "feature-net": towers[0], "clip-vit": feature_net[0],
    "lpips-vgg": tmp_path, "dinov2": tmp_path,
  }, mesh)  # fmt: skip
  for kind, message in (
    ("inception", "no Inception at .*published as"), ("lpips-vgg", "no vgg16-.*published as"),
    ("feature-net", "is an export of clip, not of feature_net"),
    ("clip-vit", "is an export of feature_net, not of clip"),
    ("dinov2", "no config.json in .*DINOv2"),
  ):
    with pytest.raises(UserError, match=message):
      networks.of(kind)
  none = Networks({"inception": ""}, mesh)
  assert not none.has("inception")
  with pytest.raises(UserError, match="no network inception was given; it is read from pt_"):
    none.of("inception")
  with pytest.raises(UserError, match="fid needs the network inception, of which no file was given;"
                     " give one, or take fd_feature_net with a feature_net export"):
    registry.make(["fid"], none)
  assert set(feature_networks.SOURCES) == set(registry.KINDS)
