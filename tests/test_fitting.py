"""Exports whose arrays are not called as they are now: one line, before anything is computed."""

import dataclasses

import jax
import pytest
from runs import TOY, config_of, write_export

from t2i_jax import assembly, batch_spec, evaluate, export, sample
from t2i_jax.errors import UserError
from t2i_jax.systems import trees
from t2i_jax.text.tokenizer import Tokenizers


@pytest.fixture(scope="module")
def old(tmp_path_factory):
  """A toy's export in which a layer is called as an older version might have called it."""
  path = tmp_path_factory.mktemp("old") / "export"
  write_export(path, config_of(TOY))
  exported = export.read(path)
  flat = trees.flatten(exported.variables)
  (kernel,) = [name for name in flat if name.endswith("drawer/out/kernel")]
  flat[kernel.replace("/out/", "/last/")] = flat.pop(kernel)
  export.write(path, exported.config, 7, trees.unflatten(flat), exported.tokenizers)
  return path


@pytest.mark.parametrize("command, flags", [
  (sample, ["--prompt=a ring"]), (evaluate, ["--metric=loss", "--pictures=8"]),
])
def test_the_commands_name_what_is_missing_and_what_has_no_place(
  old, command, flags, fails, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  message = fails(command, f"--export={old}", *flags)
  assert message.startswith(f"the export {old} does not fit its config: of ")
  assert message.endswith(
    "arrays 1 are missing, such as params/drawer/out/kernel; 1 have no place, such as "
    "params/drawer/last/kernel; use the version of t2i_jax that wrote it, or export its run again"
  )


def test_so_does_an_export_that_training_begins_from_or_builds_on(old, tmp_path):
  config = config_of(TOY, init_from=old)
  system = assembly.build_system(config)
  exported = export.read(old)
  with pytest.raises(UserError, match="1 are missing, such as params/drawer/out/kernel"):
    assembly.check_fits(system, exported)
  config = config_of("configs/kl_autoencoder.py", components__perceptual=old)
  with pytest.raises(UserError, match="1 are missing, such as params/drawer/out/kernel"):
    assembly.load_components(config)


def test_components_inside_an_export_are_looked_at_too(tmp_path):
  network = config_of("configs/feature_net.py")
  about = {"perceptual": {"config": network.to_dict(), "components": {}, "step": 1}}
  config = config_of("configs/kl_autoencoder.py")
  system = assembly.build_with(config, about)

  def shapes(system, frozen):
    made = jax.eval_shape(
      lambda batch: system.init(jax.random.key(0), batch, frozen),
      batch_spec.abstract_batch(system, 2),
    )
    return trees.split(made, system.ema_groups)[0]

  inside = shapes(assembly.build_system(network), {})
  frozen = {kind: {"perceptual": groups} for kind, groups in inside.items()}
  exported = export.Export(
    tmp_path, config, 1, trees.merge(shapes(system, frozen), frozen), Tokenizers({}), about
  )
  assembly.check_fits(system, exported)
  flat = trees.flatten(exported.variables)
  name = next(name for name in flat if name.startswith("params/perceptual/network/"))
  flat["params/perceptual/network/other"] = flat.pop(name)
  changed = dataclasses.replace(exported, variables=trees.unflatten(flat))
  with pytest.raises(UserError) as error:
    assembly.check_fits(system, changed)
  within = name.replace("params/perceptual/", "params/")
  assert f"the export {tmp_path}: its component perceptual does not fit its config: of " in str(
    error.value)
  assert f"1 are missing, such as {within}; 1 have no place, such as params/network/other" in str(
    error.value)


def test_an_export_that_is_not_there_yet_is_made_of_its_run(old, tmp_path):
  run = tmp_path / "run"
  (run / "checkpoints").mkdir(parents=True)
  for path in (run, run / "export"):
    with pytest.raises(UserError, match=(
      rf"no export at '{path}': it has no config.json: the run '{run}' has not ended; "
      rf"python -m t2i_jax.export --workdir={run} --output"
    )):
      export.read(path)
  (run / "config.json").write_text("{}")
  with pytest.raises(UserError, match=rf"^'{run}' is no export: the run '{run}' has not ended; "):
    export.read(run)
  with pytest.raises(UserError, match=rf"did you mean '{old}'\?"):
    export.read(old.parent / "exprot")
