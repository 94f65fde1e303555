import io
import json
import sys

import numpy as np
import pytest

from t2i_jax.errors import UserError
from t2i_jax.training.writers import JsonLines, Progress, Writers


def lines(path):
  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_are_one_line_of_valid_json_a_write(tmp_path, capsys):
  writers = Writers(tmp_path / "run", primary=True)
  writers.scalars(10, {"loss": np.float32(0.5), "images": 64})
  writers.scalars(20, {"loss": float("nan"), "norm": np.inf})
  writers.text(20, "note", 'a "red" square\nand 方块')
  writers.images(20, "samples", np.zeros((2, 8, 8, 3), np.uint8))
  written = lines(tmp_path / "run" / "metrics.jsonl")  # before close: each line is flushed
  writers.close()
  times = [line.pop("time") for line in written]
  assert written == [
    {"step": 10, "loss": 0.5, "images": 64},
    {"step": 20, "loss": None, "norm": None},
    {"step": 20, "note": 'a "red" square\nand 方块'},
  ]
  assert times == sorted(times) and times[0] > 1e9
  assert "step 10: loss 0.5, images 64" in capsys.readouterr().err


def test_restart_drops_later_steps_and_half_a_line(tmp_path):
  path = tmp_path / "metrics.jsonl"
  writer = JsonLines(path)
  for step in (10, 20, 30):
    writer.scalars(step, {"loss": 1.0})
  writer.close()
  with path.open("a") as file:
    file.write('{"step": 15, "lo')
  restarted = JsonLines(path)
  restarted.truncate_after(20)
  assert [line["step"] for line in lines(path)] == [10, 20]
  restarted.scalars(30, {"loss": 2.0})
  restarted.close()
  assert [(line["step"], line["loss"]) for line in lines(path)] == [(10, 1), (20, 1), (30, 2)]
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_what_an_unfinished_hook_wrote_of_the_last_step_is_forgotten(tmp_path):
  writers = Writers(tmp_path, primary=True)
  writers.truncate_after(0)
  writers.scalars(1, {"loss": 1.0})
  writers.scalars(2, {"loss": 2.0})
  writers.scalars(2, {"split/loss": 3.0})
  assert (writers.lines(2), writers.lines(3)) == (2, 0)
  writers.scalars(2, {"other/loss": 4.0})
  writers.scalars(3, {"loss": 5.0})
  writers.close()
  again = Writers(tmp_path, primary=True)
  again.truncate_after(2, 2)
  assert [(line["step"], line.get("loss")) for line in lines(tmp_path / "metrics.jsonl")] == [
    (1, 1), (2, 2), (2, None)
  ]
  again.scalars(2, {"other/loss": 4.0})
  assert again.lines(2) == 3
  again.close()


def test_truncating_before_anything_was_written(tmp_path):
  writers = Writers(tmp_path, primary=True)
  writers.truncate_after(0)
  writers.close()
  assert list(tmp_path.iterdir()) == []


def test_other_hosts_write_nothing(tmp_path, capsys):
  writers = Writers(tmp_path / "run", primary=False, tensorboard=True)
  writers.scalars(1, {"loss": 1.0})
  writers.truncate_after(0)
  writers.close()
  assert not (tmp_path / "run").exists() and capsys.readouterr().err == ""


def test_working_directory_that_cannot_be_written(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="cannot create .*file/run"):
    Writers(tmp_path / "file" / "run", primary=True)
  writer = JsonLines(tmp_path / "file" / "metrics.jsonl")
  with pytest.raises(UserError, match="cannot write metrics to .*metrics.jsonl"):
    writer.scalars(1, {"loss": 1.0})


def test_tensorboard_events(tmp_path):
  pytest.importorskip("tensorboardX")
  from tensorboardX.proto import event_pb2

  writers = Writers(tmp_path, primary=True, tensorboard=True)
  writers.truncate_after(5)
  writers.scalars(7, {"loss": 0.25})
  writers.images(7, "samples", np.full((2, 8, 8, 3), 255, np.uint8))
  writers.images(7, "grid", np.zeros((8, 16, 3), np.uint8))
  writers.text(7, "config", "seed = 0")
  writers.close()
  (path,) = (tmp_path / "tensorboard").iterdir()
  data, values, purged = path.read_bytes(), {}, False
  while data:  # records of: length (8 bytes), its checksum (4), the event, its checksum (4)
    length = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12:12 + length])
    data = data[16 + length:]
    purged |= event.step == 6 and event.session_log.status == event_pb2.SessionLog.START
    values.update({value.tag: (event.step, value) for value in event.summary.value})
  assert purged
  assert values["loss"][0] == 7 and values["loss"][1].simple_value == 0.25
  assert {"samples", "grid", "config/text_summary"} <= set(values)


def test_missing_tensorboard_is_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(UserError, match="pip install tensorboardX"):
    Writers(tmp_path, primary=True, tensorboard=True)
  Writers(tmp_path, primary=True).close()


def test_progress_without_a_terminal_is_a_line_every_interval():
  seconds = [0.0]
  stream = io.StringIO()
  progress = Progress(1000, 100, interval=30, stream=stream, clock=lambda: seconds[0])
  for step in range(101, 221):
    seconds[0] += 0.5
    progress.update(step, loss=0.125)
  progress.close()
  assert stream.getvalue().splitlines() == [
    "step 160/1000 (16.0%), 2 steps/s, 07:00 left, loss 0.125",
    "step 220/1000 (22.0%), 2 steps/s, 06:30 left, loss 0.125",
  ]


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_progress_on_a_terminal_is_a_bar():
  stream = Terminal()
  progress = Progress(10, 4, stream=stream)
  progress.update(9, loss=0.125)
  progress.update(10)
  progress.close()
  last = stream.getvalue().rstrip().split("\r")[-1]
  assert "10/10" in last and "loss 0.125" in last


def test_progress_of_another_host_is_silent():
  stream = Terminal()
  progress = Progress(10, 0, enabled=False, stream=stream)
  progress.update(10, loss=1.0)
  progress.close()
  assert stream.getvalue() == ""
