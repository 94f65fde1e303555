"""References: kept whole, and refused where they are of something else."""

import numpy as np
import pytest
from small_networks import SIDE, features, pictures

from t2i_jax.errors import UserError
from t2i_jax.metrics.reference import Reference

SIZE = (SIDE, SIDE)


@pytest.fixture(scope="module")
def network():
  return features()


@pytest.fixture
def reference(network):
  return Reference.measure(network, [pictures(20), pictures(9, 1)], "noise", rows=True)


def test_what_is_saved_is_read_again(network, reference, tmp_path):
  reference.save(tmp_path / "folder" / "reference.npz")
  again = Reference.load(tmp_path / "folder" / "reference.npz")
  for name in ("mean", "covariance", "rows"):
    np.testing.assert_array_equal(getattr(again, name), getattr(reference, name))
  assert (again.n, again.about, again.digest) == (29, reference.about, reference.digest)
  again.check(network, SIZE, rows=True)
  assert not again.remarks and again.described()["reference"] == "noise"
  # pytorch-fid and others find what they look for.
  with np.load(tmp_path / "folder" / "reference.npz") as file:
    np.testing.assert_array_equal(file["mu"], reference.mean)
    np.testing.assert_array_equal(file["sigma"], reference.covariance)


def test_a_file_of_mean_and_covariance_alone_is_taken_and_said(network, reference, tmp_path):
  np.savez(tmp_path / "plain.npz", mu=reference.mean, sigma=reference.covariance)
  plain = Reference.load(tmp_path / "plain.npz")
  plain.check(network, SIZE)
  assert plain.n == 0 and "not known" in plain.remarks[0]
  with pytest.raises(UserError, match="has mean and covariance only"):
    plain.check(network, SIZE, rows=True)
  np.savez(tmp_path / "other.npz", mu=np.zeros(3), sigma=np.eye(3))
  with pytest.raises(UserError, match="the reference is of 3 features and small has 6"):
    Reference.load(tmp_path / "other.npz").check(network, SIZE)


def test_another_network_preprocessing_or_resolution_is_refused(network, reference):
  for other, size, message in (
    (features(seed=1), SIZE, "digest"), (features(preprocessing="resized"), SIZE, "preprocessing"),
    (network, (16, 16), r"resolution \[12, 12\] and the pictures have \[16, 16\]"),
  ):
    with pytest.raises(UserError, match=f"the reference has {message}"):
      reference.check(other, size)
  reference.check(network, SIZE)


@pytest.mark.parametrize("arrays, message", [
  ({"mu": np.zeros(3)}, "has no sigma; its arrays are mu"),
  ({"mu": np.zeros(3), "sigma": np.eye(4)}, "are no mean and covariance"),
  ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "holds NaN or infinity"),
  ({"mu": np.array([{}]), "sigma": np.eye(1)}, "is no whole npz file"),
])  # fmt: skip
def test_files_of_something_else_are_refused(arrays, message, tmp_path):
  np.savez(tmp_path / "bad.npz", **arrays)
  with pytest.raises(UserError, match=message):
    Reference.load(tmp_path / "bad.npz")


def test_damaged_and_missing_files_are_refused(reference, tmp_path):
  with pytest.raises(UserError, match="no file at"):
    Reference.load(tmp_path / "none.npz")
  path = tmp_path / "reference.npz"
  reference.save(path)
  with np.load(path) as file:
    arrays = {name: file[name] for name in file.files}
  arrays["mu"] = arrays["mu"] + 1e-9
  np.savez(path, **arrays)
  with pytest.raises(UserError, match="does not hold what was written to it"):
    Reference.load(path)
  path.write_text("text")
  with pytest.raises(UserError, match="is no whole npz file"):
    Reference.load(path)


def test_pictures_of_one_size_and_at_least_two(network):
  with pytest.raises(UserError, match="are 12x12 and 16x16"):
    Reference.measure(network, [pictures(3), pictures(3, side=16)], "noise")
  with pytest.raises(UserError, match="a reference of 1 pictures has no covariance"):
    Reference.measure(network, [pictures(1)], "noise")
