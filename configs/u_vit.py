"""U-ViT: patches, the time and the text as tokens of one transformer with long skips.

  python -m t2i_jax.main --config=configs/u_vit.py --workdir=runs/u_vit
  python -m t2i_jax.main --config=configs/u_vit.py:size=S/2,dataset=folder --workdir=runs/mine \\
    --config.data.options.path=PICTURES --config.components.text_encoder=clip-l \\
    --config.components.first_stage=kl-f8

"small" models pixels, the published sizes the latents of a first stage. On photographs the text is
CLIP L's, 77 tokens, as published; elsewhere a small encoder is trained with it.

Expected of "small" on "scenes", seed 0, after 2,700 of its steps, which are the FLOPs of
`configs/ddpm.py`'s 4,700: 30 % of 256 held-out captions right in everything (place 100 %, colour
94.5 %, shape 31 %), 0 % with the captions shuffled; after 31 minutes on one CPU core, the other
busy. The published sizes were not trained here.

Arguments:
  size: "small" (32 px, for two CPU cores, the default); "S/2" and "S/2-deep", the published
    text-to-image networks (256 px); "L/2" and "H/2", published with labels; "tiny", for tests.
  labels: told in place of a text, "yes" or "no" (the default).
  encoder: "transformer", a text encoder that is trained with it, or "component", an export; by
    default an export, but on "scenes" and "emoji".
  dataset: "scenes" (one object), "scenes_two", "scenes_all", "emoji", "folder".

Paper: Bao et al. 2023 (All are Worth Words: A ViT Backbone for Diffusion Models), appendix A and
the configurations of its release. Its guidance scale of 1 is 2 here.
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

PUBLISHED = dict(resolution=256, patch=2, schedule="scaled_linear")
SIZES = {
  # The objective of the quickstart.
  "small": dict(resolution=32, patch=4, width=128, depth=6, heads=4, schedule="cosine",
                prediction="x0", weighting="v_bounded", weighting_bound=10.0,
                density="logit_normal", density_spread=1.2, scan=False),
  # The scale of the latents of COCO's pictures, in the release.
  "S/2": dict(PUBLISHED, width=512, depth=12, heads=8, latent_scale=0.23010),
  "S/2-deep": dict(PUBLISHED, width=512, depth=16, heads=8, latent_scale=0.23010),
  "L/2": dict(PUBLISHED, width=1024, depth=20, heads=16, latent_scale=0.18215),
  "H/2": dict(PUBLISHED, width=1152, depth=28, heads=16, latent_scale=0.18215,
              convolution=False),
  "tiny": dict(resolution=16, patch=2, width=16, depth=2, heads=2, schedule="scaled_linear",
               steps=50),
}
# Steps, batch size, and both decays of Adam.
TRAINING = {
  "S/2": ("1000k steps", 256, 0.9, 0.9), "S/2-deep": ("1000k steps", 256, 0.9, 0.9),
  "L/2": ("300k steps", 1024, 0.99, 0.99), "H/2": ("500k steps", 1024, 0.99, 0.99),
}  # fmt: skip


def get_config(arg=None):
  arg = parse_arg(arg, size="small", labels="no", encoder="", dataset="scenes")
  config = recipe.base("u_vit", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.sharding.rules = recipe.TRANSFORMER_RULES
  labels = choose("labels", arg.labels, {"yes": True, "no": False})
  recipe.text_or_labels(config, arg.encoder, labels)
  if arg.size == "tiny":
    recipe.tiny(config, text=True)
    return config
  if arg.size == "small":
    recipe.small(config)
    config.sample.options.clip = True
    return config
  duration, batch_size, b1, b2 = TRAINING[arg.size]
  config.train.update(duration=duration, batch_size=batch_size)
  config.optimizer.update(
    learning_rate=2e-4, b1=b1, b2=b2, weight_decay=0.03, warmup="5000 steps", clip_norm=0.0
  )
  config.sample.options.update(solver="dpmpp_2m", steps=50, guidance=2.0)
  config.model.remat = "dots"
  config.precision.frozen = "bfloat16"
  return config
