"""Stable Diffusion XL: two text encoders, and conditioning on the pictures' sizes and crops.

  python -m t2i_jax.convert --source=stable-diffusion-xl-base-1.0 --output=sdxl
  python -m t2i_jax.sample --export=sdxl --prompt="a dog" --guidance=5
  python -m t2i_jax.main --config=configs/sdxl.py:dataset=folder --workdir=runs/mine \\
    --config.data.options.path=PICTURES --config.init_from=sdxl \\
    --config.components.text_encoder=clip-l --config.components.text_encoder_2=bigg \\
    --config.components.first_stage=kl-f8-xl

Expected: not known, no size was trained to its end here.

Arguments:
  size: "base" (1024 px, the default); "tiny", for tests.
  dataset: "folder", "scenes" (one object), "scenes_two", "scenes_all", or one of
    docs/data_sets.md; "emoji" knows no sizes of its pictures, without which this is not trained.

`--config.model.scan=True` compiles each transformer's blocks once rather than up to ten times. It
stacks their parameters: for runs without `init_from` a converted model, and without adapters.

Offset noise (0.05 in the last stage of the published training) is `--config.model.offset_noise`.

Paper: Podell et al. 2023 (SDXL: section 2 and its tables 1 and 2).
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

PUBLISHED = dict(
  channels=320, multipliers=(1, 2, 4), blocks=2, attention_levels=(1, 2), depths=(0, 2, 10),
  middle_depth=10, heads=0, head_channels=64, groups=32, latent_scale=0.13025,
)
SIZES = {
  "base": dict(PUBLISHED, resolution=1024),
  "tiny": dict(PUBLISHED, resolution=16, channels=16, multipliers=(1, 2), attention_levels=(1,),
               depths=(0, 2), middle_depth=2, blocks=1, head_channels=16, groups=8, steps=50),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="base", dataset="folder")
  config = recipe.base("sdxl", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  if "sizes" in config.data.options:
    config.data.options.sizes = True
  config.text.update(
    encoder="component", encoders=("text_encoder+text_encoder_2",), pooled=("text_encoder_2",),
    drop=0.1, null="zeros",
  )
  config.optimizer.update(learning_rate=1e-4, warmup="10k steps", weight_decay=0.01)
  config.train.update(duration="100k steps", batch_size=2048)
  config.model.remat = True
  config.precision.frozen = "bfloat16" if arg.size != "tiny" else "float32"
  if arg.size == "tiny":
    recipe.tiny(config)
  return config
