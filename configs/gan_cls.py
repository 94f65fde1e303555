"""GAN-INT-CLS: DCGAN on captions, a discriminator that sees mismatched pairs.

  python -m t2i_jax.main --config=configs/gan_cls.py --workdir=runs/gan_cls

The LSTM that reads the captions, in both directions, is trained with it by the
discriminator. From one direction's last state the colour, which the captions name
first, was learned late.

Expected of "small" on "scenes", seed 0: 11.3 % of 256 held-out captions right in everything
(place 100 %, colour 77 %, shape 13 %), 0 % with the captions shuffled, after 37 minutes on one
CPU core. The published size was not trained here.

Arguments:
  size: "small" (32 px, for two CPU cores, the default); "64", the published
    networks at 64 px; "tiny", for tests.
  dataset: "scenes" (one object), "scenes_two", "scenes_all", "emoji", "folder", or one of
    docs/data_sets.md.

Paper: Reed, Akata, Yan, Logeswaran, Schiele and Lee 2016 (Generative
Adversarial Text to Image Synthesis).
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

SIZES = {
  "small": dict(resolution=32, generator_channels=48, discriminator_channels=32,
                r1_weight=0.05, r1_every=4),
  "64": dict(resolution=64, generator_channels=64, discriminator_channels=64),
  "tiny": dict(resolution=16, generator_channels=8, discriminator_channels=8, noise_size=8,
               text_size=16, r1_weight=0.05, r1_every=2),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="small", dataset="scenes")
  config = recipe.base("gan_cls", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.text.update(encoder="bilstm", drop=0.0, width=1024 if arg.size == "64" else 256)
  config.train.update(duration="6000 steps", batch_size=32)
  # Both players five times as fast as the paper's keep their balance with a weak R1.
  config.optimizer.update(name="adam", learning_rate=1e-3, b1=0.5, clip_norm=0.0)
  config.optimizer.schedule = "cosine"
  config.ema.decay = 0.999
  if arg.size == "64":
    config.train.update(batch_size=64)
    config.optimizer.update(learning_rate=2e-4, schedule="constant")
    config.train.duration = "600 epochs" if arg.dataset == "folder" else "100k steps"
  if arg.size == "tiny":
    config.text.update(width=32, vocab_size=300, length=40)
    recipe.tiny(config)
  return config
