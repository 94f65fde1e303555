"""LPIPS from its two public files' format, against the published architecture in torch."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

from t2i_jax import assembly, export  # noqa: E402
from t2i_jax.conversion.perceptual import from_lpips  # noqa: E402
from t2i_jax.errors import UserError  # noqa: E402
from t2i_jax.weights.perceptual import VGG16_FILE, WEIGHTS_FILE  # noqa: E402

# Narrow; the layers' numbers, and so the files' names, are those of VGG16.
BLOCKS = ((4, 2), (5, 2), (6, 3), (7, 3), (8, 3))


class Reference(torch.nn.Module):
  """Zhang et al. 2018, figure 2: differences of unit features, weighted, averaged and summed."""

  def __init__(self):
    super().__init__()
    layers, width = [], 3
    for channels, convolutions in BLOCKS:
      for _ in range(convolutions):
        layers += [torch.nn.Conv2d(width, channels, 3, padding=1), torch.nn.ReLU()]
        width = channels
      layers.append(torch.nn.MaxPool2d(2))
    self.features = torch.nn.Sequential(*layers)
    self.classifier = torch.nn.Linear(8, 2)
    self.weights = [torch.rand(1, channels, 1, 1) for channels, _ in BLOCKS]

  def blocks(self, x):
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (x - shift[:, None, None]) / scale[:, None, None]
    found = []
    for layer in self.features:
      if isinstance(layer, torch.nn.MaxPool2d):
        found.append(x)
      x = layer(x)
    return found

  def forward(self, a, b):
    total = 0
    for weight, x, y in zip(self.weights, self.blocks(a), self.blocks(b), strict=True):
      x, y = (z / (z.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for z in (x, y))
      total = total + torch.nn.functional.conv2d((x - y) ** 2, weight).mean((1, 2, 3))
    return total


@pytest.fixture(scope="module")
def reference():
  torch.manual_seed(0)
  return Reference().eval()


@pytest.fixture
def folder(reference, tmp_path):
  """The two files as they are published."""
  state = {k: v for k, v in reference.state_dict().items()}
  assert "features.28.weight" in state and "features.29.weight" not in state
  torch.save(state, tmp_path / VGG16_FILE)
  torch.save({f"lin{i}.model.1.weight": w for i, w in enumerate(reference.weights)},
             tmp_path / WEIGHTS_FILE)
  return tmp_path


@pytest.mark.parametrize("side", [32, 50])
def test_the_converted_files_give_the_published_distance(reference, folder, side):
  exported = export.read(from_lpips(folder, folder / "lpips"))
  system = assembly.build_with(exported.config, exported.components)
  assert system.name == "lpips" and exported.step == 0
  random = np.random.default_rng(0)
  a, b = random.uniform(-1, 1, (2, 3, side, side, 3)).astype("f4")
  given = (torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) for x in (a, b))
  with torch.no_grad():
    expected = reference(*given).numpy()
  found = np.asarray(system.distance(exported.variables, a, b))
  assert expected.min() > 1e-3
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  np.testing.assert_allclose(system.distance(exported.variables, a, a), 0.0, atol=1e-7)


def test_the_card_says_what_it_is(folder):
  card = (from_lpips(folder, folder / "lpips") / "README.md").read_text()
  assert "# lpips, converted" in card and "components.NAME=PATH" in card


@pytest.mark.parametrize("missing", [VGG16_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named_with_where_it_is_published(folder, missing):
  (folder / missing).unlink()
  with pytest.raises(UserError, match=f"no {missing} in .*published as .*http"):
    from_lpips(folder, folder / "lpips")
  assert not (folder / "lpips").exists()


def test_files_of_something_else_are_refused(folder, reference):
  torch.save({f"lin{i}.model.1.weight": -w for i, w in enumerate(reference.weights)},
             folder / WEIGHTS_FILE)
  with pytest.raises(UserError, match="holds negative weights"):
    from_lpips(folder, folder / "lpips")
  torch.save({"conv.weight": torch.zeros(3)}, folder / VGG16_FILE)
  with pytest.raises(UserError, match=f"{VGG16_FILE} does not hold VGG16"):
    from_lpips(folder, folder / "lpips")
