"""Training that must not begin, and what a user may have wrong at its start."""


import pytest
from runs import TOY_CONFIG, folder_of, saved_steps, starts

from t2i_jax import main

pytestmark = pytest.mark.usefixtures("compiled_programs")


@pytest.mark.parametrize("flags, message", [
  (["--config.train.batch_size=9"], "train.batch_size=9 does not divide over the 8 parts of the "
   "mesh (data=8); set train.batch_size=8 or 16"),
  (["--config.mesh.data=3"], "mesh (data=3) is for 3 devices, but there are 8"),
  (["--config.mesh.fsdp=3"], "3 does not divide the 8 devices"),
  (["--config.train.accumulate=3"], "train.batch_size=16 does not divide "
   "into train.accumulate=3 microbatches, each over 8 devices; use a multiple of 24"),
  (["--config.train.accumulate=16"], "use a multiple of 128"),
  (["--config.train.duration=0"], "train.duration is 0, so there is nothing to train"),
  (["--config.train.duration=3 epochs"], "this data set is made on the fly and has no epochs"),
  (["--config.optimizer.name=adm"], "unknown optimizer.name 'adm'; did you mean 'adam'?"),
  (["--config.optimizer.multipliers=abc"], "'abc' is no pair of a regular expression and a factor"),
  (["--config.optimizer.multipliers=(('a', 'x'),)"], "the factor 'x' is no number"),
  (["--config.optimizer.multipliers=(('(', 1.0),)"], "'(' is not a regular expression"),
  (["--config.train.duration=3000000000"], "is 3e+09 steps; a run has at most 2147483647"),
  (["--config.optimizer.warmup=10000000000"], "is 1e+10 steps; a run has at most 2147483647"),
  (["--config.evaluate.pictures=4"], "pictures are 16 by 16"),
  (["--config.evaluate.pictures=0", "--config.evaluate.metrics_every=2"],
   "evaluate.metrics_every is set, and there is nothing to measure"),
  (["--config.evaluate.pictures=1"], "pictures=1: judge 2 or more"),
  (["--config.players.painter.learning_rate=1"], "unknown player of toy 'painter'"),
  (["--config.sharding.rules=(('.*', 'fsdpp'),)"], "unknown sharding rule 'fsdpp'"),
  (["--config.sample.options.mode=odd"], "mode=odd cannot be drawn"),
  (["--config.data.options.levels=three"], "unknown level of scenes 'three'"),
  (["--config.text.vocab_size=10"], "text.vocab_size=10 is too small; use at least 259"),
  (["--config.precision.compute=float16"], "unknown precision.compute 'float16'"),
  (["--config.components.first_stage=nowhere"], "no export at 'nowhere'"),
  (["--config.init_from=nowhere"], "no export at 'nowhere'"),
  (["--config.resume=nowhere"], "no tokenizer at nowhere/tokenizer.json"),
  (["--config.evaluate.splits=held_out"], "unknown split of data set 'scenes' 'held_out'"),
])
def test_runs_that_cannot_begin(flags, message, fails, tmp_path):
  assert message in starts(fails, tmp_path / "run", *flags)


def test_a_command_that_failed_can_be_given_again_with_the_right_value(fails, tmp_path):
  starts(fails, tmp_path, "--config.train.accumulate=3")
  main.main([TOY_CONFIG, f"--workdir={tmp_path}", "--config.train.duration=1",
             "--config.sample.every=0", "--config.evaluate.every=0"])
  assert saved_steps(tmp_path) == [1]


def test_pictures_that_cannot_be_trained_on(fails, tmp_path):
  config = f"{TOY_CONFIG},dataset=folder"

  def error(path):
    return starts(fails, tmp_path / "run", f"--config.data.options.path={path}", config=config)

  assert "needs --config.data.options.path" in error("")
  assert "No such file or directory" in error(tmp_path / "nowhere")
  assert "is empty: put pictures and captions" in error(folder_of(tmp_path / "empty", None))
  assert "has no captions.jsonl" in error(folder_of(tmp_path / "bare", None, ["a.png"]))
  rows = [{"file": "a.png", "caption": "a"}, {"file": "b.png", "caption": "b"}]
  message = error(folder_of(tmp_path / "missing", rows))
  assert "none of the 2 pictures in" in message and "exists: a.png, b.png" in message
  rows = [{"fil": "a.png", "caption": "a"}]
  message = error(folder_of(tmp_path / "misspelt", rows, ["a.png"]))
  assert "captions.jsonl, line 1: unknown column 'fil'; did you mean 'file'?" in message


def test_a_small_folder_without_a_test_split_trains(tmp_path, capfd):
  rows = [{"file": name, "caption": f"picture {name}"} for name in ("a.png", "b.png", "gone.png")]
  folder = folder_of(tmp_path / "pictures", rows, ["a.png", "b.png"])
  main.main([f"{TOY_CONFIG},dataset=folder", f"--workdir={tmp_path / 'run'}",
             f"--config.data.options.path={folder}", "--config.train.duration=1",
             "--config.evaluate.every=0"])
  err = capfd.readouterr().err
  assert "warning: samples are of the training split: no pictures in split 'test'" in err
  assert (tmp_path / "run" / "skipped_train.txt").read_text() == "gone.png\tno such file\n"
  assert (tmp_path / "run" / "samples" / "step_00000001.png").exists()


def test_a_font_that_is_missing_or_none(fails, tmp_path, monkeypatch):
  config = f"{TOY_CONFIG},dataset=emoji"
  (tmp_path / "font.ttf").write_text("not a font")
  data = f"--config.data.options.data_dir={tmp_path}"
  for font, message in (("nowhere.ttf", "cannot read the font 'nowhere.ttf': No such file"),
                        (tmp_path / "font.ttf", "is not a font")):
    flags = [data, f"--config.data.options.font={font}"]
    assert message in starts(fails, tmp_path / "run", *flags, config=config)
  monkeypatch.setenv("PATH", "")
  monkeypatch.setattr("glob.glob", lambda *args, **kwargs: [])
  message = starts(fails, tmp_path / "run", data, config=config)
  assert "the font Noto Color Emoji is not on this machine: install the Debian package" in message
