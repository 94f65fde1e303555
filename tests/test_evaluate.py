"""The command that measures: names, shards that resume, sweeps, the page, and one line for errors."""

import json
import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import TOY, config_of

from t2i_jax import assembly, data, evaluate, export
from t2i_jax.evaluation import drawing, folder, plots, scoring
from t2i_jax.systems import base

pytestmark = pytest.mark.usefixtures("compiled_programs")

SPLIT = "held_out_pairs"


def write_export(path, config, batch_of=2):
  """An export with parameters of which nothing was trained."""
  system = assembly.build_system(config)
  source = assembly.open_data(config, SPLIT, assembly.resolution_of(system))
  tokenizers = assembly.make_tokenizer(config, source) if system.reads_text else None
  batch = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype),
                       assembly.abstract_batch(system, batch_of))
  variables = base.split(system.init(jax.random.key(0), batch), system.ema_groups)[0]
  tokenizers = tokenizers or assembly.Tokenizers({})
  return export.write(path, config, 7, jax.device_get(variables), tokenizers)


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


@pytest.fixture
def dark(monkeypatch):
  """In place of the scenes' verifier, which reads no pictures of 16 px: half of them are right."""

  def verify(images, captions):
    odd = np.array([len(caption) % 2 for caption in captions], bool)
    right = (images.mean(axis=(1, 2, 3)) > 127) == odd
    return dict.fromkeys(data.ATTRIBUTES, right)

  monkeypatch.setattr(data, "verifier", lambda name: verify)


@pytest.fixture
def fails(capfd):
  def call(*flags):
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
      evaluate.main([str(flag) for flag in flags])
    err = capfd.readouterr().err
    assert exit.value.code == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: ") and len(last) < 700, last
    return last.removeprefix("error: ")

  return call


def run(toy, *flags, pictures=20, batch=8):
  evaluate.main([f"--export={toy}", f"--split={SPLIT}", f"--pictures={pictures}",
                 f"--batch-size={batch}", *map(str, flags)])


def results(path):
  """`scores.json` without what depends on the clock."""
  rows = json.loads((path / "scores.json").read_text())["results"]
  return [{k: v for k, v in row.items() if k not in ("seconds_a_picture", "warm")} for row in rows]


def test_metrics_by_name_say_what_they_depend_on(toy, network, dark, tmp_path, capfd):
  run(toy, network, "--metric=verifier", "--metric=fd_feature_net", "--metric=loss",
      f"--output={tmp_path / 'out'}")
  (row,) = results(tmp_path / "out")
  assert list(row["results"]) == ["loss/error", "verifier", "fd_scenes"]
  assert row["export"]["step"] == 7 and row["export"]["ema"] and row["seed"] == 0
  assert row["export"]["hash"] == export.fingerprint(toy)
  assert row["options"] == {"temperature": 1.0, "mode": "plain"} and row["batch_size"] == 8
  distance = row["results"]["fd_scenes"]
  assert distance["n"] == 20 and distance["about"]["reference_pictures"] == 20
  assert distance["about"]["reference"] == f"scenes, split {SPLIT}, 20 pictures"
  assert {"network", "digest", "preprocessing", "reference_digest"} <= set(distance["about"])
  right = row["results"]["verifier"]["about"]["right"]
  assert set(right) == set(data.ATTRIBUTES) and 0 < right["all"] < 1
  out = capfd.readouterr().out
  assert "step 7, moving average, 16 px, hash " + row["export"]["hash"][:12] in out
  assert distance["line"] in out and "temperature=1.0" in out
  with np.load(tmp_path / "out" / row["drawn"] / "pictures_00002.npz") as last:
    assert last["images"].shape == (4, 16, 16, 3)


def test_pictures_do_not_depend_on_the_batch_size(toy, dark, tmp_path):
  def drawn(path, batch):
    run(toy, "--metric=verifier", f"--output={path}", batch=batch)
    (row,) = results(path)
    shards = folder.Shards(path / row["drawn"], row["batch_size"], row["pictures"])
    return np.concatenate(list(shards.pictures()))

  one, other = drawn(tmp_path / "one", 8), drawn(tmp_path / "other", 16)
  assert np.abs(one.astype(int) - other).max() <= 1 and (one == other).mean() > 0.99


class Killed(BaseException):
  """In place of a signal that cannot be caught."""


def test_an_interrupted_command_ends_with_the_same_numbers(
  toy, network, dark, tmp_path, monkeypatch, fails
):
  flags = (network, "--metric=verifier", "--metric=fd_feature_net", "--sweep=temperature=0.5,1")
  run(toy, *flags, f"--output={tmp_path / 'whole'}")
  parts = tmp_path / "parts"
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
  assert results(parts) == results(tmp_path / "whole")
  for path in parts.glob("drawn/*/*/pictures_*.npz"):
    with np.load(path) as ours, np.load(tmp_path / "whole" / path.relative_to(parts)) as theirs:
      assert ours["images"].tobytes() == theirs["images"].tobytes()

  # Another metric is of the same pictures; other pictures are refused.
  run(toy, network, "--metric=kd_feature_net", "--sweep=temperature=0.5,1", f"--output={parts}")
  assert "kd_scenes" in results(parts)[0]["results"]
  common = [f"--export={toy}", f"--split={SPLIT}", "--batch-size=8", f"--output={parts}",
            "--metric=verifier", "--sweep=temperature=0.5,1"]
  message = fails(*common, "--pictures=20", "--seed=3")
  assert message == (f"--output={parts} holds another evaluation: its seed is 0, this one's is 3; "
                     "choose another --output")
  message = fails(*common, "--pictures=24")
  assert f"its prompts.{SPLIT}.pictures is 20, this one's is 24" in message
  message = fails(*common[:-1], "--pictures=20", "--option=temperature=2")
  assert "its points." in message


def test_a_sweep_has_a_table_plots_and_a_page(toy, network, dark, tmp_path, capfd):
  out = tmp_path / "out"
  # Two options that a real system has, and of which one point is refused.
  run(toy, network, "--metric=verifier", "--metric=fd_feature_net", "--metric=feature_net_diversity",
      "--each=2", "--sweep=temperature=0.5,1,2", "--sweep=mode=plain,odd", f"--output={out}")
  rows = results(out)
  assert [row["swept"] for row in rows] == [
    {"temperature": t, "mode": "plain"} for t in (0.5, 1.0, 2.0)
  ]
  assert rows[0]["each"] == 2 and rows[0]["captions"] <= 10
  printed = capfd.readouterr()
  assert "mode=odd left out: mode=odd cannot be drawn" in printed.err
  assert "temperature=0.5 mode=plain" in printed.out and "parameters" in printed.out
  page = (out / "report.html").read_text()
  assert "<script" not in page and not re.search(r'(src|href)="(?!data:)', page)
  assert page.count("data:image/png") == 3 * 2 * 10
  if plots.available():
    names = {path.stem for path in (out / "plots").glob("*.svg")}
    assert f"{SPLIT}_fd_scenes_along_temperature" in names
    assert f"{SPLIT}_verifier_against_fd_scenes_along_temperature" in names
    assert page.count("data:image/svg+xml") == len(names)
  assert Image.open(out / "pictures" / f"{SPLIT}.png").width > 300


def test_exports_side_by_side(toy, dark, tmp_path, fails):
  flags = ["--metric=verifier", f"--split={SPLIT}", "--pictures=8", "--batch-size=8"]
  message = fails(f"--export={toy}", f"--export={toy}", *flags)
  assert "two exports are called" in message and "--export=NAME=DIR" in message
  evaluate.main([f"--export=one={toy}", f"--export=two={toy}", *flags,
                 f"--output={tmp_path / 'out'}"])
  one, two = results(tmp_path / "out")
  assert one["point"] == "one" and two["point"] == "two" and one["results"] == two["results"]
  assert one["export"]["parameters"] == two["export"]["parameters"] > 1000


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
  from t2i_jax.metrics.reference import Reference

  other = Reference(meta["n"], arrays["mu"], arrays["sigma"], None, meta["about"])
  other.save(tmp_path / "other.npz")
  flags = [f"--export={toy}", network, f"--split={SPLIT}", "--pictures=8"]
  message = fails(*flags, "--metric=fd_feature_net", f"--reference={tmp_path / 'other.npz'}")
  assert "the reference has resolution [32, 32] and the pictures have [16, 16]" in message
  message = fails(*flags, "--metric=kd_feature_net", f"--reference={file}")
  assert "needs every reference picture's features" in message
  message = fails(*flags, "--metric=fd_feature_net", "--reference=heldout")
  assert "unknown split 'heldout'; did you mean" in message


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
])
def test_what_can_be_wrong_is_one_line(toy, fails, flags, message, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert message in fails(f"--export={toy}", *flags)
  assert not list(tmp_path.iterdir())


def test_a_foreign_folder_and_an_export_that_cannot_draw(toy, network, fails, tmp_path):
  (tmp_path / "letter.txt").write_text("dear")
  flags = [f"--export={toy}", "--metric=loss", f"--split={SPLIT}", "--pictures=8"]
  message = fails(*flags, f"--output={tmp_path}")
  assert message == (f"--output={tmp_path} is there, holds letter.txt, and is no evaluation's; "
                     "choose another folder")
  assert "is a file; name a folder" in fails(*flags, f"--output={tmp_path / 'letter.txt'}")
  path = network.rpartition("=")[2]
  message = fails(f"--export={path}", "--metric=loss")
  assert "needs a system with Sampler; FeatureNet has none" in message
  message = fails(*flags[:1], network, "--metric=kd_feature_net", f"--split={SPLIT}",
                  "--pictures=2", "--each=2", "--batch-size=8")
  assert "pictures" in message


def test_categories_are_averaged():
  from t2i_jax.evaluation.prompt_sets import PromptSet
  from t2i_jax.prompts import Prompt

  prompts = tuple(
    Prompt(f"prompt {i}", {"Category": "Arts" if i < 4 else "Food", "Note": f"{i}"})
    for i in range(12)
  )
  found = scoring.by_category(PromptSet("parti", prompts, 2), {"clip_score": np.arange(24.0)})
  assert found == {"Category": {"Arts": {"n": 8, "clip_score": 3.5},
                                "Food": {"n": 16, "clip_score": 15.5}}}
