"""Semantic diffusion guidance: a CLIP that sees noised pictures steers a denoiser without text.

  python -m t2i_jax.main --config=configs/clip.py --workdir=runs/clip
  python -m t2i_jax.main --config=configs/semantic_guidance.py --workdir=runs/semantic \\
    --config.components.clip=runs/clip/export
  python -m t2i_jax.main --config=configs/ddpm.py --workdir=runs/base \\
    --config.text.encoder=none --config.model.draft=0 --config.model.schedule=cosine
  python -m t2i_jax.sample --export=runs/base/export --guide=runs/semantic/export \\
    --prompt="a large red ring at the top"

It is trained without captions; only the CLIP that it starts from has read any. A public one:

  python -m t2i_jax.convert --source=clip-vit-base-patch16 --towers=both --output=clip-b
  python -m t2i_jax.main --config=configs/semantic_guidance.py:size=256,dataset=folder \\
    --config.data.options.path=PICTURES --config.components.clip=clip-b --workdir=runs/semantic

Expected of "small" on "scenes", seed 0, from `configs/clip.py`'s: of noised pictures of held-out
combinations the nearest of 64 clean ones is the own for 63 %, after 21 minutes on one CPU core that
others used too; at a scale of 10 it guides `configs/adm.py:labels=no` to 14 % of 64 held-out
captions right in everything (colour 80 %, place 94 %, shape 28 %), 0 % without it. The size "256"
was not trained here.

Arguments:
  size: "small" (32 px, for two CPU cores, the default); "256", for the published denoisers of 256
    px, from a public CLIP; "tiny", for tests.
  dataset: "scenes" (one object), "scenes_two", "scenes_all", "emoji", "folder", or one of
    docs/data_sets.md.

Paper: Liu et al. 2021 (More Control for Free! Image Synthesis with Semantic Diffusion Guidance).
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

SIZES = {
  "small": dict(resolution=32, schedule="cosine", time_width=32),
  "256": dict(resolution=256, schedule="linear", time_width=128),
  "tiny": dict(resolution=16, schedule="cosine", steps=50, time_width=8),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="small", dataset="scenes")
  config = recipe.base("semantic_guidance", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.text.update(encoder="component", encoders=("clip",), drop=0.0)
  config.evaluate.every = "25%"
  if arg.size == "tiny":
    recipe.tiny(config)
    config.evaluate.every = "0 steps"
    return config
  if arg.size == "small":
    config.train.update(duration="1000 steps", batch_size=64)
    config.optimizer.update(
      name="muon", learning_rate=1e-3, weight_decay=0.01, schedule="cosine", warmup="50 steps"
    )
    config.ema.decay = 0.99
    return config
  config.train.update(duration="500k steps", batch_size=256)
  config.optimizer.update(learning_rate=1e-4, warmup="1000 steps")
  return config
