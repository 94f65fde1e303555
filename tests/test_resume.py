"""A run that is stopped, killed or preempted goes on as if it had not been."""

import os
import signal

import numpy as np
import pytest
from runs import (
  ROOT,
  TOY,
  assert_same_bits,
  command,
  config_of,
  finish,
  metrics,
  saved_meta,
  saved_steps,
  train_on,
)

from t2i_jax import hooks
from t2i_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_programs")

# One shape of step each: two players of which one rests, with statistics; and one player.
QUICKSTART = ROOT / "configs" / "quickstart.py"
CASES = [pytest.param(TOY, id="toy")] + [
  pytest.param(path, id=path.stem,
               marks=pytest.mark.slow if path == QUICKSTART else pytest.mark.full)
  for path in sorted(ROOT.glob("configs/*.py"))
]


@pytest.mark.parametrize("path", CASES)
def test_half_a_run_and_the_other_half_equal_a_whole_one(path, tmp_path, at_step):
  hooks = 0 if path.stem == "quickstart" else 3  # to draw is another large program
  settings = dict(train__duration=6, log__every=4, checkpoint__every=2, sample__every=hooks,
                  evaluate__every=hooks, evaluate__batches=1, evaluate__pictures=0)
  if path.stem == "quickstart":  # its three levels under Muon take long to compile
    settings |= dict(model__multipliers="(1,)", model__attention_levels="(0,)",
                     optimizer__name="adamw")
  config = config_of(path, **settings)
  whole = train_on(config, tmp_path / "whole")

  at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM))
  train_on(config, tmp_path / "halves")
  assert saved_steps(tmp_path / "halves") == [2, 3]
  assert not (tmp_path / "halves" / "export").exists()
  at_step(None, None)
  # What a run may change when it is resumed changes nothing.
  config = config_of(path, **settings, checkpoint__keep_last=3, data__prefetch=3)
  halves = train_on(config, tmp_path / "halves")

  assert_same_bits(whole, halves)
  assert whole.step == 6 and {k: int(v) for k, v in whole.updates.items()}
  assert metrics(tmp_path / "whole") == metrics(tmp_path / "halves")
  assert [line["step"] for line in metrics(tmp_path / "whole")][-1] == 6
  meta = [saved_meta(tmp_path / name, 6) for name in ("whole", "halves")]
  assert meta[0] == meta[1]
  assert meta[0]["data"] == {"position": 6 * config.train.batch_size}
  for file in ("export/variables.safetensors", "export/tokenizer.json",
               "samples/step_00000003.png", "samples/step_00000006.png"):
    one, other = (tmp_path / name / file for name in ("whole", "halves"))
    assert one.exists() == other.exists()
    assert not one.exists() or one.read_bytes() == other.read_bytes(), file


# Trains as the command does, and sends itself a signal while a step is under way, or when a save
# has begun.
STRIKE = """
import os, signal, sys
from t2i_jax import main, restore

number, where, at = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
save, Progress = restore.Run.save, main.Progress

def struck_save(self, step, state, meta):
  save(self, step, state, meta)
  if where == "save" and step == at:
    os.kill(os.getpid(), number)

class Struck(Progress):
  def update(self, done, loss=None):
    super().update(done, loss)
    if where == "step" and done == at:
      os.kill(os.getpid(), number)

restore.Run.save, main.Progress = struck_save, Struck
main.main(sys.argv[4:])
"""


def test_killed_in_a_save_then_in_a_step_then_asked_to_stop(tmp_path):
  """Each process finds the last good checkpoint; the last one ends where a whole run does."""

  def start(workdir, number=0, where="never", at=0):
    return command("main", int(number), where, at, f"--config={TOY}:size=tiny",
                   f"--workdir={workdir}", "--config.train.duration=12", "--config.log.every=5",
                   "--config.sample.every=0", "--config.evaluate.every=0", code=STRIKE)

  run = tmp_path / "run"
  finish(start(run, signal.SIGKILL, "save", 4), -signal.SIGKILL)
  first = saved_steps(run)[-1]
  assert first in (2, 4)  # 4 if the save was quicker than the signal

  finish(start(run, signal.SIGKILL, "step", 7), -signal.SIGKILL)
  second = saved_steps(run)[-1]
  assert second in (4, 6)  # 6 is whole if its save was done by the end of step 7

  errors = finish(start(run, signal.SIGTERM, "step", 8))
  assert f"resuming at step {second}, 12 steps" in errors
  assert "stopped as asked; step 9 is saved, and the same command goes on from there" in errors
  assert saved_steps(run)[-1] == 9

  errors = finish(start(run))
  assert "resuming at step 9, 12 steps" in errors and "trained to step 12/12" in errors
  whole = tmp_path / "whole"
  finish(start(whole))
  assert metrics(run) == metrics(whole)
  assert [line["step"] for line in metrics(run)] == [5, 10, 12]
  assert saved_meta(run, 12) == saved_meta(whole, 12)
  variables = [(folder / "export" / "variables.safetensors").read_bytes()
               for folder in (run, whole)]
  assert variables[0] == variables[1]


class Gone(BaseException):
  """The machine is taken away."""


def test_a_run_that_ends_in_a_hook_loses_no_step_and_repeats_no_hook(tmp_path, monkeypatch):
  config = config_of(TOY, train__duration=4, log__every=2, checkpoint__every=2, sample__every=2,
                     evaluate__every=2, evaluate__batches=1, evaluate__pictures=0)
  whole = train_on(config, tmp_path / "whole")
  measure, calls = hooks.HeldOutLoss.__call__, []

  def struck(self, step, state):
    calls.append((self.name, step))
    measure(self, step, state)
    if len(calls) == 2:
      raise Gone  # what it wrote is there, and that it is done was not noted

  monkeypatch.setattr(hooks.HeldOutLoss, "__call__", struck)
  with pytest.raises(Gone):
    train_on(config, tmp_path / "parts")
  assert saved_steps(tmp_path / "parts") == [2] and calls[0][0] != calls[1][0]
  assert not (tmp_path / "parts" / "samples").exists()
  parts = train_on(config, tmp_path / "parts")
  assert [call for call in calls if call[1] == 2] == [calls[0], calls[1], calls[1]]
  assert_same_bits(parts, whole)
  assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
  for name in ("step_00000002.png", "step_00000004.png"):
    one, other = (tmp_path / run / "samples" / name for run in ("whole", "parts"))
    assert one.read_bytes() == other.read_bytes()
  lines, count = metrics(tmp_path / "parts"), len(calls)
  train_on(config, tmp_path / "parts")  # all is done
  assert metrics(tmp_path / "parts") == lines and len(calls) == count


def test_a_finished_run_that_is_started_again_changes_nothing(tmp_path):
  config = config_of(TOY, train__duration=3, evaluate__every=3)
  state = train_on(config, tmp_path)
  lines = metrics(tmp_path)
  again = train_on(config, tmp_path)
  assert_same_bits(state, again)
  assert metrics(tmp_path) == lines
  longer = train_on(config_of(TOY, train__duration=4, evaluate__every=3), tmp_path)
  assert longer.step == 4


def test_a_step_that_is_not_finite_leaves_the_checkpoint_before_it(tmp_path):
  config = config_of(TOY, train__duration=6, optimizer__learning_rate=1e30, checkpoint__every=1)
  with pytest.raises(UserError, match=r"step \d is not finite .*/loss="):
    train_on(config, tmp_path)
  (step, *more) = saved_steps(tmp_path)[-1:]
  assert step < 6 and not more
  assert not (tmp_path / "export").exists()


def test_resume_takes_over_another_run_and_init_from_its_parameters(tmp_path):
  config = config_of(TOY, train__duration=2, sample__every=0, evaluate__every=0)
  first = train_on(config, tmp_path / "first")
  tokenizer = (tmp_path / "first" / "tokenizer.json").read_text()

  settings = dict(sample__every=0, evaluate__every=0, data__options__levels="two")
  config = config_of(TOY, train__duration=3, resume=tmp_path / "first", **settings)
  resumed = train_on(config, tmp_path / "resumed")
  assert resumed.step == 3 and resumed.updates["drawer"] == 3
  # The ids that the model has learnt stay, whatever the new captions are.
  assert (tmp_path / "resumed" / "tokenizer.json").read_text() == tokenizer

  export = tmp_path / "first" / "export"
  config = config_of(TOY, train__duration=1, init_from=export, optimizer__learning_rate=0.0,
                     **settings)
  tuned = train_on(config, tmp_path / "tuned")
  assert tuned.step == 1
  for group in ("drawer", "text_encoder"):  # the averages, which are what an export holds
    assert_same_bits(tuned.params[group], first.ema[group])
    assert_same_bits(tuned.ema[group], first.ema[group])
  # The critic is not in the export: it starts afresh, and so do the optimizers.
  assert not np.array_equal(tuned.params["critic"]["net"]["hidden"]["kernel"],
                            first.params["critic"]["net"]["hidden"]["kernel"])
  assert (tmp_path / "tuned" / "tokenizer.json").read_text() == tokenizer
