"""The Frechet distance's Inception from a file in its public format, against the network in torch.

The reference here is written of the published architecture, a sixteenth as wide. At full width, by
hand (docs/scores.md, "Checked against"): torch-fidelity 0.4.0 and pytorch-fid 0.3.0 with the same
He-normal weights give the same features to 6e-7 of the largest, in all three preprocessings.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

import jax  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from t2i_jax.errors import UserError  # noqa: E402
from t2i_jax.metrics import resize  # noqa: E402
from t2i_jax.metrics.inception import Inception  # noqa: E402
from t2i_jax.weights.inception import load_inception  # noqa: E402
from t2i_jax.weights.safetensors_file import write_safetensors  # noqa: E402

DIVISOR = 16


class Conv(nn.Module):
  def __init__(self, given, channels, size=1, **options):
    super().__init__()
    self.conv = nn.Conv2d(given, channels, size, bias=False, **options)
    self.bn = nn.BatchNorm2d(channels, eps=0.001)

  def forward(self, x):
    return F.relu(self.bn(self.conv(x)))


def average(x):
  return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Block(nn.Module):
  """Branches of convolutions: a dictionary from names to (given, channels, size, options)."""

  def __init__(self, convolutions, branches):
    super().__init__()
    for name, (given, channels, size, options) in convolutions.items():
      self.add_module(f"branch{name}", Conv(given, channels, size, **options))
    self.branches = branches

  def forward(self, x):
    return torch.cat(self.branches(x, lambda name, y: getattr(self, f"branch{name}")(y)), 1)


def w(channels):
  return channels // DIVISOR


def block_a(given, pooled):
  same = lambda p: dict(padding=p)  # noqa: E731
  return Block({
    "1x1": (given, w(64), 1, {}), "5x5_1": (given, w(48), 1, {}),
    "5x5_2": (w(48), w(64), 5, same(2)), "3x3dbl_1": (given, w(64), 1, {}),
    "3x3dbl_2": (w(64), w(96), 3, same(1)), "3x3dbl_3": (w(96), w(96), 3, same(1)),
    "_pool": (given, pooled, 1, {}),
  }, lambda x, of: [
    of("1x1", x), of("5x5_2", of("5x5_1", x)), of("3x3dbl_3", of("3x3dbl_2", of("3x3dbl_1", x))),
    of("_pool", average(x)),
  ])  # fmt: skip


def block_b(given):
  half = dict(stride=2)
  return Block({
    "3x3": (given, w(384), 3, half), "3x3dbl_1": (given, w(64), 1, {}),
    "3x3dbl_2": (w(64), w(96), 3, dict(padding=1)), "3x3dbl_3": (w(96), w(96), 3, half),
  }, lambda x, of: [
    of("3x3", x), of("3x3dbl_3", of("3x3dbl_2", of("3x3dbl_1", x))), F.max_pool2d(x, 3, 2),
  ])  # fmt: skip


WIDE, TALL = ((1, 7), dict(padding=(0, 3))), ((7, 1), dict(padding=(3, 0)))


def block_c(given, c):
  return Block({
    "1x1": (given, w(192), 1, {}), "7x7_1": (given, c, 1, {}), "7x7_2": (c, c, *WIDE),
    "7x7_3": (c, w(192), *TALL), "7x7dbl_1": (given, c, 1, {}), "7x7dbl_2": (c, c, *TALL),
    "7x7dbl_3": (c, c, *WIDE), "7x7dbl_4": (c, c, *TALL), "7x7dbl_5": (c, w(192), *WIDE),
    "_pool": (given, w(192), 1, {}),
  }, lambda x, of: [
    of("1x1", x), of("7x7_3", of("7x7_2", of("7x7_1", x))),
    of("7x7dbl_5", of("7x7dbl_4", of("7x7dbl_3", of("7x7dbl_2", of("7x7dbl_1", x))))),
    of("_pool", average(x)),
  ])  # fmt: skip


def block_d(given):
  half = dict(stride=2)
  return Block({
    "3x3_1": (given, w(192), 1, {}), "3x3_2": (w(192), w(320), 3, half),
    "7x7x3_1": (given, w(192), 1, {}), "7x7x3_2": (w(192), w(192), *WIDE),
    "7x7x3_3": (w(192), w(192), *TALL), "7x7x3_4": (w(192), w(192), 3, half),
  }, lambda x, of: [
    of("3x3_2", of("3x3_1", x)), of("7x7x3_4", of("7x7x3_3", of("7x7x3_2", of("7x7x3_1", x)))),
    F.max_pool2d(x, 3, 2),
  ])  # fmt: skip


def block_e(given, pool):
  wide, tall = ((1, 3), dict(padding=(0, 1))), ((3, 1), dict(padding=(1, 0)))

  def branches(x, of):
    three, double = of("3x3_1", x), of("3x3dbl_2", of("3x3dbl_1", x))
    return [of("1x1", x), of("3x3_2a", three), of("3x3_2b", three), of("3x3dbl_3a", double),
            of("3x3dbl_3b", double), of("_pool", pool(x))]  # fmt: skip

  return Block({
    "1x1": (given, w(320), 1, {}), "3x3_1": (given, w(384), 1, {}),
    "3x3_2a": (w(384), w(384), *wide), "3x3_2b": (w(384), w(384), *tall),
    "3x3dbl_1": (given, w(448), 1, {}), "3x3dbl_2": (w(448), w(384), 3, dict(padding=1)),
    "3x3dbl_3a": (w(384), w(384), *wide), "3x3dbl_3b": (w(384), w(384), *tall),
    "_pool": (given, w(192), 1, {}),
  }, branches)  # fmt: skip


class Reference(nn.Module):
  def __init__(self):
    super().__init__()
    layers = [
      ("Conv2d_1a_3x3", Conv(3, w(32), 3, stride=2)), ("Conv2d_2a_3x3", Conv(w(32), w(32), 3)),
      ("Conv2d_2b_3x3", Conv(w(32), w(64), 3, padding=1)), ("", nn.MaxPool2d(3, 2)),
      ("Conv2d_3b_1x1", Conv(w(64), w(80))), ("Conv2d_4a_3x3", Conv(w(80), w(192), 3)),
      ("", nn.MaxPool2d(3, 2)), ("Mixed_5b", block_a(w(192), w(32))),
      ("Mixed_5c", block_a(w(256), w(64))), ("Mixed_5d", block_a(w(288), w(64))),
      ("Mixed_6a", block_b(w(288))), ("Mixed_6b", block_c(w(768), w(128))),
      ("Mixed_6c", block_c(w(768), w(160))), ("Mixed_6d", block_c(w(768), w(160))),
      ("Mixed_6e", block_c(w(768), w(192))), ("Mixed_7a", block_d(w(768))),
      ("Mixed_7b", block_e(w(1280), average)),
      ("Mixed_7c", block_e(w(2048), lambda x: F.max_pool2d(x, 3, 1, 1))),
    ]  # fmt: skip
    self.order = []
    for i, (name, layer) in enumerate(layers):
      self.order.append(name or f"pool_{i}")
      self.add_module(self.order[-1], layer)
    self.fc = nn.Linear(w(2048), 1008)

  def forward(self, x):
    for name in self.order:
      x = getattr(self, name)(x)
    x = x.mean((2, 3))
    return x, x @ self.fc.weight.T


@pytest.fixture(scope="module")
def reference():
  """With torch's own initialization its output hardly depends on the picture, nor, so narrow, with
  He-normal weights: these have twice their variance."""
  model, generator = Reference().eval(), torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, value in model.state_dict().items():
      noise = torch.randn(value.shape, generator=generator) if value.ndim else 0
      if value.ndim > 1:
        value.copy_(noise * (4 / value[0].numel()) ** 0.5)
      elif name.endswith(("running_var", "bn.weight")):
        value.copy_(1 + 0.2 * noise.clip(-2, 2))
      elif value.ndim:
        value.copy_(0.02 * noise)
  return model


@pytest.fixture(scope="module")
def path(reference, tmp_path_factory):
  path = tmp_path_factory.mktemp("inception") / "pt_inception-2015-12-05-6726825d.pth"
  torch.save(reference.state_dict(), path)
  return path


def test_features_and_logits_are_the_references(reference, path, compiled_programs):
  random = np.random.default_rng(0)
  noise, blocks = random.uniform(-1, 1, (2, 80, 96, 3)), random.uniform(-1, 1, (2, 10, 12, 3))
  images = np.concatenate([noise, np.kron(blocks, np.ones((1, 8, 8, 1)))]).astype("f4")
  with torch.no_grad():
    expected = reference(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
  found = jax.jit(Inception(DIVISOR).apply)(load_inception(path, DIVISOR), images)
  for name, value in zip(("features", "logits"), expected, strict=True):
    value = value.numpy()
    assert value.std(0).mean() > 0.02 * np.abs(value).mean()  # the pictures matter
    np.testing.assert_allclose(found[name], value, atol=1e-5 * np.abs(value).max())


def test_the_published_network_has_the_published_number_of_tensors_and_parameters(path):
  abstract = jax.eval_shape(Inception().init, jax.random.key(0), np.zeros((1, 75, 75, 3), "f4"))
  leaves = jax.tree.leaves(abstract["params"])
  # The file's 566 tensors have 94 counters, and the last bias, which no score reads.
  assert len(jax.tree.leaves(abstract)) == 566 - 94 - 1
  assert sum(leaf.size for leaf in leaves) == 23_850_960 - 1008
  assert len(torch.load(path, weights_only=True)) == 566


@pytest.mark.parametrize("side, wanted", [(12, 29), (29, 12)])
def test_mode_torch_is_torchs_bilinear(side, wanted):
  images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), dtype=np.uint8)
  x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy()).float() / 255
  expected = 2 * F.interpolate(x, (wanted, wanted), mode="bilinear", align_corners=False) - 1
  found = np.asarray(resize.inception_input(images, wanted, "torch")).transpose(0, 3, 1, 2)
  np.testing.assert_allclose(found, expected.numpy(), atol=2e-6)


def test_safetensors_of_the_same_names_give_the_same_and_files_of_others_are_refused(
  reference, path, tmp_path
):
  state = {name: value.numpy() for name, value in reference.state_dict().items()}
  tensors = {name: (x.shape, x.dtype, lambda x=x: x) for name, x in state.items()}
  write_safetensors(tmp_path / "inception.safetensors", tensors)
  one, other = (load_inception(p, DIVISOR) for p in (path, tmp_path / "inception.safetensors"))
  assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))

  cut = tmp_path / "cut.pth"
  cut.write_bytes(path.read_bytes()[:-5000])
  with pytest.raises(UserError, match="cut.pth is no whole file"):
    load_inception(cut, DIVISOR)
  # Torchvision's network has another head and one at the side.
  foreign = {k: torch.from_numpy(v) for k, v in state.items() if k != "Mixed_7c.branch1x1.bn.bias"}
  foreign |= {"AuxLogits.fc.weight": torch.zeros(2, 2), "fc.weight": torch.zeros(1000, w(2048))}
  torch.save(foreign, tmp_path / "torchvision.pth")
  with pytest.raises(UserError, match=r"missing \(1\) Mixed_7c.branch1x1.bn.bias; of another shape "
                     r"\(1\) fc.weight is \[1000, 128\].*unexpected \(1\) AuxLogits.fc.weight"):
    load_inception(tmp_path / "torchvision.pth", DIVISOR)
  with pytest.raises(UserError, match="no Inception at .*published as pt_inception"):
    load_inception(tmp_path / "none.pth")
