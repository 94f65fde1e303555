"""Stable Diffusion 3 and 3.5: rectified flow by a multimodal transformer with three text encoders.

  python -m t2i_jax.main --config=configs/sd3.py:dataset=folder --workdir=runs/mine \\
    --config.data.options.path=PICTURES --config.components.text_encoder=clip-l-sd3 \\
    --config.components.text_encoder_2=bigg --config.components.text_encoder_3=t5-xxl \\
    --config.components.first_stage=kl-f8c16
  python -m t2i_jax.main --config=configs/sd3.py:size=small,encoder=transformer,dataset=scenes \\
    --workdir=runs/sd3 --config.train.duration="4400 steps"

"small" models pixels, the published sizes the latents of a first stage with 16 channels. The
components are exports that `convert` makes of a pipeline's text_encoder and vae folders; of a whole
pipeline it makes one to draw from.

Expected of "small" on "scenes", seed 0, after 4,400 of its steps, which are the FLOPs of
`configs/ddpm.py`'s 4,700: 67.6 % of 256 held-out captions right in everything (place 100 %, colour
98.4 %, shape 68.4 %), 0 % with the captions shuffled; after 59 minutes on two CPU cores that other
work shared. Outlines are ragged at the edges of its patches. The published sizes were not trained
here.

Arguments:
  size: "3-medium" (1024 px, the default), "3.5-medium" and "3.5-large", the published networks;
    "small" (32 px, for two CPU cores); "tiny", for tests.
  encoder: "component" (the default), the three published encoders, or "transformer", a small one
    that is trained with it.
  dataset: "folder", "emoji", "scenes" (one object), "scenes_two", "scenes_all".

Paper: Esser et al. 2024 (Scaling Rectified Flow Transformers for High-Resolution Image Synthesis),
sections 3.1, 4 and 5.3; the sizes are those of the released models.
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

# The autoencoder's scale and shift; times shifted for 1024 px; places of up to 192 tokens a side.
PUBLISHED = dict(
  resolution=1024, latent_scale=1.5305, latent_shift=0.0609, shift=3.0, grid=64, largest=192,
)
SIZES = {
  "3-medium": dict(PUBLISHED, width=1536, depth=24, heads=24),
  "3.5-medium": dict(PUBLISHED, width=1536, depth=24, heads=24, norm=True, dual=13, largest=384),
  "3.5-large": dict(PUBLISHED, width=2432, depth=38, heads=38, norm=True),
  "small": dict(resolution=32, patch=4, width=96, depth=6, heads=3, norm=True, dual=2, grid=8,
                largest=8, density_mean=0.5, scan=False),
  "tiny": dict(resolution=16, width=16, depth=3, heads=2, norm=True, dual=1, grid=4, largest=8,
               shift=3.0),
}  # fmt: skip


def get_config(arg=None):
  arg = parse_arg(arg, size="3-medium", encoder="component", dataset="folder")
  config = recipe.base("sd3", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.sharding.rules = recipe.TRANSFORMER_RULES
  config.text.encoder = arg.encoder
  if arg.encoder == "component":
    # All three are left out of a tenth of the batch (section 5.3).
    config.text.update(
      encoders=("text_encoder+text_encoder_2", "text_encoder_3"),
      pooled=("text_encoder", "text_encoder_2"), drop=0.0, drop_each=0.464, null="empty",
    )
  if arg.size == "tiny":
    recipe.tiny(config, text=True)
    return config
  if arg.size == "small":
    recipe.small(config, pool="flatten")
    config.sample.options.update(guidance=2.0, clip=True)
    return config
  config.train.update(duration="500k steps", batch_size=4096)
  config.optimizer.update(learning_rate=1e-4, warmup="1000 steps", weight_decay=0.01)
  config.model.remat = "dots"
  config.precision.frozen = "bfloat16"
  return config
