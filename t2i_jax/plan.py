"""`python -m t2i_jax.plan --config=configs/NAME.py --topology=v5e:4x4`: a run before it costs."""

import os
from collections.abc import Iterator, Sequence

from t2i_jax import command, config_files
from t2i_jax import config as configs
from t2i_jax.errors import UserError


def main(argv: list[str] | None = None) -> None:
  """The command; see `--help`."""
  parser = command.parser(
    "t2i_jax.plan",
    "Compiles a config's training step for a TPU slice, on a machine that has none, and says\n"
    "what it needs and what bounds it: parameters, FLOPs, bytes a chip, what the chips send.\n"
    "Components that the config does not name an export of are taken as they were published, and\n"
    "text features and latents come with the batch, as from t2i_jax.precompute.\n"
    "Needs pip install 'jax[tpu]'.",
    "python -m t2i_jax.plan --config=configs/stable_diffusion.py --topology=v5e:4x4 "
    "--config.mesh.data=1 --config.mesh.fsdp=-1 --config.train.batch_size=64",
    "python -m t2i_jax.plan --config=configs/sdxl.py --topology=v5p:2x2x2 --search "
    "--config.mesh.data=1 --config.mesh.fsdp=-1",
    "python -m t2i_jax.plan --config=configs/stable_diffusion.py:size=2 --topology=v5e:4x4 "
    "--component=text_encoder=openclip-h",
  )
  parser.add_argument("--config", required=True, metavar="FILE.py[:KEY=VALUE,...]",
                      help="the config, and its arguments")
  parser.add_argument("--topology", required=True, metavar="GENERATION:SHAPE",
                      help="the slice, such as v5e:16x16 or v5p:4x4x4")
  parser.add_argument("--slices", type=int, default=1, help="how many of them (1)")
  parser.add_argument("--component", action="append", default=[], metavar="NAME=PUBLISHED",
                      help="a published model as a component: clip-l, clip-l-xl, clip-l-sd3, "
                      "openclip-h, openclip-bigg, t5-xxl, kl-f8c4, kl-f8c4-xl, kl-f8c16; may be "
                      "repeated")
  parser.add_argument("--encode", action="store_true",
                      help="text encoders and first stage are part of the step")
  parser.add_argument("--effort", choices=["least", "full"], default="least",
                      help="the compiler's: a run's is full, which takes convolutions up to 20 "
                      "times as long; with the least, a step needs a little more memory (least)")
  parser.add_argument("--search", action="store_true",
                      help="find the largest batch that fits, by how much is computed again")
  settings, rest = command.split_settings(argv)
  command.run(parser, rest, lambda flags: _plan(flags, settings))


def _plan(flags, settings: Sequence[str]) -> None:
  # Compiling for a TPU runs on the CPU; a TPU that is there is another's.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  values = command.overrides(settings)
  config = config_files.load_config(flags.config, {"precision.compute": "bfloat16", **values})
  configs.check_ranges(config)
  if flags.slices < 1:
    raise UserError(f"--slices={flags.slices}: use 1 or more")
  from t2i_jax.parallel.topology import chip_of, slice_mesh
  from t2i_jax.planning import published, report

  also = {}
  for text in flags.component:
    name, equals, what = text.partition("=")
    if not equals:
      raise UserError(f"--component={text}: write NAME=PUBLISHED, such as text_encoder=clip-l")
    also[name] = what
  names = published.names_of(config, also)
  chip = chip_of(flags.topology)
  mesh = slice_mesh(flags.topology, config.mesh.to_dict(), flags.slices)
  slices = f"{flags.slices} x {flags.topology}" if flags.slices > 1 else flags.topology
  axes = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items() if n > 1)
  print(f"{flags.config} on {slices}: {mesh.size} chips ({axes or 'one'})", flush=True)
  for name, what in names.items():
    print(f"  {name}: {what}, as published")

  def unit(config) -> int:
    system = report.build(config, names, flags.encode).system
    return report.unit_of(system, config.train.accumulate, mesh)

  def measured(config) -> report.Report:
    parts = report.build(config, names, flags.encode)
    longer = ", or hours for a large U-Net" if flags.effort == "full" else ""
    print(f"compiling; minutes{longer}", flush=True)
    return report.measure(config, mesh, chip, parts, flags.effort)

  if flags.search:
    _search(config, measured, unit(config), report)
    return
  found = measured(config)
  print(report.table(found))
  if not found.fits:
    print("It does not fit. What makes it smaller, one or several of:")
    for line in report.advice(found, config, mesh):
      print(f"  {line}")


def _search(config, measured, unit: int, report) -> None:
  """Prints the largest batch, of multiples of `unit`, that fits for each policy of remat."""
  best = []
  for policy in _policies(config):
    low, high, kept = 0, None, None
    parts = 1
    while high is None or high - low > max(low // 8, 1):
      with config.unlocked():
        config.train.batch_size = parts * unit
        if policy is not None:
          config.model.remat = policy
      found = measured(config)
      said = "fits" if found.fits else "does not fit"
      print(f"remat={policy}, batch {config.train.batch_size} ({parts} a part): {said}", flush=True)
      low, high, kept = (parts, high, found) if found.fits else (low, parts, kept)
      if high == 1:
        break
      parts = 2 * low if high is None else (low + high) // 2
    print(f"remat={policy}: " + (f"{low * unit} pictures fit" if kept else "nothing fits"))
    if kept:
      print(report.table(kept), flush=True)
      best.append((kept.batch_size / max(kept.bounds.values()), policy, kept))
  if not best:
    raise UserError("not even the smallest batch fits; use a larger slice, or mesh.tensor")
  speed, policy, kept = max(best, key=lambda row: row[0])
  print(f"fastest on paper: remat={policy}, batch {kept.batch_size}: {speed:,.0f} pictures/s")


def _policies(config) -> Iterator:
  """Values of `model.remat` from least to most that is computed again; None where it has none."""
  value = config.model.get("remat")
  if value is None:
    yield None
  elif isinstance(value, bool):
    yield from (False, True)
  else:
    yield from ("none", "attention", "dots", "full")


if __name__ == "__main__":
  main()
