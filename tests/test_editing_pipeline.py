"""Pictures to begin with, masks and negative prompts, from the pipeline and from the command."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from ml_collections import ConfigDict
from PIL import Image

from t2i_jax import sample
from t2i_jax.errors import UserError
from t2i_jax.parallel.mesh import make_mesh
from t2i_jax.pipeline import Pipeline
from t2i_jax.systems import base
from t2i_jax.systems.base import Conditioning
from t2i_jax.systems.conditioning import TextConditioner
from t2i_jax.systems.diffusion.sampling import Options
from t2i_jax.systems.pictures import normalize_images
from t2i_jax.systems.trees import NO_VARIABLES
from t2i_jax.text.tokenizer import Tokenizers, train_tokenizer

SIDE = 8
TOKENIZERS = Tokenizers({"text_encoder": train_tokenizer(["a b c d"] * 9, 300, 4)})


@dataclasses.dataclass(frozen=True, eq=False)
class Recorder(base.System):
  """Draws, as grey values, what it was given: of the text, its null, and the picture."""

  text: TextConditioner = TextConditioner(length=4, vocab_size=300)
  resolution: int = SIDE
  dtype: Any = jnp.float32
  Options = Options
  players = ()
  ema_groups = ()

  def batch_spec(self):
    return {}

  def init(self, rng, batch, frozen=NO_VARIABLES):
    return {}

  def encoded(self, variables, images):
    return images

  def condition(self, variables, batch):
    def pooled(ids):
      return jnp.sum(ids * jnp.arange(1, 5), axis=1).astype(jnp.float32) / 10_000

    text = batch["text"]["text_encoder"]["ids"]
    null = Conditioning(pooled=jnp.zeros(len(text)), extra={"of": jnp.ones(len(text))})
    extra = {"of": jnp.ones(len(text))}
    if "image" in batch:
      extra["start"] = normalize_images(batch["image"])
    return Conditioning(pooled=pooled(text), extra=extra, null=null)

  def sample(self, variables, conditioning, keys, options):
    rows = jnp.broadcast_to(
      conditioning.extra.get("start", 0.0), (len(conditioning.pooled), SIDE, SIDE, 3)
    )
    given = jnp.stack([conditioning.pooled, conditioning.null.pooled], axis=-1)
    return rows.at[:, 0, :2].set(jnp.repeat(given[..., None], 3, -1))


@struct.dataclass
class NoOptions:
  pass


class Plain(Recorder):
  """Neither guided, nor able to begin with a picture."""

  Options = NoOptions
  encoded = None

  def condition(self, variables, batch):
    return super().condition(variables, batch).replace(null=None)


def pipeline(system):
  return Pipeline(system, TOKENIZERS, make_mesh({"data": -1}, jax.devices()[:1]), {})


DRAWS = pipeline(Recorder())
PICTURE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def test_a_negative_prompt_takes_the_place_of_the_null():
  plain, led = DRAWS(["a b"]), DRAWS(["a b"], negative="c d")
  other = DRAWS(["c d"])
  np.testing.assert_array_equal(plain[0, 0, 0], led[0, 0, 0])
  np.testing.assert_array_equal(led[0, 0, 1], other[0, 0, 0])
  assert np.any(plain[0, 0, 1] != led[0, 0, 1])


def test_a_picture_reaches_the_system_for_every_prompt():
  drawn = DRAWS(["a", "b c", "d"], image=PICTURE, batch_size=2)
  np.testing.assert_array_equal(drawn[:, 1:], np.stack([PICTURE[1:]] * 3))


def test_what_is_known_is_given_back_as_it_was():
  known = np.zeros((SIDE, SIDE), bool)
  known[0, 0] = True
  drawn = DRAWS(["a b"], image=PICTURE, known=known)
  np.testing.assert_array_equal(drawn[0, 0, 0], PICTURE[0, 0])
  assert np.any(drawn[0, 0, 1] != PICTURE[0, 1])


@pytest.mark.parametrize(
  "given, message",
  [
    ({"known": np.ones((SIDE, SIDE), bool)}, "give both"),
    ({"image": PICTURE[:4]}, "the picture to begin with is 4 x 8"),
    ({"image": PICTURE, "known": np.ones((4, 4), bool)}, "the mask to begin with is 4 x 4"),
    ({"image": PICTURE, "height": 16}, "16 x 8 are drawn"),
  ],
)
def test_what_does_not_fit_is_refused(given, message):
  with pytest.raises(UserError, match=message):
    DRAWS(["a"], **given)


def test_systems_that_cannot_are_named():
  with pytest.raises(UserError, match="Plain is not guided by its text"):
    pipeline(Plain())(["a"], negative="b")


class Like:
  """A guide that notes what it is shown."""

  resolution = SIDE

  def references(self, image, weights):
    given = {"weight": np.array([weights["style"]], np.float32)}
    return given if image is None else {**given, "image": image[None]}


class Led(Recorder):
  """Draws the picture that its guide is shown, times its weight."""

  guide = Like()

  def condition(self, variables, batch):
    given = super().condition(variables, batch)
    shown = batch["guide"]
    start = normalize_images(shown["image"]) * shown["weight"][:, None, None, None]
    return given.replace(extra={**given.extra, "start": start})


def test_a_guide_is_shown_the_picture_for_every_prompt():
  drawn = pipeline(Led())(
    ["a", "b c", "d"], guide_image=PICTURE, guide_weights={"style": 1.0}, batch_size=2
  )
  np.testing.assert_array_equal(drawn[:, 1:], np.stack([PICTURE[1:]] * 3))
  half = pipeline(Led())(["a"], guide_image=PICTURE, guide_weights={"style": 0.5})
  np.testing.assert_allclose(half[0, 1:] / 127.5 - 1, (PICTURE[1:] / 127.5 - 1) / 2, atol=5e-3)


def test_a_picture_for_no_guide_is_refused():
  with pytest.raises(UserError, match="there is no guide"):
    DRAWS(["a"], guide_image=PICTURE)
  deaf = Led()
  object.__setattr__(deaf, "guide", Plain())
  with pytest.raises(UserError, match="a Plain, takes no picture and no weights"):
    pipeline(deaf)(["a"], guide_weights={"style": 1.0})


@dataclasses.dataclass
class Flags:
  image: str = ""
  mask: str = ""
  option: tuple[str, ...] = ()
  guide_image: str = ""
  guide_weight: tuple[str, ...] = ()
  prompt: tuple[str, ...] = ()
  prompts: str = ""


@pytest.fixture
def files(tmp_path):
  Image.fromarray(PICTURE).save(tmp_path / "a.png")
  mask = np.zeros((SIDE, SIDE), np.uint8)
  mask[:, 4:] = 255
  Image.fromarray(mask).save(tmp_path / "mask.png")
  return tmp_path


def test_the_command_reads_a_picture_and_a_mask(files):
  options = {}
  image, known = sample._beginning(
    Flags(f"{files / 'a.png'}", f"{files / 'mask.png'}"), Recorder(), options
  )
  np.testing.assert_array_equal(image, PICTURE)
  # Black stays.
  assert known[:, :4].all() and not known[:, 4:].any() and options == {}


@pytest.mark.parametrize(
  "option, strength", [((), {"strength": sample.STRENGTH}), (("strength=0.2",), {})]
)
def test_without_a_mask_a_part_of_the_steps_is_taken(files, option, strength):
  options = {}
  sample._beginning(Flags(f"{files / 'a.png'}", option=option), Recorder(), options)
  assert options == strength


def test_files_that_cannot_be_read_are_named(files):
  (files / "text.png").write_text("none")
  for flags, message in (
    (Flags(mask="m.png"), "give --image too"),
    (Flags(image=f"{files / 'no.png'}"), "no such file"),
    (Flags(image=f"{files / 'text.png'}"), "not a picture"),
  ):
    with pytest.raises(UserError, match=message):
      sample._beginning(flags, Recorder(), {})
  with pytest.raises(UserError, match="height and width the same"):
    sample._beginning(Flags(image=f"{files / 'a.png'}"), Recorder(), {"height": 16})


def test_the_command_shows_a_guide_a_picture(files):
  picture = f"{files / 'a.png'}"
  given = sample._leading(Flags(guide_image=picture, guide_weight=("style=2",)), Led())
  np.testing.assert_array_equal(given["guide_image"], PICTURE)
  # Without a prompt the text leads nowhere.
  assert given["guide_weights"] == {"style": 2.0, "text": 0.0}
  flags = Flags(guide_image=picture, prompt=("a",))
  assert sample._leading(flags, Led())["guide_weights"] == {}
  assert sample._prompts(flags) == ["a"] and sample._prompts(Flags(guide_image=picture)) == [""]
  assert sample._leading(Flags(prompt=("a",)), Recorder()) == {}


@pytest.mark.parametrize(
  "flags, message",
  [
    (Flags(guide_weight=("style",)), "--guide-weight=style is not KIND=WEIGHT"),
    (Flags(guide_weight=("style=x",)), "--guide-weight=style"),
    (Flags(guide_image="none.png"), "no such file"),
  ],
)
def test_what_the_command_cannot_show_is_named(flags, message):
  with pytest.raises(UserError, match=message):
    sample._leading(flags, Led())


def test_the_scale_of_a_guide_is_of_one_that_there_is():
  flags = SimpleNamespace(option=["guide_scale=8"], **dict.fromkeys(sample.COMMON))
  config = ConfigDict({"system": "adm", "sample": {"options": {}}})
  system = SimpleNamespace(Options=Options, components={})
  with pytest.raises(UserError, match="is of a guide, and there is none; name one, --guide="):
    sample.sampling_options(flags, config, system)
  system.components = {"guide": Led()}
  assert sample.sampling_options(flags, config, system) == {"guide_scale": 8.0}
