"""Training on latents that were stored before is training through the first stage, without it."""

import json
import shutil
import socket

import encoder
import jax
import numpy as np
import pytest
import two_stage
from PIL import Image
from runs import TOY, assert_same_bits, command, config_of, finish, metrics, train_on
from test_precompute import HOST

import t2i_jax
from t2i_jax import config_files, data, export, precompute, precompute_latents, precompute_text
from t2i_jax.data.latent_cache import LatentCache, Writer
from t2i_jax.errors import UserError
from t2i_jax.precompute_latents import write_latents
from t2i_jax.systems.pictures import normalize_images

pytestmark = pytest.mark.usefixtures("compiled_programs")
CONFIG = two_stage.__file__


def config(first, duration=4, dataset="scenes", **settings):
  given = dict(train__duration=duration, components__first_stage=first, sample__every=0)
  flat = {key.replace("__", "."): str(value) for key, value in (given | settings).items()}
  return config_files.load_config(f"{CONFIG}:size=tiny,dataset={dataset}", flat)


def on_folder(first, path, duration=4, **settings):
  return config(first, duration, "folder", data__options__path=path, **settings)


def write_folder(path, count=40, broken=(3, 17)):
  """Pictures that differ, two of which cannot be read; the last eight are for testing."""
  path.mkdir(parents=True)
  lines, random = [], np.random.default_rng(0)
  for n in range(count):
    Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8)).save(path / f"{n}.png")
    if n in broken:
      (path / f"{n}.png").write_bytes(b"broken")
    captions = [f"picture {n}", f"the {n}th picture"]
    split = "test" if n >= count - 8 else "train"
    lines.append(json.dumps({"file": f"{n}.png", "split": split, "captions": captions}))
  (path / "captions.jsonl").write_text("\n".join(lines))
  return path


@pytest.fixture(scope="module")
def first(tmp_path_factory):
  return two_stage.make(tmp_path_factory.mktemp("first") / "export")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def cache(first, photos, tmp_path_factory):
  """Of all splits of the folder, in float32."""
  path = tmp_path_factory.mktemp("cache") / "cache"
  write_latents(on_folder(first, photos), str(path), dtype="float32", shard_size=5, batch_size=3)
  return path


@pytest.fixture
def no_decoding(monkeypatch):
  """From now on a picture that is decoded is an error."""
  return lambda: monkeypatch.setattr("t2i_jax.data.sets.pictures.decode", lambda *given: 1 / 0)


def test_what_is_stored_is_what_the_first_stage_says(first, photos, cache):
  read = LatentCache(cache, "train")
  assert list(read.rows) == [n for n in range(32) if n not in (3, 17)]
  source = data.open_source("folder", "train", 16, 0, {"path": str(photos)})
  system = two_stage.Shrinker(None)
  variables = export.read(first).variables
  for row in (0, 4, 31):
    expected = system.encode(variables, normalize_images(source.image(row)[None]))
    np.testing.assert_allclose(read.lookup(np.array([row])), expected, atol=1e-6)
  assert LatentCache(cache, "test").rows.tolist() == list(range(8))


def assert_near(one, other):
  """States of two programs: what 1e-2, the learning rate, moves by another draw is much more."""
  for name in ("params", "ema"):
    theirs = jax.tree.leaves(getattr(other, name))
    ours = jax.tree_util.tree_leaves_with_path(getattr(one, name))
    for (path, leaf), there in zip(ours, theirs, strict=True):
      # A key's bias moves all of a query's logits alike, which the softmax does not see: its
      # gradient is rounding, and Adam's steps make much of that.
      if "['key']['bias']" not in jax.tree_util.keystr(path):
        np.testing.assert_allclose(leaf, there, rtol=1e-5, atol=1e-4, err_msg=str(path))


def test_the_same_run_without_the_first_stage(first, photos, cache, tmp_path, no_decoding):
  """To rounding, with evaluation and samples on the way, and not one picture decoded."""
  settings = dict(sample__every=3, evaluate__every=2, evaluate__batches=1)
  there = train_on(on_folder(first, photos, **settings), tmp_path / "there")
  no_decoding()
  here = train_on(on_folder(first, photos, data__latents=cache, **settings), tmp_path / "here")
  assert here.frozen == {} and there.frozen != {}
  assert_near(here, there)
  lines = [metrics(tmp_path / name) for name in ("here", "there")]
  assert lines[0] == [pytest.approx(line, rel=1e-6) for line in lines[1]]
  assert any("test/error" in line for line in lines[0])
  one, other = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("here", "there"))
  assert one == other
  # The export holds the first stage, and needs no cache.
  draw = lambda name: t2i_jax.load(tmp_path / name / "export")(["picture 1"], seed=1)  # noqa: E731
  grid = lambda name: np.asarray(  # noqa: E731
    Image.open(tmp_path / name / "samples" / "step_00000003.png"))
  for picture in (draw, grid):
    np.testing.assert_allclose(picture("here").astype(int), picture("there"), atol=1)


def test_a_run_is_stopped_goes_on_and_changes_over(first, photos, cache, tmp_path):
  """The export of the first stage is gone by then; the run has its own copy."""
  path = shutil.copytree(first, tmp_path / "first")
  whole = train_on(on_folder(path, photos, data__latents=cache), tmp_path / "whole")
  for begun, name in (dict(data__latents=cache), "stopped"), ({}, "changed"):
    path = shutil.copytree(first, tmp_path / "first", dirs_exist_ok=True)
    train_on(on_folder(path, photos, 2, **begun), tmp_path / name)
    shutil.rmtree(path)
    state = train_on(on_folder(path, photos, data__latents=cache), tmp_path / name)
    (assert_same_bits if name == "stopped" else assert_near)(state, whole)
    export.main([f"--workdir={tmp_path / name}", f"--output={tmp_path / name / 'again'}"])
    t2i_jax.load(tmp_path / name / "again")(["picture 1"])


def test_half_precision_is_near_and_its_statistics_reach_the_system(
  first, photos, cache, tmp_path, monkeypatch
):
  write_latents(on_folder(first, photos), str(tmp_path / "half"))
  assert LatentCache(tmp_path / "half", "train").dtype == np.float16
  seen = []
  loss = two_stage.Latents.loss

  def recorded(self, variables, batch, rng, step):
    seen.append((self.latent_statistics, self.cached_latent.dtype, batch["latent"].dtype))
    return loss(self, variables, batch, rng, step)

  monkeypatch.setattr(two_stage.Latents, "loss", recorded)
  runs = {name: tmp_path / f"run_{name}" for name in ("half", "whole")}
  train_on(on_folder(first, photos, data__latents=tmp_path / "half"), runs["half"])
  statistics, *dtypes = seen[-1]
  assert dtypes == ["float16", np.float16]
  # Twice a uniform number in [-1, 1], and a variance of exp(-2).
  assert statistics == pytest.approx((0.0, np.sqrt(4 / 3 + np.exp(-2))), abs=0.06)
  train_on(on_folder(first, photos, data__latents=cache), runs["whole"])
  for line, other in zip(metrics(runs["half"]), metrics(runs["whole"]), strict=True):
    assert line["drawer/loss"] == pytest.approx(other["drawer/loss"], rel=0.01)


def test_text_and_latents_are_cached_together(first, photos, cache, tmp_path, no_decoding):
  text = encoder.make(tmp_path / "encoder", 1.0)
  given = dict(components__text_encoder=text, text__encoder="component", sample__every=3,
               evaluate__every=3, evaluate__batches=1)  # fmt: skip
  precompute_text.write_features(on_folder(first, photos, **given), str(tmp_path / "text"),
                                 dtype="float32")  # fmt: skip
  there = train_on(on_folder(first, photos, **given), tmp_path / "there")
  given |= dict(text__cache=tmp_path / "text", data__latents=cache)
  no_decoding()
  here = train_on(on_folder(first, photos, **given), tmp_path / "here")
  assert here.frozen == {} and set(there.frozen["params"]) == {"text_encoder", "first_stage"}
  assert_same_bits(here.replace(frozen={}), there.replace(frozen={}))
  for name in ("samples/step_00000003.png", "export/variables.safetensors"):
    assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


def test_the_first_rows_of_an_endless_data_set(first, tmp_path, capfd):
  path = tmp_path / "cache"
  write_latents(config(first), str(path), ("train",), "float32", 30, rows=64)
  monkey = config(first, "2 epochs", data__latents=path, seed=5)  # and of another seed
  state = train_on(monkey, tmp_path / "run")
  assert state.step == 8  # of 16 in a batch
  said = capfd.readouterr().err
  assert f"latents in {path}: an epoch is its 64 pictures, the first of an endless data set" in said
  read = LatentCache(path, "train")
  assert read.data["rows"] == 64 and read.data["seed"] == 0


def test_mirrored_pictures_are_a_second_variant(first, photos, tmp_path):
  write_latents(on_folder(first, photos), str(tmp_path / "cache"), dtype="float32", flips=True)
  read, test = (LatentCache(tmp_path / "cache", split) for split in ("train", "test"))
  assert (read.variants, test.variants) == (2, 1)
  source = data.open_source("folder", "train", 16, 0, {"path": str(photos)})
  variables = export.read(first).variables
  image = normalize_images(source.image(4)[None])
  for variant, picture in enumerate((image, image[:, :, ::-1])):
    found = read.lookup(np.array([4]), np.array([variant]))
    expected = two_stage.Shrinker(None).encode(variables, picture)
    np.testing.assert_allclose(found, expected, atol=1e-6)
  with pytest.raises(UserError, match="--flips is of the training split 'train', which --split"):
    write_latents(on_folder(first, photos), str(tmp_path / "test"), ("test",), flips=True)


def test_a_stale_cache_is_refused_by_name(first, photos, cache, tmp_path):
  other = two_stage.make(tmp_path / "other", gain=4.0)
  stale = f"data.latents={cache} is stale: "
  with pytest.raises(UserError, match=f"{stale}its split 'train' is of another first stage"):
    train_on(on_folder(other, photos, data__latents=cache), tmp_path / "stage")
  changed = shutil.copytree(photos, tmp_path / "changed")
  train_on(on_folder(first, changed, 1, data__latents=cache), tmp_path / "moved")  # the same
  with (changed / "5.png").open("ab") as file:
    file.write(b"more")
  with pytest.raises(UserError, match=f"{stale}the pictures of split 'train' are others now"):
    train_on(on_folder(first, changed, data__latents=cache), tmp_path / "data")
  (changed / "6.png").unlink()
  with pytest.raises(UserError, match="others now, 31 in place of 32"):
    train_on(on_folder(first, changed, data__latents=cache), tmp_path / "fewer")
  with pytest.raises(UserError, match="is of data set folder, this run's is of scenes"):
    train_on(config(first, data__latents=cache), tmp_path / "scenes")
  with pytest.raises(UserError, match="is of resolution 16, this run's is of 32"):
    train_on(on_folder(first, photos, data__latents=cache, model__resolution=32), tmp_path / "size")
  with pytest.raises(UserError, match="no cache of latents in 'nowhere'"):
    train_on(on_folder(first, photos, data__latents="nowhere"), tmp_path / "nowhere")
  given = on_folder(first, photos, data__latents=cache)
  with given.unlocked():
    del given.components.first_stage
  with pytest.raises(UserError, match="set components.first_stage=PATH"):
    train_on(given, tmp_path / "none")
  with pytest.raises(UserError, match="system toy models no latents; leave data.latents out"):
    train_on(config_of(f"{TOY}", data__name="folder", data__latents=cache,
                       components__first_stage=first), tmp_path / "toy")  # fmt: skip
  assert not (tmp_path / "data" / "config.json").exists()


def test_a_split_that_is_not_there_is_refused_when_its_loss_is_asked_for(first, photos, tmp_path):
  path = tmp_path / "cache"
  write_latents(on_folder(first, photos), str(path), ("train",))
  train_on(on_folder(first, photos, 1, data__latents=path), tmp_path / "train")
  evaluated = on_folder(first, photos, 1, data__latents=path, evaluate__every=1)
  with pytest.raises(UserError, match="has no split 'test', only train; add it with .*=test"):
    train_on(evaluated, tmp_path / "run")
  write_latents(on_folder(first, photos), str(path), ("test",), "float32")
  with pytest.raises(UserError, match="'test' is float32.4, 4, 6., the training split float16"):
    train_on(evaluated, tmp_path / "run")
  shutil.rmtree(path / "test")
  write_latents(on_folder(first, photos), str(path), ("test",))
  train_on(evaluated, tmp_path / "run")


def test_one_that_was_killed_goes_on(first, photos, cache, tmp_path, monkeypatch):
  write, path = Writer.write, tmp_path / "cache"
  left = [2]

  def killed(self, *given):
    if not left[0]:
      raise KeyboardInterrupt
    left[0] -= 1
    write(self, *given)

  monkeypatch.setattr(Writer, "write", killed)
  again = lambda: write_latents(  # noqa: E731
    on_folder(first, photos), str(path), dtype="float32", shard_size=5, batch_size=3
  )
  with pytest.raises(KeyboardInterrupt):
    again()
  with pytest.raises(UserError, match="is not whole: 5 of 7 shards"):
    train_on(on_folder(first, photos, data__latents=path), tmp_path / "run")
  monkeypatch.setattr(Writer, "write", write)
  again()
  for there in cache.rglob("*"):
    if there.is_file() and not there.name.startswith("."):
      assert (path / there.relative_to(cache)).read_bytes() == there.read_bytes()


def test_a_picture_s_moments_do_not_depend_on_the_batch(first, photos, cache, tmp_path):
  write_latents(on_folder(first, photos), str(tmp_path / "cache"), ("test",), "float32", 1024, 64)
  rows = np.arange(8)
  np.testing.assert_array_equal(LatentCache(tmp_path / "cache", "test").lookup(rows),
                                LatentCache(cache, "test").lookup(rows))  # fmt: skip


def test_no_picture_can_be_read(first, tmp_path):
  photos = write_folder(tmp_path / "photos", broken=range(32))
  with pytest.raises(UserError, match="not one of the 32 pictures can be read"):
    write_latents(on_folder(first, photos), str(tmp_path / "cache"), ("train",))


def test_two_hosts_write_one_cache(first, tmp_path):
  with socket.create_server(("localhost", 0)) as free:
    address = f"localhost:{free.getsockname()[1]}"
  flags = ["latents", f"--config={CONFIG}:size=tiny", f"--config.components.first_stage={first}",
           "--rows=250", "--split=train", "--shard-size=30", "--dtype=bfloat16"]  # fmt: skip
  processes = [
    command("", *flags, f"--output={tmp_path / 'two'}", code=HOST, devices=2,
            T2I_COORDINATOR=address, T2I_NUM_PROCESSES="2", T2I_PROCESS_ID=str(index))
    for index in range(2)
  ]  # fmt: skip
  for process in processes:
    finish(process)
  precompute.main([*flags, f"--output={tmp_path / 'one'}"])
  files = [p for p in (tmp_path / "one").rglob("*") if p.is_file() and not p.name.startswith(".")]
  assert len(files) == 3 * 9 + 2
  for path in files:
    assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()


def test_the_command_and_what_it_refuses(first, photos, tmp_path, capsys):
  output = tmp_path / "c"
  base = [f"--config={CONFIG}:size=tiny,dataset=folder", f"--config.data.options.path={photos}",
          f"--output={output}"]  # fmt: skip
  flags = [*base, f"--config.components.first_stage={first}"]
  precompute.main(["latents", *flags])
  said = capsys.readouterr()
  assert "train: 30 pictures" in said.out and "2 more that cannot be read" in said.out
  assert "latents have mean" in said.out and f"--config.data.latents={output}" in said.out
  assert "picture/s" in said.err
  precompute.main(["latents", *flags])
  assert "0 encoded now" in capsys.readouterr().out

  def fails(message, *words):
    with pytest.raises(SystemExit) as status:
      precompute.main(list(words))
    lines = capsys.readouterr().err.strip().splitlines()
    assert status.value.code == 2 and len(lines) == 1 and message in lines[0], lines

  fails("holds another cache: its dtype is float16, this one's is float32", "latents", *flags,
        "--dtype=float32")  # fmt: skip
  fails("did you mean 'test'", "latents", *flags, "--split=tests")
  fails("unknown --dtype 'int8'", "latents", *flags, "--dtype=int8")
  fails("set --config.components.first_stage=EXPORT", "latents", *base)
  fails("all rows of split 'train' of data set 'folder' are stored", "latents", *flags, "--rows=3")
  fails("made on the fly and has no end; say with --rows=N", "latents",
        f"--config={CONFIG}:size=tiny", *flags[3:], f"--output={tmp_path / 'd'}")  # fmt: skip
  fails("--rows=0: use 1 or more", "latents", *flags, "--rows=0")
  text = encoder.make(tmp_path / "encoder", 1.0)
  fails("components.first_stage needs a system with FirstStage", "latents", *base[:2],
        f"--output={tmp_path / 'd'}", f"--config.components.first_stage={text}")  # fmt: skip
  fails("is there and is no cache of latents", "latents", *base[:2], flags[3], f"--output={photos}")
  fails("--flips is of latents", "text", *flags, "--flips", "--config.text.encoder=component")


def test_pictures_that_are_drawn_do_not_depend_on_where_the_first_stage_rests(first, tmp_path):
  """On two devices, where it is placed for each call."""
  path = tmp_path / "cache"
  write_latents(config(first), str(path), ("train",), "float32", rows=64)
  given = config(first, 2, data__latents=path, sample__every=2)
  train_on(given, tmp_path / "one", 1)
  train_on(given, tmp_path / "two", 2)
  pictures = [
    np.asarray(Image.open(tmp_path / name / "samples" / "step_00000002.png"), int)
    for name in ("one", "two")
  ]
  assert np.abs(pictures[0] - pictures[1]).max() <= 1
  assert "first_stage" in export.read(tmp_path / "two" / "export").variables["params"]


def test_only_the_first_stage_is_loaded(first, photos, tmp_path):
  """Not a text encoder of some gigabytes."""
  given = on_folder(first, photos, components__text_encoder=tmp_path / "not there",
                    text__encoder="component")  # fmt: skip
  write_latents(given, str(tmp_path / "cache"))
  assert precompute_latents.LatentCache(tmp_path / "cache", "train").variants == 1


@pytest.mark.parametrize("option, value, message", [
  ("crop", "random", "shows another part of a picture each time, and latents are"),
  ("buckets", "8", "latents are of squares; leave data.options.buckets out"),
])  # fmt: skip
def test_there_are_none_of_pictures_that_vary(
  photos, tmp_path, monkeypatch, option, value, message
):
  monkeypatch.setenv("T2I_CACHE", str(tmp_path / "cache"))
  given = on_folder("nowhere", photos, **{f"data__options__{option}": value})
  with pytest.raises(UserError, match=message):
    write_latents(given, tmp_path / "latents", (), "float16")
  assert not (tmp_path / "latents").exists()
