"""Which module may import which, and what is imported only where it is used."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "t2i_jax"
MODULES = {
  ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
  for path in sorted(PACKAGE.rglob("*.py"))
}

# Where a layer stands; a module may import its own layer and lower ones.
LAYERS = (
  ("errors", "files", "values", "durations", "config", "config_files"),
  ("parallel",),
  ("networks.layers",),
  ("networks",),
  ("text", "diffusion", "metrics", "data"),
  ("systems", "weights"),
  ("training",),
  ("recipe", "bucketing", "batch_spec", "run_data", "workdirs", "assembly", "tokenizing", "guiding",
   "caches", "model_card", "export", "restore", "pipeline", "hooks", "command", "prompts"),
  ("main", "run_hooks", "sample", "evaluate", "evaluation", "feature_networks", "convert",
   "conversion", "precompute", "precompute_text", "precompute_latents", "plan", "planning",
   "adapters", "data.prepare"),
)
# What a folder must not know, beyond its layer.
APART = {
  "data": ("systems", "text", "networks", "diffusion", "training", "metrics"),
  "metrics": ("systems", "text", "training", "data"),
  "diffusion": ("networks", "text", "systems", "data"),
  "networks": ("config", "config_files", "values", "durations", "systems", "data"),
  "weights": ("systems", "training", "data"),
}
# Inside functions these modules may reach up or across, for the reason given.
EXCEPTIONS = {
  ("t2i_jax", "pipeline"): "t2i_jax.load is the whole library in one line",
  ("export", "command"): "export is a library and a command",
}
HEAVY = ("grain", "tensorflow_datasets", "clu", "tensorboardX", "transformers", "array_record")
NEVER = ("tensorflow", "torch", "diffusers", "flax.nnx", "keras")
# TFDS builders, which others import inside a function.
USES = {"t2i_jax.data.emoji_builder": {"tensorflow_datasets"},
        "t2i_jax.data.sets.builder": {"tensorflow_datasets"}}


@functools.cache
def imports(name):
  """(imported module, whether at the top of the file) of a module."""
  found = set()
  tree = ast.parse(MODULES[name].read_text())
  top = {id(node) for node in tree.body}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {(alias.name, id(node) in top) for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{name} has a relative import"
      for alias in node.names:  # `from t2i_jax import config` imports a module
        whole = f"{node.module}.{alias.name}"
        found.add((whole if whole in MODULES else node.module, id(node) in top))
  return frozenset(found)


def short(name):
  return name.removeprefix("t2i_jax.") if name != "t2i_jax" else name


def layer(name):
  """The index of a module's layer; the longest name that fits decides."""
  best = max(
    ((len(member), i) for i, members in enumerate(LAYERS) for member in members
     if short(name) == member or short(name).startswith(f"{member}.")), default=None
  )
  assert best is not None, f"{name} is in no layer: add it to LAYERS"
  return best[1]


def own(name):
  return name == "t2i_jax" or name.startswith("t2i_jax.")


@pytest.mark.parametrize("name", [name for name in MODULES if name != "t2i_jax"])
def test_imports_point_one_way(name):
  for target, top in imports(name):
    if not own(target) or target == "t2i_jax":
      continue
    folder, other = short(name).split(".")[0], short(target).split(".")[0]
    if not top and (folder, other) in EXCEPTIONS:
      continue
    assert layer(target) <= layer(name), f"{name} imports {target}, which stands above it"
    if folder != other:
      assert other not in APART.get(folder, ()), f"{name} imports {target}"


def test_the_top_of_the_package_imports_nothing():
  assert not {target for target, top in imports("t2i_jax") if top}


def test_there_is_no_import_cycle():
  edges = {name: {target for target, top in imports(name) if top and target in MODULES}
           for name in MODULES}
  done = set()

  def visit(name, above):
    assert name not in above, f"a cycle: {' -> '.join([*above, name])}"
    if name not in done:
      for target in sorted(edges[name]):
        visit(target, [*above, name])
      done.add(name)

  for name in MODULES:
    visit(name, [])


@pytest.mark.parametrize("name", MODULES)
def test_large_packages_are_imported_where_they_are_used(name):
  for target, top in imports(name):
    root = target.split(".")[0]
    assert not (target.startswith(NEVER) and root != "tensorflow_datasets"), target
    assert not (top and root in HEAVY and root not in USES.get(name, ())), f"{name}: {target}"


@pytest.mark.parametrize("folder", ["training", "data", "metrics", "parallel", "networks"])
def test_these_folders_name_no_system(folder):
  """Not even in a text: the loop trains what it does not know."""
  sys.path.insert(0, str(ROOT))
  from t2i_jax.systems import SYSTEMS

  families = {path.name for path in (PACKAGE / "systems").iterdir() if path.is_dir()}
  names = set(SYSTEMS) | {entry.rpartition(":")[2] for entry in SYSTEMS.values()}
  for name, path in MODULES.items():
    if short(name).split(".")[0] != folder:
      continue
    for target, _ in imports(name):
      assert not any(target.startswith(f"t2i_jax.systems.{f}") for f in families), (name, target)
    if folder != "networks":  # a network's docstring may say which systems are built of it
      words = {node.id for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, ast.Name)}
      constants = {node.value for node in ast.walk(ast.parse(path.read_text()))
                   if isinstance(node, ast.Constant) and isinstance(node.value, str)}
      assert not names & (words | constants), name


BLOCKED = """
import sys

blocked = {blocked}
sys.modules.update(dict.fromkeys(blocked))  # to import one of them now fails
import toy
from t2i_jax import config, main

main.main(["--config={toy}", "--workdir={workdir}", "--config.train.duration=1",
           "--config.evaluate.every=0", "--config.sample.every=0"])
loaded = {{name.split(".")[0] for name, module in sys.modules.items() if module}} & blocked
assert not loaded, loaded
"""


def test_training_on_procedural_data_needs_no_grain_tfds_or_clu(tmp_path):
  code = BLOCKED.format(
    blocked={"grain", "tensorflow_datasets", "clu", "tensorflow", "tensorboardX", "torch"},
    toy=ROOT / "tests" / "toy.py", workdir=tmp_path,
  )
  env = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "XLA_FLAGS": "",
         "JAX_PLATFORMS": "cpu", "T2I_CACHE": str(tmp_path / "cache"),
         "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
  result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True,
                          timeout=600)
  assert result.returncode == 0, result.stderr[-2000:]
  assert "trained to step 1/1" in result.stderr
  assert "parameters (clu would list them)" in result.stderr
