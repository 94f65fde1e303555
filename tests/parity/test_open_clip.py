"""CLIP under OpenAI's and OpenCLIP's names, which are those of PyTorch's own attention."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

from t2i_jax.text import clip  # noqa: E402
from t2i_jax.weights import text_encoders as maps  # noqa: E402
from t2i_jax.weights.stored import Stored  # noqa: E402

WIDTH, HEADS, LAYERS, LENGTH, VOCAB, PROJECTION = 32, 4, 2, 6, 20, 12


class Block(torch.nn.Module):
  """One residual block; only the submodules' names matter to the files."""

  def __init__(self):
    super().__init__()
    self.attn = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    self.ln_1, self.ln_2 = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
    self.mlp = torch.nn.ModuleDict({
      "c_fc": torch.nn.Linear(WIDTH, 4 * WIDTH), "c_proj": torch.nn.Linear(4 * WIDTH, WIDTH)
    })

  def forward(self, x, mask=None):
    h = self.ln_1(x)
    x = x + self.attn(h, h, h, attn_mask=mask, need_weights=False)[0]
    h = torch.nn.functional.gelu(self.mlp["c_fc"](self.ln_2(x)))
    return x + self.mlp["c_proj"](h)


def blocks():
  return torch.nn.ModuleDict({"resblocks": torch.nn.ModuleList(Block() for _ in range(LAYERS))})


def parameter(*shape):
  return torch.nn.Parameter(0.3 * torch.randn(shape))


class Visual(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.conv1 = torch.nn.Conv2d(3, WIDTH, 4, 4, bias=False)
    self.class_embedding = parameter(WIDTH)
    self.positional_embedding = parameter(5, WIDTH)
    self.ln_pre, self.ln_post = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
    self.transformer = blocks()
    self.proj = parameter(WIDTH, PROJECTION)

  def forward(self, images):
    x = self.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
    x = self.ln_pre(x)
    for block in self.transformer["resblocks"]:
      x = block(x)
    return self.ln_post(x[:, 0]) @ self.proj


class Model(torch.nn.Module):
  def __init__(self):
    super().__init__()
    self.visual, self.transformer = Visual(), blocks()
    self.token_embedding = torch.nn.Embedding(VOCAB, WIDTH)
    self.positional_embedding = parameter(LENGTH, WIDTH)
    self.ln_final = torch.nn.LayerNorm(WIDTH)
    self.text_projection = parameter(WIDTH, PROJECTION)
    self.logit_scale = parameter()
    self.register_buffer("attn_mask", torch.triu(torch.full((LENGTH, LENGTH), -torch.inf), 1))

  def text(self, ids):
    x = self.token_embedding(ids) + self.positional_embedding
    for block in self.transformer["resblocks"]:
      x = block(x, self.attn_mask)
    x = self.ln_final(x)
    # The end has the largest id.
    return x, x[torch.arange(len(x)), ids.argmax(1)] @ self.text_projection


@pytest.fixture(scope="module")
def model():
  torch.manual_seed(0)
  model = Model().eval()
  with torch.no_grad():
    for value in model.parameters():
      value += 0.1 * torch.randn_like(value)
  return model


def stored(model):
  return {
    name: Stored(tuple(v.shape), v.numpy().dtype, lambda v=v: v.numpy())
    for name, v in model.state_dict().items()
  }


def test_both_towers(model):
  ids = np.array([[18, 3, 4, 19, 0, 0], [18, 7, 8, 9, 10, 19]])
  images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  text = clip.CLIPText(
    clip.TextConfig(WIDTH, LAYERS, HEADS, 4 * WIDTH, "gelu", PROJECTION, VOCAB, LENGTH, VOCAB - 1),
    project=True,
  )
  vision = clip.CLIPVision(
    clip.VisionConfig(WIDTH, LAYERS, HEADS, 4 * WIDTH, "gelu", PROJECTION, 8, 4)
  )
  with torch.no_grad():
    sequence, pooled = model.text(torch.tensor(ids))
    seen = model.visual(torch.tensor(images).permute(0, 3, 1, 2))
  tensors = stored(model)
  for network, key_map, given, expected in (
    (text, maps.OPEN_CLIP_TEXT, ids, (sequence, pooled)),
    (vision, maps.OPEN_CLIP_VISION, images, (None, seen)),
  ):
    abstract = jax.eval_shape(network.init, jax.random.key(0), given)["params"]
    params = key_map.load(tensors, abstract, source="the reference")
    found = network.apply({"params": params}, given)
    found = found if isinstance(found, tuple) else (None, found)
    for ours, theirs in zip(found, expected, strict=True):
      if theirs is not None:
        scale = float(theirs.abs().max())
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale)
    # And back, byte for byte.
    for name, (shape, dtype, read) in key_map.save(params).items():
      assert tensors[name].shape == tuple(shape) and tensors[name].dtype == dtype
      assert tensors[name].read().tobytes() == np.ascontiguousarray(read()).tobytes(), name
