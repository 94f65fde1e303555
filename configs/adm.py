"""ADM: the U-Net of guided diffusion with learned variances, on labels and under a classifier.

  python -m t2i_jax.main --config=configs/adm.py:labels=no --workdir=runs/adm
  python -m t2i_jax.main --config=configs/noisy_classifier.py --workdir=runs/classifier
  python -m t2i_jax.evaluate --export=runs/adm/export --guide=runs/classifier/export \\
    --option=guide_scale=3

With `labels=no` the network is told nothing: the classifier alone makes it draw what is asked for
(docs/sampling.md shows with what success, by scale).

Expected of "small" with `labels=no` on "scenes", seed 0: clean pictures that no caption decides,
and under a classifier of 7 minutes' training at a scale of 8, 57 % of 128 held-out captions right
in everything (colour 96 %, place 99 %, shape 60 %), 0 % without it; after 52 minutes on one CPU
core that others used too. The published sizes were not trained here.

Arguments:
  size: "small" (32 px, for two CPU cores, the default); "imagenet64", "imagenet128", "imagenet256"
    and "imagenet512", the published networks; "lsun", the published one of 256 px that was trained
    with `labels=no`; "tiny", for tests.
  labels: whether the network is told the data set's labels, "yes" (the default) or "no".
  dataset: "scenes" (one object), "cub" or "flowers", which have labels; "scenes_two",
    "scenes_all", "emoji", "folder" and others of docs/data_sets.md, which have none.

Papers: Dhariwal and Nichol 2021 (Diffusion Models Beat GANs on Image Synthesis), table 11; Nichol
and Dhariwal 2021 (Improved Denoising Diffusion Probabilistic Models).
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

# Table 11 of the paper, and the flags of its release: at 128 px four heads, elsewhere 64 channels
# a head; dropout where the data are few for the network.
PUBLISHED = dict(schedule="linear", channels=256, blocks=2, head_channels=64, groups=32)
SIZES = {
  "small": dict(resolution=32, schedule="cosine", channels=48, multipliers=(1, 1, 1), blocks=1,
                attention_levels=(1, 2), head_channels=48, groups=8, patch=2, coordinates=3),
  "imagenet64": dict(PUBLISHED, resolution=64, schedule="cosine", channels=192,
                     multipliers=(1, 2, 3, 4), attention_levels=(1, 2, 3), blocks=3, dropout=0.1),
  "imagenet128": dict(PUBLISHED, resolution=128, multipliers=(1, 1, 2, 3, 4),
                      attention_levels=(2, 3, 4), heads=4),
  "imagenet256": dict(PUBLISHED, resolution=256, multipliers=(1, 1, 2, 2, 4, 4),
                      attention_levels=(3, 4, 5)),
  "imagenet512": dict(PUBLISHED, resolution=512, multipliers=(0.5, 1, 1, 2, 2, 4, 4),
                      attention_levels=(4, 5, 6)),
  "lsun": dict(PUBLISHED, resolution=256, multipliers=(1, 1, 2, 2, 4, 4),
               attention_levels=(3, 4, 5), dropout=0.1),
  "tiny": dict(PUBLISHED, resolution=16, schedule="cosine", steps=50, channels=16,
               multipliers=(1, 2), attention_levels=(1,), blocks=1, head_channels=16, groups=8,
               dropout=0.1),
}
# Iterations and batch size of table 11; LSUN's rooms.
DURATIONS = {
  "imagenet64": ("540k steps", 2048), "imagenet128": ("4360k steps", 256),
  "imagenet256": ("1980k steps", 256), "imagenet512": ("1940k steps", 256),
  "lsun": ("500k steps", 256),
}  # fmt: skip


def get_config(arg=None):
  arg = parse_arg(arg, size="small", labels="yes", dataset="scenes")
  config = recipe.base("adm", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.text.encoder = "none"
  if choose("labels", arg.labels, {"yes": True, "no": False}):
    config.model.classes = recipe.label(config)
  config.sample.options.update(solver="ddpm", variance="learned", steps=250)
  if arg.size == "tiny":
    recipe.tiny(config)
    return config
  if arg.size == "small":
    config.model.update(prediction="v", weighting="v_bounded", weighting_bound=10.0)
    config.train.update(duration="3000 steps", batch_size=32)
    config.optimizer.update(
      name="muon", learning_rate=3e-3, b2=0.99, weight_decay=0.01, schedule="cosine",
      warmup="50 steps",
    )
    config.ema.decay = 0.999
    config.sample.options.steps = 100
    return config
  duration, batch_size = DURATIONS[arg.size]
  config.train.update(duration=duration, batch_size=batch_size)
  config.optimizer.update(
    learning_rate=3e-4 if arg.size == "imagenet64" else 1e-4, weight_decay=0.0, clip_norm=0.0
  )
  return config
