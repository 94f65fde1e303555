"""LoRA: low-rank adapters of a trained system, fine-tuned on a data set of one's own.

  python -m t2i_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m t2i_jax.main --config=configs/lora.py:dataset=folder --workdir=runs/lora \\
    --config.components.base=runs/quickstart/export --config.data.options.path=PICTURES
  python -m t2i_jax.adapters merge --export=runs/lora/export --output=merged

The base is an export of any system that has one loss: one of `ddpm`, of a public Stable Diffusion
that `python -m t2i_jax.convert` made (of a transformer with `--apart`)... It stays as it is, and
travels in the export; with `--config.precision.frozen=bfloat16` it takes half the memory. Its size
of pictures, its text and its sampling options are the run's: of `text` nothing is read here, and of
`sample.options` what is set by hand. `python -m t2i_jax.adapters` reads and writes the files of
adapters that others use.

Which layers: `--config.model.groups=denoiser,text_encoder` for the text encoder besides;
`--config.model.targets` for others than the attentions' projections, such as
"attention/,_block/conv".

Expected of a quickstart that draws 100 % of 256 held-out captions right, and a folder of 1,000
pictures of the same kind whose captions have "red" and "blue" exchanged: with 16,896 parameters
(`--config.model.groups=denoiser,draft --config.train.duration=600`), after 7 minutes on one CPU
core, 100 % of the captions that name one of the two give the other colour (0 % before), and 100 %
of the other captions are drawn as before.

Arguments:
  size: "small" (rank 4, the default); "tiny", for tests.
  dataset: "scenes" (one object), "scenes_two", "scenes_all", "emoji", "folder", or one of
    docs/data_sets.md.

Paper: Hu et al. 2021 (LoRA: Low-Rank Adaptation of Large Language Models).
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

SIZES = {"small": dict(rank=4, alpha=4.0), "tiny": dict(rank=2, alpha=4.0)}


def get_config(arg=None):
  arg = parse_arg(arg, size="small", dataset="scenes")
  config = recipe.base("lora", arg.dataset)
  config.model.update(choose("size", arg.size, SIZES))
  config.train.update(duration="1000 steps", batch_size=16)
  config.optimizer.update(learning_rate=1e-3, schedule="cosine", warmup="50 steps")
  config.ema.decay = 0.99
  if arg.size == "tiny":
    recipe.tiny(config)
    config.sample.count = 4
  return config
