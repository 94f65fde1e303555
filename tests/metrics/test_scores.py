"""What is collected of a stream of pictures: in any parts, order or number of runs the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_networks import SIDE, Networks, features, pictures

from t2i_jax.errors import UserError
from t2i_jax.metrics import registry, resize
from t2i_jax.metrics.frechet import Moments, frechet_distance
from t2i_jax.metrics.reference import Reference

NAMES = ["fid", "rfid", "kid", "precision_recall", "density_coverage", "is", "cmmd", "clip_score",
         "clip_cosine", "r_precision", "lpips_diversity", "lpips_distance", "psnr", "ssim",
         "codebook"]  # fmt: skip
N = 240
OPTIONS = {"subsets": 5, "subset_size": 20, "splits": 2, "vocabulary": 7}


@pytest.fixture(scope="module")
def networks():
  return Networks()


@pytest.fixture(scope="module")
def references(networks):
  real = [pictures(100, 7), pictures(90, 8)]
  return {
    kind: Reference.measure(found, real, "noise", rows=True)
    for kind, found in networks.found.items()
  }


@pytest.fixture(scope="module")
def stream():
  images = pictures(N)
  return {
    "images": images, "index": np.arange(N), "captions": [f"caption {i // 2}" for i in range(N)],
    "originals": np.clip(images.astype(int) + pictures(N, 5) // 16, 0, 255).astype(np.uint8),
    "codes": np.arange(3 * N).reshape(N, 3) % 5,
  }  # fmt: skip


def made(networks, references, names=NAMES, **options):
  return registry.make(names, networks, references, options={**OPTIONS, **options})


def rows(stream, at):
  take = lambda x: [x[i] for i in at] if isinstance(x, list) else x[at]  # noqa: E731
  return {name: take(value) for name, value in stream.items()}


def fed(scores, stream, *parts):
  for part in parts:
    scores.update(**rows(stream, part))
  return scores


@pytest.fixture(scope="module")
def whole(networks, references, stream):
  scores = fed(made(networks, references), stream, np.arange(N))
  return scores, scores.results()


def assert_same(one, other, tolerance=0.0):
  assert set(one) == set(other)
  for name, result in one.items():
    found = other[name]
    assert (result.n, result.about, result.remarks) == (found.n, found.about, found.remarks), name
    np.testing.assert_allclose(found.value, result.value, rtol=tolerance, err_msg=name)


def test_each_score_has_its_number_of_pictures_its_network_and_its_remarks(whole):
  _, results = whole
  assert {"precision", "recall", "density", "coverage", "codebook_usage"} < set(results)
  for name, result in results.items():
    described = json.loads(json.dumps(result.described()))
    assert described["n"] == N and np.isfinite(described["value"])
    assert str(N) in result.line() and name in result.line()
    of_pixels = name.startswith(("psnr", "ssim", "codebook"))
    assert of_pixels or {"network", "digest", "preprocessing"} <= set(described)
  few = {"kid", "precision", "is", "cmmd", "clip_score", "r_precision"}
  assert all(results[name].remarks for name in few)
  assert "published with clip-vit-b-32@224; this is small" in results["clip_score"].line()
  assert results["codebook_usage"].value == 5 / 7
  assert results["lpips_diversity"].about["pairs"] == N // 2
  assert results["fid"].about["reference_pictures"] == 190


def test_scores_are_the_functions_of_the_networks_features(whole, networks, references, stream):
  _, results = whole
  found = networks.of("inception").of(stream["images"])["features"]
  moments, reference = Moments(), references["inception"]
  moments.update(found)
  expected = frechet_distance(
    moments.mean, moments.covariance, reference.mean, reference.covariance
  )
  np.testing.assert_allclose(results["fid"].value, expected, rtol=1e-12)
  real = [pictures(100, 7), pictures(90, 8)]
  measured = networks.of("inception").of(np.concatenate(real))["features"].astype("f8")
  np.testing.assert_allclose(reference.covariance, np.cov(measured, rowvar=False), atol=1e-8)
  np.testing.assert_allclose(reference.rows, measured, atol=2e-6)
  distances = networks.of("inception").distance(stream["images"][::2], stream["images"][1::2])
  np.testing.assert_allclose(results["lpips_diversity"].value, distances.mean(), rtol=1e-6)


def test_any_parts_in_any_order_give_the_same(whole, networks, references, stream):
  order = np.random.default_rng(0).permutation(N)
  scores = fed(made(networks, references), stream, order[:3], order[3:100], order[100:])
  assert_same(whole[1], scores.results(), 1e-6)


def test_a_resumed_stream_gives_the_same_bits(networks, references, stream, tmp_path):
  parts = np.split(np.arange(N), [50, 130])
  uninterrupted = fed(made(networks, references), stream, *parts)
  begun = fed(made(networks, references), stream, *parts[:2])
  begun.save(tmp_path / "scores.npz")
  resumed = made(networks, references)
  resumed.restore(tmp_path / "scores.npz")
  assert resumed.n == 130 and resumed.resolution == (SIDE, SIDE)
  assert_same(uninterrupted.results(), fed(resumed, stream, parts[2]).results())
  assert [path.name for path in tmp_path.iterdir()] == ["scores.npz"]


def test_merged_parts_are_the_whole(whole, networks, references, stream):
  first = fed(made(networks, references), stream, np.arange(100, N))
  first.merge(made(networks, references))
  first.merge(fed(made(networks, references), stream, np.arange(100)))
  assert_same(whole[1], first.results(), 1e-6)


def test_eight_devices_give_the_features_of_one(stream):
  one, eight = features(1), features(8, batch_size=10)
  assert eight.batch_size == 16 and one.digest == eight.digest
  images, captions = stream["images"][:37], stream["captions"][:37]
  for name, value in one.of(images).items():
    assert len(value) == 37
    np.testing.assert_allclose(eight.of(images)[name], value, atol=2e-6)
  np.testing.assert_allclose(eight.read(captions), one.read(captions), atol=2e-6)
  np.testing.assert_allclose(
    eight.distance(images, images[::-1]), one.distance(images, images[::-1]), atol=2e-6
  )


def test_a_network_runs_once_for_all_metrics(networks, references, stream, monkeypatch):
  found, calls = networks.of("inception"), []
  monkeypatch.setattr(found, "of", lambda images, of=found.of: calls.append(len(images)) or of(
    images
  ))  # fmt: skip
  fed(made(networks, references, ["fid", "kid", "is", "precision_recall"]), stream, np.arange(40))
  assert calls == [40]


def test_a_feature_net_gives_its_own_name_and_says_what_it_is(references, stream):
  remark = "of a small classifier"
  networks = Networks(["feature-net"], label="scenes", remarks=(remark,))
  names = ["fd_feature_net", "rfd_feature_net", "kd_feature_net", "precision_recall_feature_net"]
  reference = Reference.measure(networks.of("feature-net"), [pictures(90, 8)], "noise", rows=True)
  scores = made(networks, {"feature-net": reference}, names)
  results = fed(scores, stream, np.arange(60)).results()
  assert list(results) == ["fd_scenes", "rfd_scenes", "kd_scenes", "precision_scenes",
                           "recall_scenes"]  # fmt: skip
  assert all(remark in result.line() for result in results.values())


def test_few_pictures_are_said_or_refused(networks, references, stream):
  results = fed(made(networks, references, ["fid"]), stream, np.arange(5)).results()
  assert "5 pictures for 6 features: biased upwards" in results["fid"].line()
  assert "not full rank" in results["fid"].line()
  enough = fed(made(networks, references, ["fid"]), stream, np.arange(200)).results()
  assert not enough["fid"].remarks
  for name, least in (("is", 20), ("r_precision", 100), ("fid", 2), ("precision_recall", 4)):
    scores = fed(made(networks, references, [name]), stream, np.arange(1))
    with pytest.raises(UserError, match=f"{name} needs at least {least} pictures, and there are 1"):
      scores.results()
  scores = fed(made(networks, references, ["r_precision"]), stream, np.arange(120))
  with pytest.raises(UserError, match="needs 100 different captions, and there are 60"):
    scores.results()
  scores = fed(made(networks, references, ["lpips_diversity"]), stream, np.arange(0, 40, 2))
  with pytest.raises(UserError, match="needs several pictures of a caption"):
    scores.results()


def test_pictures_that_do_not_belong_are_refused_and_nothing_is_kept(networks, references, stream):
  scores = fed(made(networks, references), stream, np.arange(10))
  before = scores.n
  other = rows(stream, np.arange(10, 20))
  for change, message in (
    ({"index": np.arange(9, 19)}, "picture 9 was measured already"),
    ({"index": np.full(10, 30)}, "picture 30 was measured already"),
    ({"images": pictures(10, side=16), "originals": None}, "pictures of 16x16 after some of 12x12"),
    ({"captions": None}, "clip_score needs the pictures' captions"),
    ({"captions": ["one"]}, "1 captions for 10 pictures"),
    ({"codes": np.full((10, 3), 7)}, "codes are int64 from 7 to 7, and the vocabulary has 7"),
    ({"images": other["images"] / 255}, "metrics take uint8"),
  ):
    with pytest.raises(UserError, match=message):
      scores.update(**{**other, **change})
  assert scores.n == before
  fed(scores, stream, np.arange(10, N))
  assert scores.results()["psnr"].n == N


def test_pixels_that_are_equal_are_left_out_and_said(networks, references, stream):
  scores = made(networks, references, ["psnr"])
  images = stream["images"]
  scores.update(images[:4], originals=np.concatenate([images[:1], stream["originals"][1:4]]))
  result = scores.results()["psnr"]
  assert np.isfinite(result.value) and "1 pictures are equal" in result.line()
  same = made(networks, references, ["psnr"])
  same.update(images[:4], originals=images[:4])
  assert same.results()["psnr"].described()["value"] == "inf"


@pytest.mark.parametrize("names, options, message", [
  (["fidd"], {}, "unknown metric 'fidd'; did you mean 'fid'"),
  (["fid"], {"subset": 3}, "unknown option of the metrics 'subset'; did you mean 'subsets'"),
  (["fid"], {"subsets": 0}, "subsets=0 of the metrics: use a number of 1 or more"),
  (["fd_dinov2"], {}, "fd_dinov2 needs the network dinov2, of which no file was given; give one, "
   "or take fd_feature_net"),
])  # fmt: skip
def test_what_cannot_be_made_is_one_line(networks, references, names, options, message):
  with pytest.raises(UserError, match=message):
    made(networks, references, names, **options)


def test_what_a_metric_needs_is_known_before_it_is_made(networks, references):
  assert registry.entry("kid").needs == {"reference", "reference_rows"}
  assert set(registry.reference_networks(["fid", "kid", "psnr", "cmmd"], networks)) == {
    "inception", "clip-vit"
  }
  assert made(networks, references).needs == {"captions", "originals", "codes"}
  with pytest.raises(UserError, match="fid needs a reference of real pictures"):
    made(networks, {}, ["fid"])
  with pytest.raises(UserError, match="codebook needs the option vocabulary"):
    registry.make(["codebook"], networks)
  with pytest.raises(UserError, match="ssim has windows of 11 pixels, and the pictures are 8x8"):
    made(networks, references, ["ssim"]).check((8, 8))
  for entry in registry.METRICS.values():
    assert entry.line and entry.needs <= set(registry.NEEDS)
    assert entry.network in ("", *registry.KINDS)
    assert not entry.instead or entry.instead in registry.METRICS


def test_a_saved_state_of_other_metrics_is_refused(networks, references, stream, tmp_path):
  fed(made(networks, references, ["fid"]), stream, np.arange(10)).save(tmp_path / "scores.npz")
  with pytest.raises(UserError, match="was measured with metrics .'fid'., and this is .'kid'."):
    made(networks, references, ["kid"]).restore(tmp_path / "scores.npz")
  other = registry.make(["fid"], Networks(seed=3), {
    "inception": Reference.measure(Networks(["inception"], seed=3).of("inception"),
                                   [pictures(50)], "noise")
  }, options=OPTIONS)  # fmt: skip
  with pytest.raises(UserError, match="was measured with networks"):
    other.restore(tmp_path / "scores.npz")
  with pytest.raises(UserError, match="other metrics, networks or references cannot be merged"):
    other.merge(made(networks, references, ["fid"]))
  (tmp_path / "scores.npz").write_bytes((tmp_path / "scores.npz").read_bytes()[:500])
  with pytest.raises(UserError, match="is no whole npz file"):
    made(networks, references, ["fid"]).restore(tmp_path / "scores.npz")


def test_the_page_of_scores_names_every_metric_and_network():
  page = (Path(__file__).parents[2] / "docs" / "scores.md").read_text()
  for name, entry in registry.METRICS.items():
    assert f"`{name}`" in page or "feature_net" in name, name
    assert not entry.network or f"`{entry.network}`" in page
  for mode in resize.MODES:
    assert f"`{mode}`" in page
