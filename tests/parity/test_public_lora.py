"""Files of adapters against the paper's formula on diffusers' U-Nets, in torch."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")
pytest.importorskip("diffusers", reason="the reference: install t2i_jax[parity]")

import jax  # noqa: E402
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY  # noqa: E402
from diffusers.utils import convert_unet_state_dict_to_peft  # noqa: E402
from random_weights import randomised  # noqa: E402

from t2i_jax.networks.layers import lora  # noqa: E402
from t2i_jax.networks.unet import UNet  # noqa: E402
from t2i_jax.weights import lora as files  # noqa: E402
from t2i_jax.weights.key_map import KeyMap  # noqa: E402
from t2i_jax.weights.safetensors_file import write_safetensors  # noqa: E402
from t2i_jax.weights.stored import Stored  # noqa: E402
from t2i_jax.weights.unet import diffusers_map  # noqa: E402
from t2i_jax.weights.unet_config import from_diffusers, linear_projections  # noqa: E402

TOLERANCE = 1e-4  # of the largest value
SIDE, RANK, ALPHA = 8, 3, 4.5
STABLE = {
  "block_out_channels": (16, 32), "sample_size": SIDE, "cross_attention_dim": 12,
  "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2,
  "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SHAPES = {"SD1": STABLE, "SD2": {**STABLE, "use_linear_projection": True,
                                 "attention_head_dim": [2, 4]}}


def made(shape):
  """The reference with He-normal kernels and noise on all else."""
  from diffusers import UNet2DConditionModel

  model = UNet2DConditionModel(**SHAPES[shape])
  return randomised(model)


def adapt(model):
  """Adds alpha / rank * up(down(x)) to every Linear and Conv2d: the tensors, by module name."""
  generator = torch.Generator().manual_seed(5)
  tensors = {}
  for name, module in model.named_modules():
    if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
      continue
    weight = module.weight
    shape = (RANK, *weight.shape[1:])
    down = torch.randn(shape, generator=generator) / weight[0].numel() ** 0.5
    up = 0.5 * torch.randn((weight.shape[0], RANK, *(1,) * (weight.ndim - 2)), generator=generator)
    tensors[name] = down, up

    def add(module, args, y, down=down, up=up):
      if isinstance(module, torch.nn.Linear):
        low = torch.nn.functional.linear(args[0], down)
        return y + ALPHA / RANK * torch.nn.functional.linear(low, up)
      low = torch.nn.functional.conv2d(args[0], down, None, module.stride, module.padding)
      return y + ALPHA / RANK * torch.nn.functional.conv2d(low, up)

    module.register_forward_hook(add)
  return tensors


def diffusers_names(tensors):
  given = {f"unet.{name}.lora_{which}.weight": value for name, pair in tensors.items()
           for which, value in zip("AB", pair, strict=True)}
  told = {"unet.r": RANK, "unet.lora_alpha": ALPHA}
  return given, {LORA_ADAPTER_METADATA_KEY: json.dumps(told)}


def kohya_names(tensors):
  given = {}
  for name, (down, up) in tensors.items():
    stem = f"lora_unet_{name.replace('.', '_')}"
    given |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up,
              f"{stem}.alpha": torch.tensor(ALPHA)}
  return given, None


@pytest.mark.parametrize("shape, names", [("SD1", diffusers_names), ("SD2", kohya_names)])
def test_a_public_file_adapts_our_network_as_its_own(shape, names, tmp_path):
  model = made(shape)
  options = from_diffusers({**model.config, "_class_name": type(model).__name__})
  network = UNet(**{f.name: options[f.name] for f in dataclasses.fields(UNet)
                    if f.name in options})
  random = np.random.default_rng(1)
  x, context = (random.normal(size=s).astype("f4") for s in ((2, SIDE, SIDE, 4), (2, 5, 12)))
  t = np.array([3, 801], "f4")
  shapes = jax.eval_shape(network.init, jax.random.key(0), x, t, context)["params"]
  weights = {
    name: Stored(tuple(value.shape), np.dtype("f4"), lambda value=value: value.detach().numpy())
    for name, value in model.state_dict().items()
  }
  maps: KeyMap = diffusers_map(options, not linear_projections(options))
  params = maps.load(weights, shapes, source="the reference")
  tensors, header = names(adapt(model))
  write_safetensors(tmp_path / "lora.safetensors", {
    name: (tuple(x.shape), np.dtype("f4"), lambda x=x: x.numpy()) for name, x in tensors.items()
  }, header)  # fmt: skip
  kernels = lora.kernels({"denoiser": params})
  part = files.Part("denoiser/", "unet", (maps,))
  found = files.load(tmp_path / "lora.safetensors", kernels, [part])
  assert set(found) == set(kernels)
  flat = {}
  for path, adapter in found.items():
    node = flat
    for name in path.split("/")[1:]:
      node = node.setdefault(name, {})
    node.update(down=adapter.down, up=adapter.up, scale=adapter.alpha / len(adapter.up))
  with torch.no_grad():
    reference = model(
      torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.tensor([3, 801]),
      torch.from_numpy(context),
    ).sample.numpy().transpose(0, 2, 3, 1)  # fmt: skip
  with lora.adapters_on():
    ours = jax.jit(network.apply)({"params": params, "lora": flat}, x, t, context)
  merged = jax.jit(network.apply)({"params": lora.merge(params, flat)}, x, t, context)
  scale = np.abs(reference).max()
  assert np.abs(ours - reference).max() <= TOLERANCE * scale
  assert np.abs(merged - reference).max() <= TOLERANCE * scale
  plain = jax.jit(network.apply)({"params": params}, x, t, context)
  assert np.abs(plain - reference).max() > 0.1 * scale
  # What we write has the names that diffusers gives to what it reads.
  written, told = files.save(found, kernels, [part])
  ours = {name.removeprefix("unet."): torch.zeros(shape) for name, (shape, _, _) in written.items()}
  assert set(convert_unet_state_dict_to_peft(ours)) == set(ours)
  assert {f"unet.{name}" for name in ours} == set(diffusers_names(adapt(made(shape)))[0])
  assert {name: value[0] for name, value in written.items()} == {
    name: tuple(value.shape) for name, value in diffusers_names(adapt(made(shape)))[0].items()
  }
  assert json.loads(told[LORA_ADAPTER_METADATA_KEY])["unet.lora_alpha"] == ALPHA
