"""Weights of references that leave no parameter without effect, and tensors as files hold them."""

import torch

from t2i_jax.weights.stored import Stored


def randomised(model, seed=0):
  """The model with He-normal matrices and noise on all else, so that every parameter matters."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for value in model.parameters():
      fan_in = value[0].numel() if value.ndim > 1 else 0
      noise = torch.randn(value.shape, generator=generator)
      value.copy_(noise * (2 / fan_in) ** 0.5 if fan_in else value + 0.2 * noise)
  return model.eval()


def stored(tensors):
  """What `open_weights` gives of a file with these tensors of PyTorch."""
  tensors = {name: value.detach().numpy() for name, value in tensors.items()}
  return {
    name: Stored(value.shape, value.dtype, lambda value=value: value)
    for name, value in tensors.items()
  }
