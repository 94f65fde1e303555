"""Training runs for tests: small, on few compilations, what they leave, and how they refuse."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from t2i_jax import assembly, batch_spec, config_files, export, main, run_data, tokenizing
from t2i_jax.parallel.mesh import make_mesh
from t2i_jax.systems import trees
from t2i_jax.text.tokenizer import Tokenizers
from t2i_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).parent.parent
TOY = ROOT / "tests" / "toy.py"
TOY_CONFIG = f"--config={TOY}:size=tiny"
# Values of metrics.jsonl that depend on the clock.
TIMES = ("time", "steps_per_second", "examples_per_second", "flops_per_second", "mfu")


@pytest.fixture(scope="module")
def compiled_programs(tmp_path_factory):
  """Programs are kept on disk for all modules, so that each compiles once."""
  from jax.experimental.compilation_cache import compilation_cache

  cache = tmp_path_factory.getbasetemp() / "cache"
  settings = {
    "jax_compilation_cache_dir": str(cache / "compiled"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
  }
  before = {name: jax.config.values[name] for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("T2I_CACHE", str(cache))
    yield cache
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def config_of(path, dataset="scenes", **overrides):
  """`size=tiny` of a config; `train__duration=3` sets `train.duration`."""
  given = {key.replace("__", "."): str(value) for key, value in overrides.items()}
  chosen = "" if dataset == "scenes" else f",dataset={dataset}"
  return config_files.load_config(f"{path}:size=tiny{chosen}", given)


def write_export(path, config):
  """An export with random numbers, without compiling anything."""
  system = assembly.build_system(config)
  source = run_data.open_data(config, "held_out_pairs", batch_spec.resolution_of(system))
  tokenizers = tokenizing.make_tokenizer(config, source) if system.reads_text else Tokenizers({})
  shapes = jax.eval_shape(
    lambda batch: system.init(jax.random.key(0), batch), batch_spec.abstract_batch(system, 2)
  )
  rng = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype),
    trees.split(shapes, system.ema_groups)[0],
  )
  return export.write(path, config, 7, variables, tokenizers)


def train_on(config, workdir, devices=1):
  """`main.train` on the first `devices` devices; the last state."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(main, "make_mesh", lambda sizes: make_mesh(sizes, jax.devices()[:devices]))
    return main.train(config, str(workdir))


@pytest.fixture
def at_step(monkeypatch):
  """`at_step(n, action)`: calls `action` while step n + 1 of the next run is under way."""

  def plan(step, action):
    class Progress(main.Progress):
      def update(self, done, loss=None):
        super().update(done, loss)
        if done == step:
          action()

    monkeypatch.setattr(main, "Progress", Progress)

  return plan


def metrics(workdir):
  """The lines of metrics.jsonl without what depends on the clock."""
  lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def saved_steps(workdir):
  checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
  steps = checkpoints.steps()
  checkpoints.close()
  return steps


def saved_meta(workdir, step):
  checkpoints = Checkpoints(Path(workdir) / "checkpoints", read_only=True)
  meta = checkpoints.meta(step)
  checkpoints.close()
  return meta


def assert_same_bits(one, other):
  """Two trees of arrays are equal, NaNs and signs of zeros included."""
  leaves = [jax.tree_util.tree_leaves_with_path(tree) for tree in (one, other)]
  assert [path for path, _ in leaves[0]] == [path for path, _ in leaves[1]]
  different = [
    jax.tree_util.keystr(path) for (path, a), (_, b) in zip(*leaves, strict=True)
    if np.asarray(a).tobytes() != np.asarray(b).tobytes()
  ]
  assert not different, different


def command(name, *arguments, code=None, devices=1, **environment):
  """Starts a command, or `code`, as its own process, on `devices` CPU devices."""
  count = "--xla_force_host_platform_device_count="
  flags = [flag for flag in os.environ["XLA_FLAGS"].split() if not flag.startswith(count)]
  env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JAX_PLATFORMS": "cpu",
         "XLA_FLAGS": " ".join([*flags, f"{count}{devices}"]), **environment}
  program = ["-c", code] if code else ["-m", f"t2i_jax.{name}"]
  return subprocess.Popen([sys.executable, *program, *map(str, arguments)], env=env, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)


def finish(process, status=0, minutes=10):
  """What a process wrote to stderr, once it has ended with this status."""
  _, errors = process.communicate(timeout=60 * minutes)
  assert process.returncode == status, errors[-3000:]
  return errors


@pytest.fixture
def fails(capfd):
  """`fails(module, flag...)`: it exits with status 2 and one line on stderr, which is returned."""

  def call(module, *flags):
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit:
      module.main([str(flag) for flag in flags])
    err = capfd.readouterr().err
    assert exit.value.code == 2
    *before, last = err.splitlines()
    assert last.startswith("error: ") and len(last) < 600
    # Warnings, and the progress of work.
    told = ("warning: ", "making the parameters", "  ")
    assert not [line for line in before if not line.startswith(told)], err
    return last.removeprefix("error: ")

  return call


def starts(fails, workdir, *flags, config=TOY_CONFIG):
  """The error of a training that must not begin, nor make the work directory its own."""
  message = fails(main, config, f"--workdir={workdir}", *flags)
  assert not (workdir / "config.json").exists() and not (workdir / "tokenizer.json").exists()
  return message


def folder_of(path, rows, pictures=()):
  """A new folder of grey pictures, and its captions.jsonl unless `rows` is None."""
  path.mkdir()
  for name in pictures:
    Image.fromarray(np.full((20, 20, 3), 99, np.uint8)).save(path / name)
  if rows is not None:
    (path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  return path
