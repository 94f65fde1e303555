"""Stable Diffusion 1 and 2: continued, fine-tuned or trained from the start.

  python -m t2i_jax.convert --source=stable-diffusion-v1-5 --output=sd15
  python -m t2i_jax.sample --export=sd15 --prompt="a dog" --guidance=7.5
  python -m t2i_jax.main --config=configs/stable_diffusion.py:dataset=folder --workdir=runs/mine \\
    --config.data.options.path=PICTURES --config.init_from=sd15 \\
    --config.components.text_encoder=clip-l --config.components.first_stage=kl-f8

The components are exports that `convert` makes of a pipeline's text_encoder and vae folders.
Precision is bfloat16 on a TPU or GPU; `--config.mesh.fsdp=N` spreads parameters, their averages and
the optimizer's state over N chips.

Expected: not known, no size was trained to its end here.

Arguments:
  size: "1" (Stable Diffusion 1, 512 px, epsilon; the default), "2-base" (512 px, epsilon), "2"
    (768 px, v); "tiny", for tests.
  dataset: "folder", "emoji", "scenes" (one object), "scenes_two", "scenes_all", or one of
    docs/data_sets.md.

Papers: Rombach et al. 2022; Salimans and Ho 2022 (v, of version 2). The released models' cards:
AdamW at 1e-4 after 10,000 steps of warmup, batches of 2,048, a caption in ten left out.
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

PUBLISHED = dict(
  channels=320, multipliers=(1, 2, 4, 4), blocks=2, attention_levels=(0, 1, 2), groups=32,
  latent_scale=0.18215,
)
SIZES = {
  "1": dict(PUBLISHED, resolution=512, heads=8),
  "2-base": dict(PUBLISHED, resolution=512, heads=0, head_channels=64),
  "2": dict(PUBLISHED, resolution=768, heads=0, head_channels=64, prediction="v", weighting="v"),
  "tiny": dict(PUBLISHED, resolution=16, channels=16, multipliers=(1, 2), attention_levels=(0,),
               blocks=1, heads=2, groups=8, steps=50),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="1", dataset="folder")
  config = recipe.base("stable_diffusion", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.text.update(encoder="component", drop=0.1, null="empty")
  config.optimizer.update(learning_rate=1e-4, warmup="10k steps", weight_decay=0.01)
  config.train.update(duration="100k steps", batch_size=2048)
  config.model.remat = True
  config.precision.frozen = "bfloat16" if arg.size != "tiny" else "float32"
  if arg.size == "tiny":
    recipe.tiny(config)
  return config
