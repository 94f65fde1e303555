"""The command that measures: metrics by name, resuming, sweeps, the page, errors in one line."""

import functools
import html
import json
import os
import re
import signal
import socket
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from runs import TOY, command, config_of, finish, metrics, train_on, write_export

from t2i_jax import data, evaluate, export
from t2i_jax.errors import UserError
from t2i_jax.evaluation import drawing, folder, plots, scoring, tables
from t2i_jax.evaluation.prompt_sets import PromptSet
from t2i_jax.metrics.reference import Reference
from t2i_jax.metrics.result import Result
from t2i_jax.metrics.scores import Collected, Metric, Scores
from t2i_jax.prompts import Prompt

pytestmark = pytest.mark.usefixtures("compiled_programs")

SPLIT = "held_out_pairs"


@pytest.fixture(scope="module")
def toy(tmp_path_factory, compiled_programs):
  return str(write_export(tmp_path_factory.mktemp("toy") / "export", config_of(TOY)))


@pytest.fixture(scope="module")
def network(tmp_path_factory, compiled_programs):
  """A `--network` flag of an untrained classifier of pictures of 16 px."""
  path = write_export(
    tmp_path_factory.mktemp("net") / "export", config_of("configs/feature_net.py")
  )
  return f"--network=feature-net={path}"


@pytest.fixture(scope="module")
def dark():
  """In place of the scenes' verifier, which reads no pictures of 16 px: half of them are right."""

  def verify(images, captions):
    odd = np.array([len(caption) % 2 for caption in captions], bool)
    right = (images.mean(axis=(1, 2, 3)) > 127) == odd
    return dict.fromkeys(data.ATTRIBUTES, right)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(data, "verifier", lambda name: verify)
    yield


@pytest.fixture
def fails(fails):
  """`fails(flag...)`, of `evaluate`."""
  return functools.partial(fails, evaluate)


def run(toy, *flags, pictures=20, batch=8):
  evaluate.main([f"--export={toy}", f"--split={SPLIT}", f"--pictures={pictures}",
                 f"--batch-size={batch}", *map(str, flags)])


def results(path):
  """`scores.json` without what depends on the clock."""
  rows = json.loads((path / "scores.json").read_text())["results"]
  return [{k: v for k, v in row.items() if k not in ("seconds_a_picture", "warm")} for row in rows]


SWEEP = ("--metric=verifier", "--metric=fd_feature_net", "--sweep=temperature=0.5,1",
         "--sweep=mode=plain,odd")  # the system refuses "odd"


@pytest.fixture(scope="module")
def whole(toy, network, dark, tmp_path_factory):
  """The folder of an evaluation that nothing interrupted."""
  path = tmp_path_factory.mktemp("whole") / "out"
  run(toy, network, *SWEEP, f"--output={path}")
  return path


def test_results_say_what_they_depend_on(toy, whole):
  rows = results(whole)
  assert [row["swept"] for row in rows] == [
    {"temperature": t, "mode": "plain"} for t in (0.5, 1.0)
  ]
  row = rows[1]
  assert list(row["results"]) == ["verifier", "fd_scenes"]
  assert row["export"]["step"] == 7 and row["export"]["ema"] and row["seed"] == 0
  assert row["export"]["hash"] == export.fingerprint(toy)
  assert row["options"] == {"temperature": 1.0, "mode": "plain"} and row["batch_size"] == 8
  distance = row["results"]["fd_scenes"]
  assert distance["n"] == 20 and distance["about"]["reference_pictures"] == 20
  assert distance["about"]["reference"] == f"scenes, split {SPLIT}, 20 pictures"
  assert {"network", "digest", "preprocessing", "reference_digest"} <= set(distance["about"])
  assert (distance["better"], row["results"]["verifier"]["better"]) == ("lower", "higher")
  right = row["results"]["verifier"]["about"]["right"]
  assert set(right) == set(data.ATTRIBUTES) and 0 < right["all"] < 1
  with np.load(whole / row["drawn"] / "pictures_00002.npz") as last:
    assert last["images"].shape == (4, 16, 16, 3)


def test_the_page_needs_no_other_file(whole):
  page = (whole / "report.html").read_text()
  assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
  assert page.count("data:image/png") == 2 * 12
  for text in ("step 7, moving average, 16 px, hash", "seed 0", "toy0 temperature=0.5 mode=plain"):
    assert text in page
  assert results(whole)[0]["results"]["fd_scenes"]["line"] in html.unescape(page)
  if plots.available():
    names = {path.stem for path in (whole / "plots").glob("*.svg")}
    assert f"{SPLIT}_fd_scenes_along_temperature" in names
    assert page.count("data:image/svg+xml") == len(names)
  assert Image.open(whole / "pictures" / f"{SPLIT}.png").width > 250


def test_the_batch_size_and_other_points_change_no_picture(toy, dark, whole, tmp_path):
  run(toy, "--metric=verifier", f"--output={tmp_path / 'out'}", batch=16)
  (row,) = results(tmp_path / "out")

  def pictures(path, row):
    shards = folder.Shards(path / row["drawn"], row["batch_size"], row["pictures"])
    return np.concatenate(list(shards.pictures()))

  one, other = pictures(tmp_path / "out", row), pictures(whole, results(whole)[1])
  assert np.abs(one.astype(int) - other).max() <= 1 and (one == other).mean() > 0.99


class Killed(BaseException):
  """In place of a signal that cannot be caught."""


def test_an_interrupted_command_ends_with_the_same_numbers(
  toy, network, dark, whole, tmp_path, monkeypatch, fails
):
  flags, parts = (network, *SWEEP), tmp_path / "parts"
  write, count = folder.Shards.write, 0

  def dying(self, *arguments):
    nonlocal count
    count += 1
    if count == 5:  # the second shard of the second point
      raise Killed
    write(self, *arguments)

  monkeypatch.setattr(folder.Shards, "write", dying)
  with pytest.raises(Killed):
    run(toy, *flags, f"--output={parts}")
  assert not (parts / "scores.json").exists()
  count = 100
  # A machine that lost power may leave a file cut, and one that was being written beside.
  cut = sorted(parts.glob("drawn/*/*/pictures_00001.npz"))[0]
  before = {path: path.read_bytes() for path in parts.glob("drawn/*/*/pictures_*.npz")}
  cut.write_bytes(before[cut][:-30])
  (cut.parent / ".pictures_00002.npz.writing").write_bytes(b"half")
  # Asked to stop while it goes on, it keeps what it has.
  add = drawing.Progress.add

  def stopping(self, number):
    add(self, number)
    os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(drawing.Progress, "add", stopping)
    patch.setenv("T2I_EXIT_STOPPED", "75")
    with pytest.raises(SystemExit) as exit:
      run(toy, *flags, f"--output={parts}")
    assert exit.value.code == 75
  times = {path: path.stat().st_mtime_ns for path in before if path != cut}
  run(toy, *flags, f"--output={parts}")
  assert times == {path: path.stat().st_mtime_ns for path in times}, "drawn once"
  assert results(parts) == results(whole)
  for path in parts.glob("drawn/*/*/pictures_*.npz"):
    with np.load(path) as ours, np.load(whole / path.relative_to(parts)) as theirs:
      assert ours["images"].tobytes() == theirs["images"].tobytes()

  # Another metric is of the same pictures; other pictures are refused.
  run(toy, network, "--metric=kd_feature_net", *SWEEP[2:], f"--output={parts}")
  assert "kd_scenes" in results(parts)[0]["results"]
  common = [f"--export={toy}", f"--split={SPLIT}", "--batch-size=8", f"--output={parts}",
            "--metric=verifier", *SWEEP[2:]]
  message = fails(*common, "--pictures=20", "--seed=3")
  assert message == (f"--output={parts} holds another evaluation: its seed is 0, this one's is 3; "
                     "choose another --output")
  message = fails(*common, "--pictures=24")
  assert f"its prompts.{SPLIT}.pictures is 20, this one's is 24" in message
  message = fails(*common[:-1], "--pictures=20", "--option=temperature=2")
  assert "its points." in message


def test_exports_side_by_side(toy, network, dark, tmp_path, fails, capfd):
  flags = ["--metric=verifier", "--metric=feature_net_diversity", network, f"--split={SPLIT}",
           "--pictures=8", "--each=2", "--batch-size=8"]
  message = fails(f"--export={toy}", f"--export={toy}", *flags)
  assert "two exports are called" in message and "--export=NAME=DIR" in message
  capfd.readouterr()
  evaluate.main([f"--export=one={toy}", f"--export=two={toy}", *flags,
                 f"--output={tmp_path / 'out'}"])
  one, two = results(tmp_path / "out")
  assert one["point"] == "one" and two["point"] == "two" and one["results"] == two["results"]
  assert one["export"]["parameters"] == two["export"]["parameters"] > 1000
  assert one["each"] == 2 and one["captions"] == 4
  out = capfd.readouterr().out
  assert re.search(r"one +35,168 +\S+, compiling too +\S+% +0\.\d+", out), out
  assert (tmp_path / "out" / "report.html").read_text().count("data:image/png") == 2 * 2 * 4


def test_prompts_of_a_file_in_genevals_folders(toy, tmp_path, fails):
  rows = [{"tag": "single_object", "include": [{"class": "bench", "count": 1}],
           "prompt": f"a photo of a bench {i}"} for i in range(3)]
  file = tmp_path / "evaluation_metadata.jsonl"
  file.write_text("".join(json.dumps(row) + "\n" for row in rows))
  flags = [f"--export={toy}", f"--prompts={file}", "--each=2", "--batch-size=8"]
  evaluate.main([*flags, f"--geneval={tmp_path / 'geneval'}", f"--output={tmp_path / 'out'}"])
  assert sorted(p.name for p in (tmp_path / "geneval").iterdir()) == ["00000", "00001", "00002"]
  for i, row in enumerate(rows):
    inside = tmp_path / "geneval" / f"{i:05d}"
    assert json.loads((inside / "metadata.jsonl").read_text()) == row
    assert sorted(p.name for p in (inside / "samples").iterdir()) == ["0000.png", "0001.png"]
  with np.load(next((tmp_path / "out").glob("drawn/*/*/pictures_00000.npz"))) as drawn:
    sample = tmp_path / "geneval" / "00001" / "samples" / "0001.png"
    np.testing.assert_array_equal(np.asarray(Image.open(sample)), drawn["images"][3])
  message = "holds pictures of other prompts, or more of each, in 0000"
  assert message in fails(*flags[:2], "--each=1", f"--geneval={tmp_path / 'geneval'}")
  file.write_text(json.dumps(rows[0]) + "\n")
  assert message in fails(*flags, f"--geneval={tmp_path / 'geneval'}")
  file.write_text('{"prompt": "a bench"}\n')
  assert "row 1 of the prompts has no 'tag'" in fails(*flags, f"--geneval={tmp_path / 'geneval'}")
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "letter.txt").write_text("")
  message = fails(*flags, f"--geneval={tmp_path / 'mine'}")
  assert "is there and holds letter.txt; choose another folder" in message


def test_a_reference_is_measured_once_and_of_one_resolution(toy, network, tmp_path, fails, capfd):
  file = tmp_path / "stats" / "scenes.npz"
  run(toy, network, "--metric=fd_feature_net", "--reference-only", f"--save-reference={file}",
      "--reference-pictures=30")
  assert f"statistics of 30 real pictures in {file}" in capfd.readouterr().out
  run(toy, network, "--metric=fd_feature_net", f"--reference={file}", f"--output={tmp_path / 'a'}")
  (row,) = results(tmp_path / "a")
  assert row["results"]["fd_scenes"]["about"]["reference_pictures"] == 30
  with np.load(file) as stats:
    arrays = dict(stats)
  meta = json.loads(bytes(arrays.pop("meta")))
  meta["about"]["resolution"] = [32, 32]
  other = Reference(meta["n"], arrays["mu"], arrays["sigma"], None, meta["about"])
  other.save(tmp_path / "other.npz")
  flags = [f"--export={toy}", network, f"--split={SPLIT}", "--pictures=8"]
  message = fails(*flags, "--metric=fd_feature_net", f"--reference={tmp_path / 'other.npz'}")
  assert "the reference has resolution [32, 32] and the pictures have [16, 16]" in message
  message = fails(*flags, "--metric=kd_feature_net", f"--reference={file}")
  assert "needs every reference picture's features" in message
  assert "--metric=kd_feature_net --reference-only" in message
  message = fails(*flags, "--metric=fd_feature_net", "--reference=heldout")
  assert "unknown split of data set 'scenes' 'heldout'; did you mean" in message


def test_points_with_equal_results_are_all_named():
  """In the lines beneath the table."""
  result = {"line": "verifier 100.0%"}
  rows = [
    {"point": f"guidance={scale}", "export": {
      "name": "toy", "system": "ddpm", "step": 1, "ema": True, "resolution": 16, "hash": "ab",
      "path": "toy"}, "told": {"steps": 4}, "swept": ["guidance"], "each": 1, "pictures": 2,
     "captions": 2, "set": SPLIT, "seed": 0, "results": {"verifier": result}}
    for scale in (1, 2)
  ]  # fmt: skip
  assert tables.notes(rows)[-1] == "guidance=1, guidance=2: verifier 100.0%"
  assert tables.notes(rows[:1])[-1] == "verifier 100.0%"


def test_a_damaged_reference_is_measured_again(toy, network, tmp_path):
  flags = "--metric=fd_feature_net", f"--output={tmp_path / 'a'}"
  run(toy, network, *flags)
  (whole,) = results(tmp_path / "a")
  (kept,) = (tmp_path / "a" / "references").glob("*.npz")
  kept.write_bytes(kept.read_bytes()[:100])
  run(toy, network, *flags)
  (again,) = results(tmp_path / "a")
  assert again["results"] == whole["results"]
  assert Reference.load(kept).n == 20


@pytest.mark.parametrize("flags, message", [
  (["--metric=fidd"], "unknown metric 'fidd'; did you mean 'fid'?"),
  (["--metric=fid"], "fid needs the network inception, of which no file was given; give one, or "
   "take fd_feature_net with a feature_net export"),
  (["--metric=psnr"], "psnr compares a picture with what it was made of"),
  (["--metric=feature_net_diversity"], "draw several with --each=2 or more"),
  (["--metric=fid", "--network=inception=nowhere.pth"], "nowhere.pth"),
  (["--network=inceptoin=x", "--metric=loss"], "unknown kind of network 'inceptoin'"),
  (["--network=x"], "--network=x is not NAME=FILE"),
  (["--pictures=7", "--each=2"], "--pictures=7 does not divide by --each=2"),
  (["--sweep=temperatur=1,2"], "unknown sampling option of toy 'temperatur'; did you mean"),
  (["--sweep=temperature=1,x"], "sampling option temperature=x: expected float"),
  (["--sweep=temperature=1,1"], "has a value twice"),
  (["--sweep=temperature"], "--sweep=temperature is not NAME=V1,V2,..."),
  (["--sweep=ema=true,false"], "an export holds one set of parameters, and those of"),
  (["--option=mode=odd", "--metric=r_precision", "--prompts=x.txt"], "x.txt cannot be read"),
  (["--option=mode=odd", "--metric=loss"], "mode=odd cannot be drawn"),
  (["--reference-only"], "name a file with --save-reference=FILE.npz"),
  (["--save-reference=x.npz", "--metric=loss"], "none of the metrics compares with real pictures"),
  (["--geneval=x"], "--geneval needs GenEval's prompts"),
  (["--split=train", "--prompts=x"], "--prompts and --split are both given"),
  (["--prompts={prompts}"], "pictures of --prompts would neither be measured nor kept"),
])
def test_what_can_be_wrong_is_one_line(
  toy, fails, flags, message, tmp_path, monkeypatch, tmp_path_factory
):
  monkeypatch.chdir(tmp_path)
  prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
  prompts.write_text("a dog\n")
  flags = [flag.format(prompts=prompts) for flag in flags]
  assert message in fails(f"--export={toy}", *flags)
  assert not list(tmp_path.iterdir())


def test_a_foreign_folder_and_an_export_that_cannot_draw(toy, network, fails, tmp_path):
  (tmp_path / "letter.txt").write_text("dear")
  flags = [f"--export={toy}", "--metric=loss", f"--split={SPLIT}", "--pictures=8"]
  message = fails(*flags, f"--output={tmp_path}")
  assert message == (f"--output={tmp_path} is there, holds letter.txt, and is no evaluation's; "
                     "choose another folder")
  assert "is a file; name a folder" in fails(*flags, f"--output={tmp_path / 'letter.txt'}")
  path = network.removeprefix("--network=feature-net=")
  message = fails(f"--export={path}", "--metric=loss")
  assert "needs a system with Sampler; FeatureNet has none" in message
  message = fails(f"--export={toy}", network, f"--split={SPLIT}", "--pictures=3",
                  "--metric=precision_recall_feature_net")
  assert "pictures" in message and "needs" in message


def test_pictures_are_as_large_as_the_options_say():
  system = SimpleNamespace(resolution=16, batch_spec=dict)
  assert scoring.size_of({"height": 32, "width": 0}, system) == (32, 16)
  assert scoring.size_of({"temperature": 1.0}, system) == (16, 16)


def test_a_loss_that_is_no_number_is_a_text_in_the_scores():
  found = scoring.loss_results({"loss": float("nan")}, "val")
  assert json.loads(json.dumps(found, allow_nan=False))["loss/loss"]["value"] == "nan"


def test_categories_are_averaged():
  prompts = PromptSet("parti", tuple(
    Prompt(f"prompt {i}", {"Category": "Arts" if i < 4 else "Food", "Note": f"{i}"})
    for i in range(12)
  ), 2)  # fmt: skip
  cosines = Collected(lambda batch: batch.images[:, 0, 0, 0])

  def mean(seen):
    assert seen.captions == tuple(prompts.captions[i] for i in seen.index)
    return [Result("clip_score", float(seen.rows(cosines).mean()), seen.n, {})]

  scores = Scores([Metric("clip_score", {"cosines": cosines}, mean)], {})
  scores.update(np.broadcast_to(np.arange(24, dtype=np.uint8)[:, None, None, None], (24, 2, 2, 3)))
  found = scoring.by_category(prompts, scores, {"verifier": np.arange(24) % 2})
  assert found == {"Category": {
    "Arts": {"n": 8, "clip_score": 3.5, "verifier": 0.5},
    "Food": {"n": 16, "clip_score": 15.5, "verifier": 0.5},
  }}  # fmt: skip


def test_a_run_measures_its_pictures_and_resumes(toy, network, dark, tmp_path):
  settings = dict(
    sample__every=0, evaluate__every=0, optimizer__schedule="constant", evaluate__pictures=8,
    evaluate__metrics="fd_feature_net", evaluate__metrics_every=2, evaluate__splits=SPLIT,
  )
  settings["evaluate__networks__feature-net"] = network.removeprefix("--network=feature-net=")
  train_on(config_of(TOY, train__duration=3, **settings), tmp_path / "whole")
  for duration in (2, 3):
    train_on(config_of(TOY, train__duration=duration, **settings), tmp_path / "parts")
  lines = metrics(tmp_path / "whole")
  assert lines == metrics(tmp_path / "parts")
  measured = [line for line in lines if f"{SPLIT}/fd_scenes" in line]
  assert [line["step"] for line in measured] == [2, 3]
  assert all(0 <= line[f"{SPLIT}/right/all"] <= 1 for line in measured)
  scores = json.loads((tmp_path / "whole" / "scores" / "scores.json").read_text())[SPLIT]
  assert scores["results"]["fd_scenes"]["value"] == measured[-1][f"{SPLIT}/fd_scenes"]
  assert scores["right"]["all"] == measured[-1][f"{SPLIT}/right/all"]
  card = (tmp_path / "whole" / "export" / "README.md").read_text()
  assert scores["results"]["fd_scenes"]["line"] in card


def test_a_run_whose_pictures_cannot_be_measured_does_not_begin(dark, tmp_path):
  for settings, message in (
    ({"evaluate__metrics": "fidd", "evaluate__pictures": 8}, "unknown metric 'fidd'"),
    ({"evaluate__metrics": "fid", "evaluate__pictures": 8}, "fid needs the network inception"),
    ({"evaluate__metrics": "fid", "evaluate__pictures": 0}, "evaluate.pictures pictures"),
    ({"evaluate__metrics": "loss", "evaluate__pictures": 8}, "which evaluate.every measures"),
  ):
    with pytest.raises(UserError) as error:
      train_on(config_of(TOY, train__duration=1, **settings), tmp_path)
    assert message in str(error.value)
    assert not (tmp_path / "config.json").exists()


TOGETHER = """
import sys
import runs
from t2i_jax import evaluate

runs.config_of(runs.TOY)  # makes the system known
evaluate.main(sys.argv[1:])
"""


@pytest.mark.full
def test_two_processes_draw_together(toy, network, tmp_path):
  def flags(name):
    return [f"--export={toy}", network, "--metric=fd_feature_net", f"--split={SPLIT}",
            "--pictures=20", "--batch-size=8", f"--output={tmp_path / name}"]

  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  processes = [
    command("", *flags("two"), code=TOGETHER, devices=2, T2I_COORDINATOR=address,
            T2I_NUM_PROCESSES="2", T2I_PROCESS_ID=str(index))
    for index in range(2)
  ]
  for process in processes:
    finish(process)
  finish(command("", *flags("one"), code=TOGETHER, devices=4))
  (two,), (one,) = results(tmp_path / "two"), results(tmp_path / "one")
  assert two["results"]["fd_scenes"]["value"] == pytest.approx(
    one["results"]["fd_scenes"]["value"], rel=1e-3
  )
  assert {k: v for k, v in two.items() if k != "results"} == {
    k: v for k, v in one.items() if k != "results"
  }
