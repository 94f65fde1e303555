"""Every config at every size, as text, so that a change of one default shows up in review.

T2I_REGENERATE_GOLDEN=1 writes the texts anew: python -m pytest tests/test_golden_configs.py
"""

import difflib
import functools
import importlib.util
import json
import os
import re
from pathlib import Path

import flax.linen as nn
import jax
import pytest

from t2i_jax import assembly, batch_spec, config_files, recipe, run_data
from t2i_jax import config as configs
from t2i_jax.systems import trees

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
REGENERATE = "T2I_REGENERATE_GOLDEN"
PATHS = sorted(ROOT.glob("configs/*.py"))


def sizes_of(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return tuple(module.SIZES)


CASES = [pytest.param(path, size, id=f"{path.stem}-{size}") for path in PATHS
         for size in sizes_of(path)]


def golden_file(path, size):
  return GOLDEN / f"{path.stem}-{size.replace('/', '-')}.json"


@pytest.mark.parametrize("path, size", CASES)
def test_config_is_as_written_down(path, size):
  text = configs.to_json(config_files.load_config(f"{path}:size={size}"))
  golden = golden_file(path, size)
  if os.environ.get(REGENERATE):
    golden.write_text(text)
  old = golden.read_text() if golden.exists() else ""
  difference = "".join(difflib.unified_diff(
    old.splitlines(True), text.splitlines(True), str(golden.relative_to(ROOT)), "now", n=1
  ))
  assert not difference, f"\n{difference}\nIf this is meant, run with {REGENERATE}=1."


WRITTEN = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*"),
           *ROOT.glob("configs/*.py"), *ROOT.glob("t2i_jax/**/*.py")]
EXAMPLES = sorted({example for path in WRITTEN if path.suffix in (".md", ".py")
                   for example in re.findall(r"--config=(configs/[\w.]+(?::[\w=,/.-]*\w)?)",
                                             path.read_text())} - {"configs/NAME.py"})


@pytest.mark.parametrize("example", EXAMPLES)
def test_configs_named_in_the_documentation_exist(example, monkeypatch):
  monkeypatch.chdir(ROOT)
  config_files.load_config(example)


def test_no_text_is_left_of_a_config_that_is_gone():
  assert set(GOLDEN.iterdir()) == {golden_file(*case.values) for case in CASES}


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_every_config_takes_every_data_set(path):
  for dataset in recipe.DATASETS:
    config = config_files.load_config(f"{path}:size=tiny,dataset={dataset}")
    assert dataset.startswith(config.data.name) and config.is_locked
    assert run_data.held_out_splits(config)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: p.stem)
def test_the_docstring_gives_the_command_the_result_and_the_sizes(path):
  text = path.read_text()
  assert f"python -m t2i_jax.main --config=configs/{path.name}" in text
  expected = re.search(r"Expected\b.*?\n\n", text.split('"""')[1], re.DOTALL).group()
  # A result with its time, or that there is none.
  found = "%" in expected and re.search(
    r"minutes on (one|two) CPU core", " ".join(expected.split())
  )
  assert found or expected == "Expected: not known, no size was trained to its end here.\n\n"
  for size in sizes_of(path):
    assert f'"{size}"' in text.split('"""')[1], f"size {size} is not in the docstring"


ENCODER = "a converted CLIP"
# Configs whose systems are built on others, by what takes their place here.
COMPONENTS = {
  "kl_autoencoder": {"perceptual": "feature_net"}, "semantic_guidance": {"clip": "clip"},
  "ldm": {"first_stage": "kl_autoencoder"}, "lora": {"base": "ddpm"},
  "stable_diffusion": {"first_stage": "kl_autoencoder", "text_encoder": ENCODER},
  "sdxl": {"first_stage": "kl_autoencoder", "text_encoder": ENCODER, "text_encoder_2": ENCODER},
  "dit": {"first_stage": "kl_autoencoder"}, "u_vit": {"first_stage": "kl_autoencoder"},
  # Its pictures are too large for an autoencoder that takes but one half of their sides.
  "sd3": {"first_stage": "kl_autoencoder:small", "text_encoder": ENCODER, "text_encoder_2": ENCODER,
          "text_encoder_3": ENCODER},
}


def encoder():
  """A text encoder such as `convert` makes of a public one, small."""
  config = recipe.base("pretrained_text", "scenes")
  published = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
    projection_dim=16, hidden_act="gelu", vocab_size=64, max_position_embeddings=8, eos_token_id=2,
  )  # fmt: skip
  config.text.length = 8
  config.model.update(published=json.dumps(published), null=(0,) * 8, project=True)
  system = assembly.build_system(config)
  return system, jax.eval_shape(lambda: system.init(jax.random.key(0), {})), {}


def built(stem, size):
  """A config's system on its components, the shapes of all its variables, and a batch."""
  if stem == ENCODER:
    return encoder()
  config = config_files.load_config(f"{ROOT / 'configs' / stem}.py:size={size}")
  parts = {
    name: built(other.partition(":")[0], other.partition(":")[2] or "tiny")
    for name, other in COMPONENTS.get(stem, {}).items()
  }  # fmt: skip
  system = assembly.build_system(config, {name: part[0] for name, part in parts.items()})
  frozen = trees.merge(*(
    {kind: {name: groups} for kind, groups in variables.items()}
    for name, (_, variables, _) in parts.items()
  ))  # fmt: skip
  batch = batch_spec.abstract_batch(system, 2)
  key = jax.eval_shape(lambda: jax.random.key(0))
  return system, trees.merge(jax.eval_shape(system.init, key, batch, frozen), frozen), batch


@functools.cache
def module_classes(path, size):
  """The Linen classes that initialisation and every player's loss call, by tracing alone."""
  seen = set()

  def note(call, args, kwargs, context):
    seen.add(type(context.module).__name__)
    return call(*args, **kwargs)

  key = jax.eval_shape(lambda: jax.random.key(0))
  step = jax.ShapeDtypeStruct((), "int32")
  with nn.intercept_methods(note):
    system, variables, batch = built(path.stem, size)
    for player in system.players:
      jax.eval_shape(player.loss, variables, batch, key, step)
  return seen


@pytest.mark.full
@pytest.mark.parametrize("path, size", CASES)
def test_tiny_has_the_parts_of_every_size(path, size):
  """It differs from a published size in numbers only."""
  assert module_classes(path, "tiny") == module_classes(path, size)
