"""A model that draws what you ask for, trained on two CPU cores in minutes.

  python -m t2i_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

It is `configs/ddpm.py`'s system with other numbers: pictures of one object
from the procedural scenes, 32 px.
"""

from t2i_jax import recipe
from t2i_jax.config import choose, parse_arg

SIZES = {
  "small": dict(channels=32, multipliers=(1, 2, 4), attention_levels=(1, 2)),
  "tiny": dict(channels=16, multipliers=(1, 2), attention_levels=(1,)),
}


def get_config(arg=None):
  arg = parse_arg(arg, size="small", dataset="scenes")
  config = recipe.base("ddpm", arg.dataset)
  config.model.update(
    resolution=32, schedule="cosine", prediction="x0", weighting="v", density="stratified",
    blocks=1, head_channels=32, groups=16, patch=2, coordinates=3,
    **choose("size", arg.size, SIZES),
  )
  return config
