"""DiT: a transformer of patches, modulated by a text or by labels, or attending to the text.

  python -m t2i_jax.main --config=configs/dit.py --workdir=runs/dit
  python -m t2i_jax.main --config=configs/dit.py:size=alpha,dataset=folder --workdir=runs/alpha \\
    --config.data.options.path=PICTURES --config.components.text_encoder=t5-xxl \\
    --config.components.first_stage=kl-f8

"small" models pixels, the published sizes the latents of a first stage. With `labels=yes` a data
set's labels are told in place of a text, as DiT was published.

Expected of "small" on "scenes", seed 0, after 2,800 of its steps, which are the FLOPs of
`configs/ddpm.py`'s 4,700: 49 % of 256 held-out captions right in everything (place 100 %, colour
98.8 %, shape 50 %), 0 % with the captions shuffled; after 30 minutes on one CPU core, the other
busy. The published sizes were not trained here.

Arguments:
  size: "small" (32 px, for two CPU cores, the default); the published networks "S/2", "B/2", "L/2"
    and "XL/2" (256 px, in latents of side 32; `--config.model.patch=4` and 8 make the paper's
    others), where the text's vector takes the label's place; "alpha", PixArt-alpha's network (256
    px); "tiny", for tests.
  labels: "yes" or "no" (the default).
  encoder: "transformer", a text encoder that is trained with it, or "component", an export; by
    default an export, but on "scenes" and "emoji".
  dataset: "scenes" (one object), "scenes_two", "scenes_all", "emoji", "folder".

Papers: Peebles and Xie 2023 (Scalable Diffusion Models with Transformers), table 1 and section 4;
Chen et al. 2024 (PixArt-alpha), section 2.
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

# Table 1; linear betas, learned variances, KL-f8's latents.
PUBLISHED = dict(
  patch=2, resolution=256, latent_scale=0.18215, schedule="linear", learned_variance=True,
)
S, B, L, XL = (
  dict(PUBLISHED, width=width, depth=depth, heads=heads)
  for width, depth, heads in ((384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16))
)
SIZES = {
  # The objective of the quickstart; attention to the text tells what is where.
  "small": dict(resolution=32, patch=4, width=128, depth=6, heads=4, cross_attention=True,
                schedule="cosine", prediction="x0", weighting="v_bounded", weighting_bound=10.0,
                density="logit_normal", density_spread=1.2, scan=False),
  "S/2": S, "B/2": B, "L/2": L, "XL/2": XL,
  "alpha": dict(XL, modulation="single", cross_attention=True, pooled=False),
  "tiny": dict(resolution=16, patch=2, width=16, depth=2, heads=2, cross_attention=True,
               schedule="linear", steps=50),
}  # fmt: skip


def get_config(arg=None):
  arg = parse_arg(arg, size="small", labels="no", encoder="", dataset="scenes")
  config = recipe.base("dit", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.sharding.rules = recipe.TRANSFORMER_RULES
  labels = choose("labels", arg.labels, {"yes": True, "no": False})
  recipe.text_or_labels(config, arg.encoder, labels)
  if config.model.classes:
    config.model.cross_attention = False
  if arg.size == "tiny":
    recipe.tiny(config, text=True)
    return config
  if arg.size == "small":
    recipe.small(config, pool="flatten")
    config.sample.options.clip = True
    return config
  config.sample.options.update(solver="ddpm", variance="learned", steps=250, guidance=4.0)
  config.model.remat = "dots"
  config.precision.frozen = "bfloat16"
  if arg.size == "alpha":
    # Rate, decay, clipping and warmup of its release, from captions on; a global batch for many
    # devices.
    if config.text.encoder == "component":
      config.text.null = "learned"
    config.train.update(duration="150k steps", batch_size=2048)
    config.optimizer.update(
      learning_rate=2e-5, eps=1e-10, weight_decay=0.03, clip_norm=0.01, warmup="1000 steps"
    )
    config.sample.options.update(solver="dpmpp_2m", variance="small", steps=20, guidance=4.5)
    return config
  config.train.update(
    duration="7000k steps" if arg.size == "XL/2" else "400k steps", batch_size=256
  )
  config.optimizer.update(learning_rate=1e-4, weight_decay=0.0, clip_norm=0.0)
  return config
