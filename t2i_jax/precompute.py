"""`python -m t2i_jax.precompute text|latents`: what frozen systems make of a data set, once."""

from t2i_jax import command, config_files, precompute_latents, precompute_text
from t2i_jax import config as configs
from t2i_jax.caches import FIRST_STAGE
from t2i_jax.data import shards, text_cache
from t2i_jax.errors import UserError

# Types of what is stored, the default first.
DTYPES = {
  "text": tuple(text_cache.DTYPES),
  "latents": ("float16", *(name for name in shards.DTYPES if name != "float16")),
}


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.precompute",
    "text: encodes every caption of a config's data set once, with the frozen text encoders that\n"
    "the config names, so that training reads features in place of encoding, and holds no encoder\n"
    "on its devices: add --config.text.cache=DIR to the training command.\n"
    "latents: encodes every picture once, with the frozen first stage that the config names, so\n"
    "that training reads latents in place of pictures: add --config.data.latents=DIR.\n"
    "Stopped, it goes on where it was when the same command is given again; on several hosts each\n"
    "writes its own shards.",
    "python -m t2i_jax.precompute text --config=configs/ddpm.py:dataset=folder "
    "--config.data.options.path=PICTURES --config.text.encoder=component "
    "--config.components.text_encoder=clip-l --output=cache",
    "python -m t2i_jax.precompute latents --config=CONFIG --config.components.first_stage=EXPORT "
    "--rows=50000 --output=latents",
  )
  parser.add_argument("what", metavar="|".join(DTYPES))
  parser.add_argument("--config", required=True, metavar="FILE.py[:KEY=VALUE,...]",
                      help="the config of the training, with --config.KEY=VALUE as there")
  parser.add_argument("--output", required=True, help="the folder of the cache")
  parser.add_argument("--split", action="append", default=[],
                      help="a split to encode; may be repeated; all by default")
  parser.add_argument("--dtype", metavar="|".join(shards.DTYPES),
                      help="type of what is stored (bfloat16 for text, float16 for latents)")
  parser.add_argument("--shard-size", type=int, default=1024,
                      help="captions or pictures a file (1024)")
  parser.add_argument("--batch-size", type=int, default=64,
                      help="captions or pictures encoded at a time (64)")
  parser.add_argument("--rows", type=int,
                      help="latents: how many rows to store of a split that is made on the fly")
  parser.add_argument("--flips", action="store_true",
                      help="latents: store training pictures mirrored too, and train on either; "
                           "not where captions say left and right")
  settings, rest = command.split_settings(argv)
  command.run(parser, rest, lambda flags: _precompute(flags, settings))


def _precompute(flags, settings) -> None:
  configs.choose("what to precompute", flags.what, DTYPES)
  dtype = flags.dtype or DTYPES[flags.what][0]
  configs.choose("--dtype", dtype, dict.fromkeys(DTYPES[flags.what]))
  for name in ("shard_size", "batch_size", "rows"):
    value = getattr(flags, name)
    if value is not None and value < 1:
      raise UserError(f"--{name.replace('_', '-')}={value}: use 1 or more")
  config = config_files.load_config(flags.config, command.overrides(settings))
  common = (tuple(flags.split), dtype, flags.shard_size, flags.batch_size)
  if flags.what == "text":
    _check_text(flags, config)
    command.set_up_jax()
    precompute_text.write_features(config, flags.output, *common)
    return
  if FIRST_STAGE not in config.components:
    raise UserError(f"latents are of a first stage: set --config.components.{FIRST_STAGE}=EXPORT")
  command.set_up_jax()
  precompute_latents.write_latents(config, flags.output, *common, flags.rows, flags.flips)


def _check_text(flags, config) -> None:
  if config.text.encoder != "component":
    raise UserError(f"text.encoder={config.text.encoder} is trained, so its features change; set "
                    "--config.text.encoder=component and --config.components.text_encoder=EXPORT")
  for name, given in (("rows", flags.rows is not None), ("flips", flags.flips)):
    if given:
      raise UserError(f"--{name} is of latents; leave it out")


if __name__ == "__main__":
  main()
