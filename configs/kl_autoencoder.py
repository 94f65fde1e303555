"""The autoencoder of latent diffusion: L1, perceptual distance, a weak KL, and a discriminator.

  python -m t2i_jax.main --config=configs/kl_autoencoder.py --workdir=runs/kl \\
    --config.components.perceptual=runs/feature_net/export

The perceptual distance is LPIPS's where its public files are at hand (an export
that `python -m t2i_jax.convert` makes of them). Otherwise the export of
`configs/feature_net.py` stands in, and every metric says so by its name; it needs a data set's
labels, so for a folder train it on "scenes", or leave the distance out
(`--config.model.perceptual_weight=0`).

Expected of "small" on "scenes", seed 0, with feature_net, after 19 minutes on one CPU core, in the
last 50 % of which the discriminator plays: held-out pictures come back at 40.3 dB (combinations)
and 40.8 dB (pairs of colour and shape), and on another machine, whose sums round otherwise, at 38.1
and 38.5 dB; shapes and colours are crisp, the discriminator leaves a faint texture. The
published sizes were not trained here; their rate is 4.5e-6 times the batch size, as the published
code has it.

Arguments:
  size: "small" (64 px, to 16x16 positions of 4 channels, for two CPU cores, the default);
    "f8c4", the network and losses of Rombach et al. 2022 for 8-fold downsampling (256
    px), and of Stable Diffusion 1, 2 and XL; "f8c16", with 16 channels as Stable Diffusion
    3's; "tiny", for tests.
  dataset: "scenes" (one object), "scenes_two", "scenes_all", "emoji", "folder", or one of
    docs/data_sets.md.

Papers: Rombach, Blattmann, Lorenz, Esser and Ommer 2022 (High-Resolution Image
Synthesis with Latent Diffusion Models); Esser, Rombach and Ommer 2021 (Taming
Transformers); Esser et al. 2024 (16 channels, section 5.2.1).
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

SIZES = {
  "small": dict(resolution=64, channels=16, multipliers=(1, 2, 4), blocks=1, groups=8,
                discriminator_channels=16, discriminator_layers=2, adversarial_start=1000,
                adversarial_weight=0.1),
  "f8c4": dict(resolution=256),
  "f8c16": dict(resolution=256, latent_channels=16, pointwise=False),
  "tiny": dict(resolution=16, channels=8, multipliers=(1, 2), blocks=1, groups=4,
               discriminator_channels=4, discriminator_layers=1, adversarial_start=2),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="small", dataset="scenes")
  config = recipe.base("kl_autoencoder", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  if arg.size in ("f8c4", "f8c16"):
    config.train.update(duration="250k steps", batch_size=96)
    config.optimizer.update(name="adam", learning_rate=4.3e-4, b1=0.5, b2=0.9, clip_norm=0.0)
    config.evaluate.every = "1%"
    return config
  config.train.update(duration="2000 steps", batch_size=8)
  config.optimizer.update(
    name="muon", learning_rate=3e-3, b2=0.99, schedule="cosine", warmup="50 steps"
  )
  config.ema.decay = 0.99
  config.evaluate.every = "25%"
  if arg.size == "tiny":
    recipe.tiny(config)
  return config
