import itertools

import numpy as np
import pytest

from t2i_jax.data import labels, read_labels
from t2i_jax.data.scenes import (
  BACKGROUND,
  COLOURS,
  HELD_OUT_PAIRS,
  LEVELS,
  PLACES,
  SHAPES,
  SIZES,
  SPLITS,
  Scene,
  Scenes,
  Thing,
  canonical,
  caption,
  one_object_scenes,
  parse,
  render,
  split_of,
  two_object_scenes,
)
from t2i_jax.data.scenes.grammar import captions_of
from t2i_jax.errors import UserError


def draws(n):
  return np.random.default_rng(0).integers(0, 2**64, n, np.uint64)


def rows_of(level, n=7000):
  return Scenes(levels=(level,)).scenes(np.arange(n))


def pairs_of(scene):
  return {(thing.colour, thing.shape) for thing in scene.things}


def test_variety():
  assert len(SHAPES) >= 6 and len(COLOURS) >= 9 and len(SIZES) == 2 and len(PLACES) == 9


@pytest.mark.parametrize("split", SPLITS)
def test_rows_depend_on_seed_and_index_only(split):
  indices = np.array([3, 100_001, 5, 2**40])
  whole = Scenes(split, seed=7, levels=LEVELS).fetch(indices, draws(4))
  alone = Scenes(split, seed=7, levels=LEVELS).fetch(indices[1:2], draws(4)[1:2])
  np.testing.assert_array_equal(whole.image[1], alone.image[0])
  assert whole.captions[1] == alone.captions[0]
  other = Scenes(split, seed=8, levels=LEVELS).fetch(indices, draws(4))
  assert (whole.image != other.image).any()


def test_draws_choose_the_phrasing_only():
  source = Scenes()
  rows = source.fetch(np.zeros(50, int), draws(50))
  assert (rows.image == rows.image[0]).all()
  assert len(set(rows.captions)) > 10
  assert len({parse(text) for text in rows.captions}) == 1


@pytest.mark.parametrize("resolution", [16, 32, 50, 64])
def test_pictures(resolution):
  rows = Scenes(resolution=resolution, levels=LEVELS).fetch(np.arange(60), draws(60))
  assert rows.image.shape == (60, resolution, resolution, 3) and rows.image.dtype == np.uint8
  assert (np.median(rows.image, axis=(1, 2)) == BACKGROUND).all()
  assert (rows.image.min(axis=(1, 2, 3)) < 100).all()


def test_places_move_whole_objects():
  # At 40 pixels places are 12 apart, so the same object is drawn pixel by pixel.
  for colour, shape, size in itertools.product(("red", "cyan"), SHAPES, SIZES):
    at = {
      place: render([Scene("one", (Thing(colour, shape, size, place),))] * 20, 40, draws(20))
      for place in PLACES
    }
    for i, place in enumerate(PLACES):
      moved = np.roll(at["centre"], (12 * (i // 3 - 1), 12 * (i % 3 - 1)), (1, 2))
      assert np.abs(moved.astype(int) - at[place]).max() <= 1


def test_resolutions_show_the_same_picture():
  small = Scenes(resolution=32, levels=LEVELS).fetch(np.arange(60), draws(60)).image
  large = Scenes(resolution=128, levels=LEVELS).fetch(np.arange(60), draws(60)).image
  mean = large.reshape(60, 32, 4, 32, 4, 3).mean((2, 4))
  assert np.abs(mean - small).mean() < 1.0


def test_layout_jitters():
  scene = next(one_object_scenes())
  images = render([scene] * 20, 32, draws(20))
  assert len(np.unique(images, axis=0)) == 20


def test_held_out_shares_of_one_object_scenes():
  scenes = list(one_object_scenes())
  assert len(scenes) == 972 == len(set(scenes))
  split = [split_of(scene) for scene in scenes]
  for name in SPLITS[1:]:
    assert split.count(name) >= 0.15 * len(scenes)
  pairs = set(itertools.product(COLOURS, SHAPES))
  assert len(HELD_OUT_PAIRS) >= 0.15 * len(pairs)
  trained = set().union(*(pairs_of(s) for s, name in zip(scenes, split, strict=True)
                          if name == "train"))  # fmt: skip
  assert trained == pairs - set(HELD_OUT_PAIRS)
  assert {c for c, _ in trained} == set(COLOURS) and {s for _, s in trained} == set(SHAPES)


def test_held_out_shares_of_two_object_scenes():
  split = [split_of(scene) for scene in two_object_scenes()]
  without_pairs = [name for name in split if name != "held_out_pairs"]
  assert without_pairs.count("held_out_combinations") >= 0.15 * len(without_pairs)
  assert split.count("held_out_pairs") >= 0.15 * len(split)


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_held_out_is_trained_on(level):
  trained = {canonical(scene) for scene in rows_of(level)}
  assert not any(pairs_of(scene) & set(HELD_OUT_PAIRS) for scene in trained)
  for split in SPLITS[1:]:
    source = Scenes(split, levels=(level,))
    held_out = {canonical(scene) for scene in source.scenes(np.arange(len(source)))}
    assert len(held_out) == len(source) > 100
    assert not held_out & trained
    with_pairs = {bool(pairs_of(scene) & set(HELD_OUT_PAIRS)) for scene in held_out}
    assert with_pairs == {split == "held_out_pairs"}


def test_levels_never_show_each_others_pictures():
  # A picture held out at one level would otherwise be trained on at another.
  for scene in rows_of("counts"):
    counts = [thing.count for thing in scene.things]
    assert counts not in ([1], [1, 1]) and sum(counts) <= 6
  assert all(len(pairs_of(scene)) == 2 for scene in rows_of("two", 1000))


def test_held_out_splits_are_the_same_for_every_seed():
  for split in SPLITS[1:]:
    a, b = (Scenes(split, seed=seed, levels=("one", "two")) for seed in (0, 1))
    in_a, in_b = (s.scenes(np.arange(len(s))) for s in (a, b))
    assert {canonical(s) for s in in_a} == {canonical(s) for s in in_b}
    assert in_a != in_b


def test_training_is_uniform_over_what_is_allowed():
  allowed = [s for s in one_object_scenes() if split_of(s) == "train"]
  drawn = rows_of("one", 20 * len(allowed))
  counts = np.array([drawn.count(scene) for scene in allowed[::40]])
  assert counts.min() > 4 and counts.max() < 45 and abs(counts.mean() - 20) < 4


@pytest.mark.parametrize("level", LEVELS)
def test_parse_inverts_every_phrasing(level):
  scenes = rows_of(level, 300) + Scenes("held_out_pairs", levels=(level,)).scenes(np.arange(100))
  phrasings = set()
  for i, scene in enumerate(scenes):
    for draw in draws(40):
      text = caption(scene, draw)
      assert parse(text) == scene, text
      assert text == text.lower() and len(text.split()) <= 22
      if i == 0:
        phrasings.add(text)
  assert len(phrasings) >= 4


@pytest.mark.parametrize(
  "text",
  [
    "",
    "a dog",
    "a small mauve circle in the centre",
    "two red circle and a blue ring",
    "a red circles and two blue rings",
    "a red circle near a blue square",
    "A small red circle at the top",
    "a small red circle at the top and a blue ring",
  ],
)
def test_parse_refuses(text):
  with pytest.raises(ValueError, match="not a caption"):
    parse(text)


def test_tokenizer_captions_hold_every_word_and_nothing_held_out():
  captions = list(Scenes(levels=LEVELS).captions())
  assert len(captions) >= 20_000
  assert all(split_of(parse(text)) == "train" for text in captions)
  words = {word for text in captions for word in text.replace(",", " ,").split()}
  for split in SPLITS[1:]:
    source = Scenes(split, levels=LEVELS)
    rows = [caption(s, d) for s, d in zip(source.scenes(np.arange(2000)), draws(2000), strict=True)]
    assert {word for text in rows for word in text.replace(",", " ,").split()} <= words


def test_articles():
  texts = [caption(scene, d) for scene in rows_of("two", 200) for d in draws(5)]
  assert any(" an orange " in f" {text}" for text in texts)
  assert not any("a orange" in text for text in texts)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"split": "test"}, "unknown split of scenes 'test'"),
    ({"levels": ("one", "twos")}, "did you mean 'two'"),
    ({"levels": ()}, "no levels"),
    ({"resolution": 8}, "too small"),
  ],
)
def test_user_errors(arguments, message):
  with pytest.raises(UserError, match=message):
    Scenes(**arguments)


@pytest.mark.parametrize("level", LEVELS)
def test_every_caption_of_a_scene_is_listed_once(level):
  for scene in Scenes("held_out_pairs", levels=(level,)).scenes(np.arange(5)):
    listed = captions_of(scene)
    assert len(listed) == len(set(listed)) and {parse(text) for text in listed} == {scene}
    assert set(listed) >= {caption(scene, int(draw)) for draw in draws(3000)}
    # And none that is never drawn, as far as drawing can tell.
    if len(listed) < 100:
      assert set(listed) == {caption(scene, int(draw)) for draw in draws(3000)}


@pytest.mark.parametrize("split", SPLITS)
def test_every_caption_that_rows_can_have(split):
  source = Scenes(split, levels=("one",))
  listed = set(source.every_caption())
  rows = source.fetch(np.arange(2000), draws(2000))
  assert set(rows.captions) <= listed
  assert {split_of(parse(text)) for text in listed} == {split}


def test_what_has_too_many_captions_is_one_line():
  with pytest.raises(UserError, match="'counts' have too many captions to list"):
    next(Scenes(levels=("one", "counts")).every_caption())
  assert next(Scenes("held_out_pairs", levels=("counts",)).every_caption())


def test_labels_say_what_the_captions_say():
  source = Scenes(labels=True)
  rows = source.fetch(np.arange(200), draws(200))
  assert rows.extra["label"].dtype == np.int32
  np.testing.assert_array_equal(rows.extra["label"], read_labels("scenes", rows.captions))
  (thing,) = parse(rows.captions[3]).things
  values = (list(COLOURS), SHAPES, SIZES, PLACES)
  said = (thing.colour, thing.shape, thing.size, thing.place)
  assert [names[i] for names, i in zip(values, rows.extra["label"][3], strict=True)] == list(said)
  assert labels("scenes") == dict(zip(("colour", "shape", "size", "place"), map(len, values),
                                      strict=True))
  assert (rows.extra["label"].max(axis=0) + 1 == list(labels("scenes").values())).all()
  # Nothing else changes, and without the option there are none.
  plain = Scenes().fetch(np.arange(200), draws(200))
  assert plain.extra == {} and plain.captions == rows.captions
  np.testing.assert_array_equal(plain.image, rows.image)
  assert Scenes("held_out_pairs", labels=True).fetch(np.arange(3), draws(3)).extra["label"].shape


def test_only_one_object_has_labels():
  with pytest.raises(UserError, match="levels one, two have no labels.* data.options.levels=one"):
    Scenes(levels=("one", "two"), labels=True)
  for text in ("a red circle above a blue ring", "two red circles"):
    with pytest.raises(UserError, match="have no labels"):
      read_labels("scenes", [text])
  with pytest.raises(UserError, match="a label cannot be read: not a caption"):
    read_labels("scenes", ["hello"])
  assert labels("emoji") is None
  with pytest.raises(UserError, match="'emoji' has no labels; those that have: .*scenes"):
    read_labels("emoji", ["a cat"])


def test_sizes_are_those_of_whole_pictures():
  rows = Scenes(sizes=True, labels=True, resolution=24).fetch(np.arange(3), draws(3))
  assert set(rows.extra) == {"label", "size", "crop"}
  for name, value in (("size", 24), ("crop", 0)):
    assert rows.extra[name].dtype == np.int32
    np.testing.assert_array_equal(rows.extra[name], np.full((3, 2), value))
