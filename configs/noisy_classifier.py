"""A classifier of noised pictures: guides a denoiser of the same process towards labels.

  python -m t2i_jax.main --config=configs/noisy_classifier.py --workdir=runs/classifier

Its export is the component `guide` of configs/adm.py, or of `t2i_jax.sample --guide=`.

Expected of "small" on "scenes", seed 0: all attributes of training pictures right at 98.6 % of the
first quarter of the times, 88.8, 53.6 and 5.9 % of the others; 50 % over all times on held-out
combinations and 23 % on held-out pairs of colour and shape; after 35 minutes on one CPU core that
others used too. The published sizes were not trained here.

Arguments:
  size: "small" (32 px, for two CPU cores, the default); "imagenet64", "imagenet128", "imagenet256"
    and "imagenet512", the published networks; "tiny", for tests.
  dataset: "scenes" (one object), "cub" or "flowers" (docs/data_sets.md), whose labels it learns;
    others have none.

Paper: Dhariwal and Nichol 2021 (Diffusion Models Beat GANs on Image Synthesis), section 4 and
appendix H.
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

PUBLISHED = dict(
  schedule="linear", channels=128, blocks=2, head_channels=64, groups=32, pool="attention", patch=1
)
SIZES = {
  "small": dict(resolution=32, schedule="cosine", channels=32, multipliers=(1, 2, 2), blocks=1,
                attention_levels=(1, 2), head_channels=32, groups=8, patch=2),
  "imagenet64": dict(PUBLISHED, resolution=64, schedule="cosine", multipliers=(1, 2, 3, 4),
                     attention_levels=(1, 2, 3), blocks=4),
  "imagenet128": dict(PUBLISHED, resolution=128, multipliers=(1, 1, 2, 3, 4),
                      attention_levels=(2, 3, 4)),
  "imagenet256": dict(PUBLISHED, resolution=256, multipliers=(1, 1, 2, 2, 4, 4),
                      attention_levels=(3, 4, 5)),
  "imagenet512": dict(PUBLISHED, resolution=512, multipliers=(0.5, 1, 1, 2, 2, 4, 4),
                      attention_levels=(4, 5, 6)),
  "tiny": dict(PUBLISHED, resolution=16, schedule="cosine", steps=50, channels=16,
               multipliers=(1, 2), attention_levels=(1,), blocks=1, head_channels=16, groups=8),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="small", dataset="scenes")
  config = recipe.base("noisy_classifier", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  if labels := recipe.label(config):
    config.model.classes = labels
  config.evaluate.every = "25%"
  if arg.size == "tiny":
    config.text.update(width=32, layers=1, heads=2, vocab_size=300, length=40)
    recipe.tiny(config)
    config.evaluate.every = "0 steps"
    return config
  if arg.size == "small":
    config.train.update(duration="3000 steps", batch_size=64)
    config.optimizer.update(
      name="muon", learning_rate=3e-3, weight_decay=0.05, schedule="cosine", warmup="50 steps"
    )
    config.ema.decay = 0.99
    return config
  config.train.update(duration="300k steps", batch_size=256)
  config.optimizer.update(learning_rate=3e-4, weight_decay=0.05, schedule="linear", clip_norm=0.0)
  if arg.size == "imagenet64":
    config.train.batch_size = 1024
    config.optimizer.learning_rate = 6e-4
  elif arg.size != "imagenet128":
    config.train.duration = "500k steps"
  return config
