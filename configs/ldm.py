"""Latent diffusion: an autoencoder first, then diffusion with text in its latents.

  python -m t2i_jax.main --config=configs/feature_net.py:size=64 --workdir=runs/feature_net
  python -m t2i_jax.main --config=configs/kl_autoencoder.py --workdir=runs/kl \\
    --config.components.perceptual=runs/feature_net/export
  python -m t2i_jax.precompute latents --config=configs/ldm.py --output=latents --rows=16000 \\
    --config.components.first_stage=runs/kl/export
  python -m t2i_jax.main --config=configs/ldm.py --workdir=runs/ldm \\
    --config.components.first_stage=runs/kl/export --config.data.latents=latents

The first stage is trained on its own; its latents are stored once, and the second stage trains on
them without decoding a picture. Leave `precompute` and `data.latents` out to encode as one goes.

Expected of "small" on "scenes", seed 0, on the latents of 16,000 pictures: 100 % of 256 pictures of
held-out combinations right in everything, and 100 % of held-out pairs of colour and shape, 0 % with
the captions shuffled, after 41 minutes on one CPU core (the other busy, the caches shared), beside
19 for the first stage, 3 for its perceptual network and 2 for the latents. "1.4B" was not trained
here.

Arguments:
  size: "small" (64 px, for two CPU cores, the default); "1.4B", the published text-to-image network
    (256 px, KL-f8) with a text transformer that is trained with it; "tiny", for tests.
  dataset: "scenes" (one object), "scenes_two", "scenes_all", "emoji", "folder", or one of
    docs/data_sets.md.

Papers: Rombach et al. 2022 (High-Resolution Image Synthesis with Latent Diffusion Models; the
text-to-image model is of section 4.3.1 and table 15); Ho and Salimans 2022 (guidance).
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

# Table 15 of the paper, column LDM-KL-8 text-to-image; its beta schedule is that of the release.
PUBLISHED = dict(
  schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, channels=320,
  multipliers=(1, 2, 4, 4), blocks=2, attention_levels=(0, 1, 2), heads=8, groups=32,
)
SIZES = {
  # As configs/quickstart.py: coordinates tell the small network what is where, and times are
  # trained at which the text decides something.
  "small": dict(resolution=64, channels=48, multipliers=(1, 1, 1), attention_levels=(1, 2),
                blocks=1, heads=2, groups=8, coordinates=3, scale_shift=True, schedule="cosine",
                prediction="x0", weighting="v_bounded", weighting_bound=10.0,
                density="logit_normal", density_spread=1.2, time_shift=1.5),
  "1.4B": dict(PUBLISHED, resolution=256, latent_scale=0.18215),
  "tiny": dict(PUBLISHED, resolution=16, channels=16, multipliers=(1, 2), attention_levels=(0, 1),
               blocks=1, heads=2, groups=8, steps=50),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="small", dataset="scenes")
  config = recipe.base("ldm", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  if arg.size == "tiny":
    recipe.tiny(config, text=True)
  elif arg.size == "1.4B":
    config.text.update(width=1280, layers=32, heads=8, length=77, vocab_size=30522)
    config.train.update(duration="390k steps", batch_size=680)
    config.optimizer.update(learning_rate=1e-4, warmup="10k steps", weight_decay=0.01)
    config.sample.options.guidance = 5.0
  else:
    recipe.small(config, pool="flatten")
    config.train.duration = "5000 steps"
    config.sample.options.guidance = 1.75
  return config
