"""Files that torch.save writes, read without it."""

import argparse

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

from t2i_jax.weights.stored import open_weights  # noqa: E402


def as_numpy(tensor):
  if tensor.dtype == torch.bfloat16:
    return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
  return tensor.detach().contiguous().numpy()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_what_torch_saves(tmp_path, zipped):
  base = torch.randn(6, 5)
  network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
  expected = {
    **network.state_dict(),
    "float16": base.half(), "bfloat16": base.bfloat16(), "float64": base.double(),
    "int32": torch.arange(4, dtype=torch.int32), "bool": base > 0, "transposed": base.T,
    "slice": base[2:4, 1:3], "same": base, "parameter": torch.nn.Parameter(base[0].clone()),
    "empty": torch.zeros(0, 4),
  }  # fmt: skip
  state = network.state_dict()
  state.update({k: v for k, v in expected.items() if k not in state})
  optimizer = torch.optim.Adam(network.parameters())
  network(torch.zeros(1, 3, 8, 8)).sum().backward()
  optimizer.step()
  tree = {
    "state_dict": state, "optimizer": optimizer.state_dict(), "epoch": 3, "best": np.float64(0.5),
    "args": argparse.Namespace(lr=1e-3, device=torch.device("cpu"), dtype=torch.float16),
    "shape": torch.Size([1, 2]), "seen": {1, 2},
  }  # fmt: skip
  path = tmp_path / "model.pt"
  torch.save(tree, path, _use_new_zipfile_serialization=zipped)
  found = open_weights(path)
  assert set(found) == set(expected)
  for name, value in expected.items():
    value = as_numpy(value)
    assert (found[name].shape, found[name].dtype) == (value.shape, value.dtype), name
    assert found[name].read().tobytes() == value.tobytes(), name


def test_what_torchscript_saves(tmp_path):
  """OpenAI published CLIP so. The archive holds code, which is not looked at."""

  class Block(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
      self.scale = torch.nn.Parameter(torch.randn(2).half())
      self.register_buffer("steps", torch.arange(3))
      self.sizes, self.name = [1, 2, 3], "block"

    def forward(self, x):
      return self.layers(x) * self.scale

  network = Block()
  path = tmp_path / "model.pt"
  torch.jit.script(network).save(str(path))
  found = open_weights(path)
  expected = network.state_dict()
  assert set(found) == set(expected)
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name].read(), as_numpy(value))
