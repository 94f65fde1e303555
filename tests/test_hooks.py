"""What a run does beside stepping: pictures and losses of the averaged parameters, always alike."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from runs import TOY, config_of
from toy import Toy

from t2i_jax import assembly, batch_spec, caches, hooks, run_data, tokenizing
from t2i_jax.evaluation import verifier
from t2i_jax.parallel.mesh import make_mesh
from t2i_jax.training import state as states


class Writers:
  def __init__(self):
    self.written = {}

  def scalars(self, step, values):
    self.written[step] = values

  def images(self, step, name, images):
    pass


@pytest.fixture(scope="module")
def toy():
  """The toy's system, its data, and a state whose averages are not its parameters."""
  config = config_of(TOY)
  system = assembly.build_system(config)
  assert isinstance(system, Toy)
  source = run_data.open_data(config, "held_out_pairs", 16)
  tokenizers = tokenizing.make_tokenizer(config, source)
  batch = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), batch_spec.abstract_batch(system, 8)
  )
  optimizers = {player.name: optax.sgd(0.1) for player in system.players}
  state = states.create(system, optimizers, states.initialise(system, 0, batch, {}), {}, True)
  return system, source, tokenizers, state.replace(ema=jax.tree.map(lambda x: x + 1.0, state.ema))


def test_samples_are_of_the_average_and_one_seed(toy, tmp_path):
  _, _, _, state = toy
  calls = []

  def pipeline(prompts, seed, variables, **options):
    calls.append((tuple(prompts), seed, options))
    assert jax.tree.all(jax.tree.map(
      lambda x, y: x is y, variables["params"]["drawer"], state.ema["drawer"]
    ))
    return np.zeros((len(prompts), 16, 16, 3), np.uint8)

  draw = hooks.DrawSamples(pipeline, ["a", "b"], 2, 5, {"temperature": 0.5}, epath.Path(tmp_path),
                           Writers())
  draw(2, state)
  draw(4, state)
  assert calls == 2 * [(("a", "b"), 5, {"temperature": 0.5})]
  names = [path.name for path in sorted((tmp_path / "samples").iterdir())]
  assert names == ["step_00000002.png", "step_00000004.png"]


def test_the_held_out_loss_is_of_the_average_and_the_same_rows(toy):
  system, source, tokenizers, state = toy
  writers = Writers()
  mesh = make_mesh({}, jax.devices()[:1])
  measure = hooks.HeldOutLoss(
    system, source, caches.ReadText(tokenizers), mesh, 8, 2, 1, "pairs", writers
  )
  with jax.set_mesh(mesh):
    measure(1, state)
    measure(2, state)
    averaged = measure.measure(state.variables(ema=True))
    raw = measure.measure(state.variables())
  assert writers.written[1] == writers.written[2] == averaged
  assert averaged["pairs/error"] != pytest.approx(raw["pairs/error"], rel=1e-3)


def test_shuffled_captions_are_another_picture_s():
  captions = [f"caption {i}" for i in range(7)]
  shuffled = verifier.derangement(captions)
  assert sorted(shuffled) == captions
  assert all(a != b for a, b in zip(captions, shuffled, strict=True))


def test_scores_are_of_the_captions_and_collapse_with_others():
  config = config_of("configs/quickstart.py")
  with config.unlocked():
    config.model.resolution = 32

  class TruePictures:
    """Draws each caption's own picture."""

    def __init__(self):
      self.config, self.system = config, assembly.build_system(config)

    def __call__(self, captions, seed, **options):
      assert (seed, options) == (3, {"steps": 4})
      source = run_data.open_data(config, "held_out_pairs", 32)
      rows = source.fetch(np.arange(40), np.arange(40, dtype=np.uint64))
      assert rows.captions == captions
      return rows.image

  found = verifier.score(TruePictures(), "held_out_pairs", 40, 3, {"steps": 4})
  assert found["right"] == dict.fromkeys(found["right"], 1.0)
  assert found["shuffled"]["all"] == 0.0 and found["shuffled"]["position"] < 0.5
  assert found["pictures"] == 40 and 30 < found["captions"] <= 40
  text = verifier.table(verifier.title("held_out_pairs", found), found)
  assert "100.0%" in text and f"40 pictures of {found['captions']} captions (steps=4;" in text


class Negative:
  """A first stage of which pictures come back with their values reversed, and 0.5 darker."""

  scale, shift = 1.0, 0.0

  def encode(self, variables, images):
    return jnp.concatenate([images, jnp.ones_like(images)], axis=-1)

  def decode(self, variables, latents):
    return variables["sign"] * latents - 0.5

  def latent_shape(self, resolution):
    return resolution, resolution, 3


def test_reconstructions_are_of_the_average_beside_the_same_pictures(toy, tmp_path, monkeypatch):
  _, source, _, _ = toy
  seen = []
  monkeypatch.setattr(hooks, "prompt_grid", lambda images, texts, columns: seen.append(
    (images, texts, columns)) or np.zeros((4, 4, 3), np.uint8))
  mesh = make_mesh({"data": -1}, jax.devices())

  class Averaged:
    def variables(self, ema):
      return {"sign": -1.0 if ema else 1.0}

  draw = hooks.DrawReconstructions(Negative(), source, mesh, 3, 1, epath.Path(tmp_path), Writers())
  for step in (1, 2):
    draw(step, Averaged())
  images, texts, columns = seen[0]
  np.testing.assert_array_equal(images, seen[1][0])
  rows = source.fetch(np.arange(3), np.zeros(3, np.uint64))
  np.testing.assert_array_equal(images[::2], rows.image)
  expected = np.clip(np.round((-(rows.image / 127.5 - 1) + 0.5) * 127.5), 0, 255)
  np.testing.assert_allclose(images[1::2], expected, atol=1)
  assert texts[::2] == rows.captions and set(texts[1::2]) == {"as reconstructed"}
  assert columns % 2 == 0
  assert (tmp_path / "samples" / "step_00000002.png").exists()
