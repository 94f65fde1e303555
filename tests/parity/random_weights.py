"""Weights of references that leave no parameter without effect, and tensors as files hold them."""

import torch

from t2i_jax.weights.stored import Stored


def randomised(model, seed=0):
  """The model with He-normal matrices and noise on all else, so that every parameter matters.

  Nothing of the model's own initialization is left, which no seed here rules.
  """
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for name, value in model.named_parameters():
      noise = torch.randn(value.shape, generator=generator)
      if value.ndim > 1:
        value.copy_(noise * (2 / value[0].numel()) ** 0.5)
      else:
        value.copy_(0.2 * noise + (0 if name.endswith("bias") else 1))
  return model.eval()


def stored(tensors):
  """What `open_weights` gives of a file with these tensors of PyTorch."""
  tensors = {name: value.detach().numpy() for name, value in tensors.items()}
  return {
    name: Stored(value.shape, value.dtype, lambda value=value: value)
    for name, value in tensors.items()
  }
