"""DDPM with text: epsilon-prediction, ancestral or DDIM sampling, classifier-free guidance.

  python -m t2i_jax.main --config=configs/ddpm.py --workdir=runs/ddpm
  python -m t2i_jax.main --config=configs/ddpm.py:size=cifar10,dataset=folder \\
    --config.data.options.path=PICTURES --workdir=runs/mine

Expected of "small" on "scenes", seed 0: 88.7 % of 256 held-out captions right in everything
(place 100 %, colour 99.6 %, shape 89 %), 0 % with the captions shuffled, after 19 minutes on
one CPU core. Of "emoji" on "emoji": kinds and colours after 53 minutes on one CPU core (3,000
steps). The published sizes were not trained here.

Arguments:
  size: "small" (32 px, for two CPU cores, the default); "emoji" (64 px, the
    same); "cifar10" (32 px) and "lsun" (256 px), the published networks of Ho et
    al. 2020, appendix B, with cross-attention to the text and a draft of the
    picture that is made of the text alone (docs/learning.md; none with
    `--config.model.draft=0`); "tiny", for tests.
  dataset: "scenes" (one object), "scenes_two", "scenes_all", "emoji", "folder", or one of
    docs/data_sets.md.

Papers: Ho, Jain and Abbeel 2020 (Denoising Diffusion Probabilistic Models); Ho
and Salimans 2022 (Classifier-Free Diffusion Guidance); Nichol and Dhariwal 2021
(the cosine schedule, `--config.model.schedule=cosine`); Hang et al. 2023 (min-SNR
weighting, of the sizes for a CPU).
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

# The networks of Ho et al. 2020, appendix B.
PUBLISHED = dict(
  channels=128, blocks=2, head_channels=64, groups=32, patch=1, coordinates=0, scale_shift=False,
  draft=8,
)
# Small pictures on a CPU: no level at full resolution, and coordinates, without
# which convolutions under global conditioning place things at chance. Most of the plain error of
# the noise is of almost clean pictures, where the text decides nothing: min-SNR takes that down.
LAPTOP = dict(
  channels=48, multipliers=(1, 1, 1), attention_levels=(2,), blocks=1, head_channels=48,
  groups=8, patch=2, coordinates=3, draft=8, weighting="min_snr",
)
SIZES = {
  "small": dict(LAPTOP, resolution=32),
  "emoji": dict(LAPTOP, resolution=64, multipliers=(1, 1, 2, 2), attention_levels=(2, 3)),
  "cifar10": dict(PUBLISHED, resolution=32, multipliers=(1, 2, 2, 2), attention_levels=(1,),
                  dropout=0.1),
  "lsun": dict(PUBLISHED, resolution=256, multipliers=(1, 1, 2, 2, 4, 4), attention_levels=(4,)),
  "tiny": dict(PUBLISHED, resolution=16, channels=16, multipliers=(1, 2), attention_levels=(1,),
               blocks=1, head_channels=16, groups=8, steps=50, draft=4, dropout=0.1),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="small", dataset="scenes")
  config = recipe.base("ddpm", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  if arg.size == "tiny":
    recipe.tiny(config, text=True)
    config.optimizer.update(name="adam", learning_rate=2e-4, warmup="2 steps")
    config.sample.options.update(solver="ddpm", steps=4)
    return config
  if arg.size in ("cifar10", "lsun"):
    config.text.update(width=512, layers=6, heads=8)
    config.train.update(duration="800k steps", batch_size=128 if arg.size == "cifar10" else 64)
    config.optimizer.update(
      name="adam", learning_rate=2e-4 if arg.size == "cifar10" else 2e-5, warmup="5000 steps"
    )
    config.sample.options.update(solver="ddpm", steps=1000)
    return config
  recipe.small(config, pool="flatten")
  config.train.duration = "4700 steps"
  return config
