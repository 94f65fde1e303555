"""The commands: help that teaches, and one line for whatever a user can get wrong."""

import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image
from runs import ROOT, TOY, TOY_CONFIG, config_of, folder_of, saved_steps, starts, train_on

from t2i_jax import command, evaluate, export, main, sample, workdirs
from t2i_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_programs")

COMMANDS = [path.stem for path in (ROOT / "t2i_jax").glob("*.py")
            if "command.parser(" in path.read_text()]
QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}:size=tiny"


@pytest.fixture(scope="module")
def run(tmp_path_factory, compiled_programs):
  """A work directory of the toy, two steps long, with an export."""
  workdir = tmp_path_factory.mktemp("run")
  train_on(config_of(TOY, train__duration=2, checkpoint__every=1, sample__every=0,
                     evaluate__every=0), workdir)
  return workdir


@pytest.fixture
def exported(run, tmp_path):
  return shutil.copytree(run / "export", tmp_path / "exported")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name, capsys):
  module = importlib.import_module(f"t2i_jax.{name}")
  with pytest.raises(SystemExit) as exit:
    module.main(["--help"])
  text = capsys.readouterr().out
  assert exit.value.code == 0
  assert f"usage: t2i_jax.{name}" in text
  examples = text.partition("examples:\n")[2].splitlines()
  begins = re.compile(rf"  python -m t2i_jax\.{name} ([a-z]+ )?--")
  assert examples and all(map(begins.match, examples))
  # What the examples use exists.
  flags = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", text, re.MULTILINE))
  for line in examples:
    used = set(re.findall(r" (--[a-z-]+)(?=[ =]|$)", line))
    assert used <= flags, line


def test_there_are_commands():
  assert {"main", "sample", "export", "evaluate", "convert", "precompute"} <= set(COMMANDS)


@pytest.mark.parametrize("module, flags, message", [
  (main, [], "the following arguments are required: --config; see python -m t2i_jax.main --help"),
  (main, [QUICKSTART], "--workdir is missing: name the folder that this run may write to"),
  (main, [QUICKSTART, "--wrokdir=x"], "unknown flag '--wrokdir'; did you mean '--workdir'?"),
  (main, ["--config=configs/quickstrat.py", "--show"],
   "no config file at 'configs/quickstrat.py'; did you mean 'configs/quickstart.py'?"),
  (main, [QUICKSTART, "--config.model.chanels=3", "--workdir=x"],
   "unknown config key 'model.chanels'; did you mean 'model.channels'?"),
  (main, [QUICKSTART, "--config.train.duration", "--workdir=x"],
   "--config.train.duration has no value; write --config.train.duration=VALUE"),
  (main, [QUICKSTART, "--config.seed=1", "--config.seed=2", "--show"],
   "--config.seed is given twice"),
  (main, [QUICKSTART, "--config.seed", "many", "--show"], "config key seed=many: expected int"),
  (main, [QUICKSTART.replace("tiny", "huge"), "--workdir=x"], "unknown size 'huge'; valid: small"),
  (main, [f"{QUICKSTART},dataset=emojy", "--workdir=x"],
   "unknown dataset 'emojy'; did you mean 'emoji'?"),
  (sample, ["--prompt=a"], "the following arguments are required: --export"),
  (sample, ["--export=x"], "no prompts: give --prompt='...' or --prompts=FILE"),
  (sample, ["--export=x", "--prompts=nowhere.txt"],
   "--prompts=nowhere.txt cannot be read: No such file or directory; give a text file"),
  (sample, ["--export=x", "--prompt=a", "--count=0"], "--count=0 draws nothing; use 1 or more"),
  (sample, ["--export=x", "--prompt=a", "--count=x"], "argument --count: invalid int value: 'x'"),
  (sample, ["--export=nowhere", "--prompt=a"], "no export at 'nowhere': it has no config.json"),
  (sample, ["--export=x", "--prompt=\udcff"], "is not UTF-8 text; check the terminal's encoding"),
  (evaluate, ["--export=nowhere"], "no export at 'nowhere': it has no config.json"),
  (evaluate, ["--export=x", "--metric=verifer"], "unknown metric 'verifer'; did you mean 'veri"),
  (evaluate, ["--export=x", "--pictures=1"], "--pictures=1: use 2 or more"),
  (export, ["--workdir=nowhere", "--output=there"], "no run in 'nowhere': it has no config.json"),
])
def test_flags_that_are_wrong(module, flags, message, fails, tmp_path, monkeypatch):
  (tmp_path / "configs").symlink_to(ROOT / "configs")
  monkeypatch.chdir(tmp_path)
  assert message in fails(module, *flags)
  left = {path.name for path in tmp_path.iterdir()} - {"configs", "samples"}
  assert not left, "a command that refuses its flags writes nothing"


def test_a_work_directory_of_another_run_is_left_alone(run, fails, tmp_path):
  workdir = shutil.copytree(run, tmp_path / "run")
  before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
  message = fails(main, TOY_CONFIG, f"--workdir={workdir}", "--config.optimizer.b1=0.5")
  assert message.startswith(
    f"--workdir={workdir} holds another run: its optimizer.b1 is 0.9, this config's is 0.5; choose "
    f"another --workdir (to go on from that run with this config, add --config.resume={workdir})"
  )
  message = fails(main, QUICKSTART, f"--workdir={workdir}")
  assert "holds another run" in message and " more; choose another --workdir" in message
  assert before == {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
  (workdir / "config.json").write_text("{")
  assert "config.json is not a config" in fails(main, TOY_CONFIG, f"--workdir={workdir}")
  (tmp_path / "file").write_text("")
  message = fails(main, TOY_CONFIG, f"--workdir={tmp_path / 'file'}")
  assert f"cannot make --workdir={tmp_path / 'file'}: File exists" in message


def test_a_checkpoint_or_export_of_another_system(run, fails, tmp_path):
  message = starts(fails, tmp_path / "a", f"--config.resume={run}", config=QUICKSTART)
  assert "is of the system 'toy', the config's is 'ddpm'; choose another" in message
  wider = "--config.model.width=48"
  message = starts(fails, tmp_path / "b", wider, f"--config.resume={run}")
  assert "does not fit this run: params/" in message
  assert "use the config that wrote it, or another directory" in message
  message = starts(fails, tmp_path / "c", wider, f"--config.init_from={run / 'export'}")
  assert re.search(r"does not fit this config: of \d+ arrays \d+ have another shape, such as "
                   r"drawer/\S+, \[.*\] in place of \[.*\]; use the model and text", message)
  assert message.endswith("; it was trained with --config.model.width=32")
  message = starts(fails, tmp_path / "d", f"--config.init_from={run / 'export'}", config=QUICKSTART)
  assert "does not fit this config" in message
  message = starts(fails, tmp_path / "d", f"--config.init_from={run / 'export'}",
                   "--config.text.length=20")
  assert message.endswith("takes prompts of 40 tokens; it was trained with --config.text.length=40")
  message = starts(fails, tmp_path / "e", "--config.text.length=20", f"--config.resume={run}")
  assert "takes prompts of 40 tokens, the config has text.length=20; set it to the same" in message


def test_a_damaged_checkpoint_says_how_to_go_on(run, fails, tmp_path):
  workdir = shutil.copytree(run, tmp_path / "run")
  newest = workdir / "checkpoints" / "state" / "2"
  for path in newest.rglob("*"):
    if path.is_file() and path.stat().st_size > 1000:
      path.write_bytes(path.read_bytes()[:100])
  message = fails(main, TOY_CONFIG, f"--workdir={workdir}", "--config.train.duration=3",
                  "--config.checkpoint.every=1", "--config.sample.every=0",
                  "--config.evaluate.every=0")
  assert f"checkpoint {newest} cannot be read, its files are missing or damaged" in message
  assert "restore it from a copy, or delete it to go on from step 1" in message
  assert saved_steps(workdir) == [1, 2]


def test_exports_that_are_not_whole(run, exported, fails):
  def error():
    return fails(sample, f"--export={exported}", "--prompt=a", f"--output={exported / 'out'}")

  for name in ("variables.safetensors", "tokenizer.json"):
    content = (exported / name).read_bytes()
    (exported / name).unlink()
    assert error() == f"the export {exported} is not whole: {name} is missing; copy it again"
    (exported / name).write_bytes(content[:50])
    assert f"is not whole: {name} has 50 bytes of {len(content)}; copy it again" in error()
    (exported / name).write_bytes(bytes(len(content)))  # as a disk may leave it
    assert name in error()
    (exported / name).write_bytes(content)
  about = json.loads((exported / "config.json").read_text())
  for change, message in (
    ({"format": 99}, "has export format 99, this version reads 3"),
    ({"config": {}}, "its config has no section"),
    ({"config": {**about["config"], "system": "toi"}}, "unknown system 'toi'"),
    ({"step": None}, "is not an export's (TypeError"),
  ):
    (exported / "config.json").write_text(json.dumps(about | change))
    assert message in error()
  (exported / "config.json").write_text("{")
  assert "is not an export's (JSONDecodeError" in error()
  message = fails(sample, f"--export={run}", "--prompt=a", f"--output={exported / 'out'}")
  assert f"did you mean '{run / 'export'}'?" in message


@pytest.mark.parametrize("flags, message", [
  (["--guidance=3"], "unknown sampling option of toy 'guidance'"),
  (["--option=temperatur=3"], "unknown sampling option of toy 'temperatur'; did you mean"),
  (["--option=temperature=hot"], "sampling option temperature=hot: expected float, such as 1.0"),
  (["--option=temperature"], "--option=temperature is not NAME=VALUE"),
  (["--option=mode=odd"], "mode=odd cannot be drawn"),
  (["--seed=-1"], "seed=-1 is out of range; use 0 to 4294967295"),
  (["--batch-size=0"], "batch_size=0 draws nothing; use 1 or more"),
])
def test_what_a_sampler_does_not_take(flags, message, run, fails, tmp_path):
  assert message in fails(sample, f"--export={run / 'export'}", "--prompt=a",
                          f"--output={tmp_path}", *flags)


def test_places_that_cannot_be_written(run, fails, tmp_path):
  (tmp_path / "file").write_text("")
  message = fails(sample, f"--export={run / 'export'}", "--prompt=a",
                  f"--output={tmp_path / 'file'}")
  assert f"cannot read or write {tmp_path / 'file'}: File exists" in message
  (tmp_path / "latin.txt").write_bytes("ein Käse".encode("latin-1"))
  message = fails(sample, "--export=x", f"--prompts={tmp_path / 'latin.txt'}")
  assert "is not UTF-8 text" in message and "save it as UTF-8" in message


def test_prompts_are_drawn_and_what_is_cut_of_them_is_said(run, tmp_path, capfd):
  prompts = tmp_path / "prompts.txt"
  long = "a small red circle " * 10
  prompts.write_text(f"a red ring\n\n{long}\n")
  sample.main([f"--export={run / 'export'}", f"--prompts={prompts}", "--prompt=a / cat?",
               "--count=2", f"--output={tmp_path / 'out'}"])
  out, err = capfd.readouterr()
  names = sorted(path.name for path in (tmp_path / "out").iterdir())
  assert [name[:13] for name in names] == [
    "00000_a-cat.p", "00001_a-cat.p", "00002_a-red-r", "00003_a-red-r", "00004_a-small",
    "00005_a-small", "grid.png",
  ]
  assert out == f"6 pictures and grid.png in {tmp_path / 'out'}\n"
  (line,) = [line for line in err.splitlines() if line.startswith("warning: ")]
  assert "is longer than the 40 tokens that the encoder takes: '" in line
  assert line.endswith("small red circle a...' is cut off") and len(line) < 300
  assert Image.open(tmp_path / "out" / names[0]).size == (16, 16)


def test_a_picture_does_not_depend_on_the_batch_or_the_devices(run):
  import jax

  import t2i_jax
  from t2i_jax.parallel.mesh import make_mesh

  prompts = [f"a {colour} ring" for colour in ("red", "blue", "green", "black", "white")]
  pipeline = t2i_jax.load(run / "export")
  whole = pipeline(prompts, seed=5)
  assert whole.shape == (5, 16, 16, 3) and whole.dtype == np.uint8
  np.testing.assert_array_equal(pipeline(prompts, seed=5, batch_size=2), whole)
  np.testing.assert_array_equal(pipeline(prompts[3:], seed=5, first=3), whole[3:])
  np.testing.assert_array_equal(pipeline(prompts[0], seed=5), whole[:1])
  one = type(pipeline)(pipeline.system, pipeline.tokenizers, make_mesh({}, jax.devices()[:1]),
                       jax.device_get(pipeline.variables), pipeline.config)
  np.testing.assert_array_equal(one(prompts, seed=5), whole)
  assert (pipeline(prompts, seed=6) != whole).any()


def test_export_never_replaces_what_is_no_export(run, fails, tmp_path):
  mine = folder_of(tmp_path / "photos", None, ["a.png"])
  for place in (mine, run, tmp_path / "photos" / "a.png"):
    message = fails(export, f"--workdir={run}", f"--output={place}")
    assert f"'{place}' is there and is no export, so it is not replaced" in message
  assert (mine / "a.png").exists() and (run / "config.json").exists()
  message = fails(export, f"--workdir={run}", f"--output={tmp_path / 'new'}", "--step=7")
  assert "no checkpoint of step 7 in" in message and "stored: 1, 2" in message


def test_export_of_any_checkpoint(run, tmp_path, capsys):
  export.main([f"--workdir={run}", f"--output={tmp_path / 'new'}"])
  assert capsys.readouterr().out == f"{tmp_path / 'new'}\n"
  for name in ("variables.safetensors", "tokenizer.json"):
    assert (tmp_path / "new" / name).read_bytes() == (run / "export" / name).read_bytes()
  assert "| weights | moving average, decay" in (tmp_path / "new" / "README.md").read_text()
  kernel = lambda path: export.read(path).variables["params"]["drawer"]["out"]["kernel"]  # noqa: E731
  averaged = kernel(tmp_path / "new")
  export.main([f"--workdir={run}", f"--output={tmp_path / 'new'}", "--no-ema"])
  last = kernel(tmp_path / "new")
  assert export.read(tmp_path / "new").step == 2 and not np.array_equal(last, averaged)
  assert "not averaged" in (tmp_path / "new" / "README.md").read_text()
  export.main([f"--workdir={run}", f"--output={tmp_path / 'new'}", "--step=1"])
  assert export.read(tmp_path / "new").step == 1
  assert not np.array_equal(kernel(tmp_path / "new"), averaged)
  assert {path.name for path in tmp_path.iterdir()} == {"new"}


def test_an_export_whose_networks_are_not_these(exported, fails, tmp_path):
  about = json.loads((exported / "config.json").read_text())
  about["config"]["model"]["width"] = 24
  (exported / "config.json").write_text(json.dumps(about))
  message = fails(sample, f"--export={exported}", "--prompt=a ring", f"--output={tmp_path / 'out'}")
  assert re.search(r"does not fit its config: of \d+ arrays \d have another shape, such as "
                   r"params/drawer/\S+, \[.*\] in place of \[.*\]; use the version", message)


def test_scores_are_written_into_the_model_card(exported):
  export.add_to_card(exported, "Judged: 1 %")
  card = (exported / "README.md").read_text()
  assert card.startswith("# toy") and card.endswith("\n\nJudged: 1 %\n")
  export.read(exported)


def test_two_processes_do_not_train_in_one_place(fails, tmp_path):
  with workdirs.locked(epath.Path(tmp_path)):
    message = starts(fails, tmp_path)
  assert message.startswith(f"another process is training in --workdir={tmp_path}")


def test_an_export_that_is_fine_tuned_says_what_it_gives(run, tmp_path, capfd):
  config = config_of(TOY, train__duration=1, sample__every=0, evaluate__every=0,
                     init_from=run / "export")
  train_on(config, tmp_path / "fine")
  assert "takes drawer, text_encoder; starts critic from scratch" in capfd.readouterr().err


def test_each_batch_is_on_the_disk_before_the_next_is_drawn(run, tmp_path, monkeypatch):
  seen = []
  pipeline = sys.modules["t2i_jax.pipeline"].Pipeline

  def batches(self, prompts, seed, **options):
    for drawn in original(self, prompts, seed, **options):
      yield drawn
      seen.append(len(list(tmp_path.glob("0*.png"))))

  original = pipeline.batches
  monkeypatch.setattr(pipeline, "batches", batches)
  sample.main([f"--export={run / 'export'}", "--prompt=a ring", "--count=20", "--batch-size=8",
               f"--output={tmp_path}"])
  assert seen == [8, 16, 20]
  assert (tmp_path / "grid.png").exists()


def test_long_captions_are_said_once_at_the_start(tmp_path, capfd):
  train_on(config_of(TOY, train__duration=1, sample__every=0, evaluate__every=0, text__length=9),
           tmp_path)
  err = capfd.readouterr().err
  assert re.search(r"warning: \d+% of the captions are longer than the 9 tokens", err)


def test_a_full_disk_leaves_the_old_export_whole(run, exported, fails, monkeypatch):
  opened = Path.open

  def full(path, mode="r", *args, **kwargs):
    if "w" in mode and path.suffix == ".writing":
      raise OSError(28, "No space left on device")
    return opened(path, mode, *args, **kwargs)

  before = {path.name: path.read_bytes() for path in exported.iterdir()}
  monkeypatch.setattr(Path, "open", full)
  message = fails(export, f"--workdir={run}", f"--output={exported}")
  assert message == (f"cannot write the export {exported}: No space left on device; free space "
                     "there or choose another folder")
  assert before == {path.name: path.read_bytes() for path in exported.iterdir()}
  assert [path.name for path in exported.parent.iterdir()] == ["exported"]


def test_evaluate(run, fails, tmp_path, capfd):
  flags = [f"--export={run / 'export'}", "--metric=loss"]
  message = fails(evaluate, *flags, "--split=heldout")
  assert "unknown split of data set 'scenes' 'heldout'; did you mean" in message
  message = fails(evaluate, *flags, "--data-option=level=two")
  assert "unknown option of data set 'scenes' 'level'; did you mean 'levels'?" in message
  evaluate.main([*flags, "--split=held_out_pairs", f"--output={tmp_path}"])
  (row,) = json.loads((tmp_path / "scores.json").read_text())["results"]
  assert row["export"]["step"] == 2 and 0 < row["results"]["loss/error"]["value"] < 4
  assert row["drawn"] == "" and not (tmp_path / "drawn").exists()
  assert "loss/error 0." in capfd.readouterr().out


def raising(error):
  """A command that does nothing but raise."""

  class Command:
    @staticmethod
    def main(argv):
      def act(flags):
        raise error

      command.run(command.parser("x", "y", "z"), argv, act)

  return Command


def test_the_machine_s_troubles_are_one_line_too(fails, tmp_path):
  assert fails(raising(OSError(28, "No space left on device", str(tmp_path)))) == (
    f"cannot read or write {tmp_path}: No space left on device; check its permissions and the "
    "space left"
  )
  full = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nmore\nlines")
  assert "use a smaller batch (train.batch_size, or --batch-size)" in fails(raising(full))
  assert fails(raising(UserError("one\n  line"))) == "one line"
  with pytest.raises(SystemExit) as exit:
    raising(KeyboardInterrupt()).main([])
  assert exit.value.code == 130
  with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
    raising(ZeroDivisionError()).main([])


def test_show_prints_the_config(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["main", QUICKSTART, "--config.seed=7", "--show"])
  main.main()
  assert json.loads(capsys.readouterr().out)["seed"] == 7
