"""Training on features that were computed before is training on the encoder, without it."""

import json
import shutil
import socket

import encoder
import jax
import numpy as np
import pytest
from runs import ROOT, TOY, assert_same_bits, command, config_of, finish, metrics, train_on

import t2i_jax
from t2i_jax import export, precompute, precompute_text
from t2i_jax.data.text_cache import TextCache
from t2i_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("compiled_programs")
DDPM = ROOT / "configs" / "ddpm.py"


def config(components, path=TOY, duration=4, **settings):
  given = {f"components__{name}": folder for name, folder in components.items()}
  if len(components) > 1:
    given["text__encoders"] = ",".join(components)
  return config_of(path, train__duration=duration, text__encoder="component", **given, **settings)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  return {"text_encoder": encoder.make(tmp_path_factory.mktemp("one") / "encoder", 1.0)}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
  folder = tmp_path_factory.mktemp("two")
  return {"a": encoder.make(folder / "a", 1.0), "b": encoder.make(folder / "b", 2.0)}


@pytest.fixture(scope="module")
def cache(one, tmp_path_factory):
  """Of the toy's captions, in float32."""
  path = tmp_path_factory.mktemp("cache") / "cache"
  precompute_text.write_features(config(one), str(path), dtype="float32")
  return path


def test_the_same_run_without_the_encoder(one, cache, tmp_path):
  """With evaluation and samples on the way."""
  there = train_on(config(one), tmp_path / "encoder")
  here = train_on(config(one, text__cache=cache), tmp_path / "cache")
  assert here.frozen == {} and there.frozen != {}
  assert_same_bits(here.replace(frozen={}), there.replace(frozen={}))
  assert metrics(tmp_path / "cache") == metrics(tmp_path / "encoder")
  for name in ("samples/step_00000003.png", "export/variables.safetensors"):
    assert (tmp_path / "cache" / name).read_bytes() == (tmp_path / "encoder" / name).read_bytes()
  # The export holds the encoder, and needs no cache.
  pictures = t2i_jax.load(tmp_path / "cache" / "export")(["a red ring"], seed=1)
  np.testing.assert_array_equal(
    pictures, t2i_jax.load(tmp_path / "encoder" / "export")(["a red ring"], seed=1)
  )


@pytest.mark.slow
def test_the_same_for_diffusion_on_two_encoders(two, tmp_path):
  # One level, which reads the text, and no draft: each more is compiled in every program.
  settings = dict(path=DDPM, duration=2, text__drop=0.5, text__drop_each=0.5, sample__every=0,
                  model__multipliers="(1,)", model__attention_levels="(0,)", model__draft=0,
                  model__patch=2)
  path = tmp_path / "cache"
  precompute_text.write_features(config(two, **settings), str(path), ("train",), "float32", 4096)
  there = train_on(config(two, **settings), tmp_path / "encoder")
  here = train_on(config(two, text__cache=path, **settings), tmp_path / "run")
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), here.params, there.params
  )
  losses = [[line["denoiser/loss"] for line in metrics(tmp_path / name)] for name in
            ("encoder", "run")]  # fmt: skip
  np.testing.assert_allclose(*losses, rtol=1e-5)
  held = export.read(tmp_path / "run" / "export")
  assert set(held.tokenizers.of) == {"a", "b"} == set(held.components)
  pipeline = t2i_jax.load(tmp_path / "run" / "export")
  drawn = pipeline(["a red ring", "a blue square", "a ring"], seed=1, batch_size=2)
  assert drawn.shape == (3, 16, 16, 3)
  # Encoders that leave the devices draw the same.
  away = type(pipeline).load(tmp_path / "run" / "export", offload_text=True)
  assert set(away.resting["params"]) == {"a", "b"}
  assert not {"a", "b"} & set(away.variables["params"])
  np.testing.assert_array_equal(
    away(["a red ring", "a blue square", "a ring"], seed=1, batch_size=2), drawn
  )


def test_bfloat16_is_near(one, tmp_path):
  precompute_text.write_features(config(one), str(tmp_path / "cache"))
  index = json.loads((tmp_path / "cache" / "index.json").read_text())
  assert index["dtype"] == "bfloat16" and index["captions"] > 30_000
  settings = dict(evaluate__every=0, sample__every=0)
  train_on(config(one, **settings), tmp_path / "there")
  train_on(config(one, text__cache=tmp_path / "cache", **settings), tmp_path / "here")
  for one_line, other in zip(metrics(tmp_path / "there"), metrics(tmp_path / "here"), strict=True):
    assert other["drawer/loss"] == pytest.approx(one_line["drawer/loss"], rel=0.02)


def test_a_run_on_a_cache_goes_on_when_the_export_is_gone(one, cache, tmp_path):
  path = shutil.copytree(one["text_encoder"], tmp_path / "encoder")
  settings = dict(text__cache=cache, evaluate__every=0, sample__every=0)
  whole = train_on(config({"text_encoder": path}, **settings), tmp_path / "whole")
  run = tmp_path / "run"
  train_on(config({"text_encoder": path}, duration=2, **settings), run)
  shutil.rmtree(path)
  state = train_on(config({"text_encoder": path}, **settings), run)
  assert_same_bits(state, whole)
  held = export.read(run / "export").variables["params"]["text_encoder"]["table"]["rows"]
  rows = export.read(one["text_encoder"]).variables["params"]["table"]["rows"]
  np.testing.assert_array_equal(held, rows)
  export.main([f"--workdir={run}", f"--output={tmp_path / 'again'}"])
  t2i_jax.load(tmp_path / "again")(["a red ring"])


def test_a_run_changes_over_to_a_cache(one, cache, tmp_path):
  settings = dict(evaluate__every=0, sample__every=0)
  whole = train_on(config(one, **settings), tmp_path / "whole")
  train_on(config(one, duration=2, **settings), tmp_path / "run")
  state = train_on(config(one, text__cache=cache, **settings), tmp_path / "run")
  assert state.frozen == {}
  assert_same_bits(state.replace(frozen={}), whole.replace(frozen={}))


def test_a_stale_cache_is_refused_by_name(one, two, cache, tmp_path):
  settings = dict(text__cache=cache, evaluate__every=0, sample__every=0)
  with pytest.raises(UserError, match=f"text.cache={cache} is stale: .* another text_encoder"):
    train_on(config({"text_encoder": two["b"]}, **settings), tmp_path / "encoder")
  with pytest.raises(UserError, match=r"lacks \d+ of the \d+ captions of scenes, train, such as"):
    train_on(config(one, data__options__levels="two", **settings), tmp_path / "captions")
  with pytest.raises(UserError, match="no cache of text features in 'nowhere'"):
    train_on(config(one, text__cache="nowhere"), tmp_path / "nowhere")
  with pytest.raises(UserError, match="set components.text_encoder=PATH"):
    train_on(config({}, **settings), tmp_path / "none")
  assert not (tmp_path / "encoder" / "config.json").exists()
  # One that the held-out loss would read, found before training.
  precompute_text.write_features(config(one), str(tmp_path / "some"), ("train",))
  with pytest.raises(UserError, match=r"captions of scenes, held_out_combinations, such as"):
    train_on(config(one, text__cache=tmp_path / "some"), tmp_path / "held_out")
  TextCache(cache)


# The second host begins late, and so ends last.
HOST = """
import os, sys, time
import encoder
from t2i_jax import precompute
from t2i_jax.data.shards import ShardWriter

missing = ShardWriter.missing

def late(self, of_all=False):
  time.sleep(3 * (os.environ["T2I_PROCESS_ID"] == "1" and not of_all))
  return missing(self, of_all)

ShardWriter.missing = late
precompute.main(sys.argv[1:])
"""


def test_two_hosts_write_one_cache(one, tmp_path):
  with socket.create_server(("localhost", 0)) as free:
    address = f"localhost:{free.getsockname()[1]}"
  flags = ["text", f"--config={TOY}:size=tiny", "--config.text.encoder=component",
           f"--config.components.text_encoder={one['text_encoder']}", "--split=held_out_pairs",
           "--shard-size=500", "--dtype=float32"]  # fmt: skip
  processes = [
    command("", *flags, f"--output={tmp_path / 'two'}", code=HOST, devices=2,
            T2I_COORDINATOR=address, T2I_NUM_PROCESSES="2", T2I_PROCESS_ID=str(index))
    for index in range(2)
  ]  # fmt: skip
  for process in processes:
    finish(process)
  precompute.main([*flags, f"--output={tmp_path / 'one'}"])
  for path in (tmp_path / "one").rglob("*"):
    if path.is_file() and not path.name.startswith("."):
      found, expected = (np.load(p) if p.suffix == ".npy" else p.read_text() for p in
                         (tmp_path / "two" / path.relative_to(tmp_path / "one"), path))
      np.testing.assert_array_equal(found, expected)
  assert len(list((tmp_path / "two").glob("0*"))) == 12


def test_the_command_and_what_it_refuses(one, tmp_path, capsys):
  flags = [f"--config={TOY}:size=tiny", "--config.text.encoder=component",
           f"--config.components.text_encoder={one['text_encoder']}", f"--output={tmp_path / 'c'}",
           "--split=held_out_pairs", "--shard-size=500"]
  precompute.main(["text", *flags])
  said = capsys.readouterr().out
  assert "5833 captions" in said and f"--config.text.cache={tmp_path / 'c'}" in said
  precompute.main(["text", *flags])
  assert "0 of them encoded now" in capsys.readouterr().out

  def fails(message, *words):
    with pytest.raises(SystemExit) as status:
      precompute.main(list(words))
    lines = capsys.readouterr().err.strip().splitlines()
    assert status.value.code == 2 and len(lines) == 1 and message in lines[0], lines

  fails("did you mean 'text'", "txt", *flags)
  fails("did you mean 'held_out_pairs'", "text", *flags[:-2], "--split=held_out_pair")
  fails("--shard-size=0: use 1 or more", "text", *flags[:-1], "--shard-size=0")
  fails("unknown --dtype 'float16'", "text", *flags, "--dtype=float16")
  fails("is trained, so its features change", "text", flags[0], *flags[3:])
  fails("too many captions to list", "text", *flags[:-2], "--config.data.options.levels=counts",
        "--split=train")  # fmt: skip
