import numpy as np
import pytest

from t2i_jax.data.scenes import (
  APPLIES,
  LEVELS,
  SCORES,
  Scene,
  Scenes,
  Thing,
  audit,
  caption,
  parse,
  render,
  verify,
)
from t2i_jax.errors import UserError

ROWS = 600
CASES = [(level, resolution) for level in LEVELS for resolution in (32, 64)]


@pytest.mark.parametrize(("level", "resolution"), CASES)
def test_true_pictures_pass(level, resolution):
  assert audit.accepted_true(level, resolution, ROWS, "clean")["all"] >= 0.995


@pytest.mark.parametrize(("level", "resolution"), CASES)
def test_true_pictures_pass_after_noise(level, resolution):
  assert audit.accepted_true(level, resolution, ROWS, "noise")["all"] >= 0.95


@pytest.mark.parametrize("level", LEVELS)
def test_true_pictures_pass_after_a_blur(level):
  assert audit.accepted_true(level, 64, ROWS, "blur")["all"] >= 0.95


@pytest.mark.parametrize(
  ("level", "resolution", "attribute"),
  [(level, resolution, a) for level, resolution in CASES for a in audit.CHANGES[level]],
)
def test_changed_captions_fail(level, resolution, attribute):
  scores = audit.accepted_changed(level, resolution, ROWS, attribute)
  assert scores["all"] <= 0.01
  if attribute == "binding":
    assert scores["colour"] == scores["shape"] == 1.0
    return
  # The score of what was changed falls, and the others do not.
  for name in SCORES[:-1]:
    assert scores[name] <= 0.05 if name == attribute else scores[name] >= 0.995


def test_changed_captions_differ_in_one_attribute():
  random = audit.Random(0)
  for level in LEVELS:
    for scene in Scenes(levels=(level,)).scenes(np.arange(100)):
      for attribute in audit.CHANGES[level]:
        if attribute == "binding":
          continue
        other = audit.change(scene, attribute, random)
        fields = [
          name
          for a, b in zip(scene.things, other.things, strict=True)
          for name in ("colour", "shape", "size", "place", "count")
          if getattr(a, name) != getattr(b, name)
        ]
        fields += ["relation"] if scene.relation != other.relation else []
        assert len(fields) == 1


@pytest.mark.parametrize("resolution", [32, 64])
@pytest.mark.parametrize("decoy", audit.DECOYS)
def test_decoys_fail(resolution, decoy):
  assert audit.accepted_decoys(resolution, ROWS, decoy) == 0.0


@pytest.mark.parametrize("resolution", [32, 64])
def test_pictures_of_two_objects_never_show_one(resolution):
  images, _ = audit.true_rows("two", resolution, ROWS)
  _, captions = audit.true_rows("one", resolution, ROWS)
  scores = verify(images, captions)
  assert not scores["count"].any() and not scores["all"].any()


@pytest.mark.parametrize("resolution", [48, 100, 128])
def test_other_resolutions(resolution):
  for level in LEVELS:
    assert audit.accepted_true(level, resolution, 200, "clean")["all"] >= 0.99


def test_enlarged_pictures_pass():
  images, captions = audit.true_rows("one", 32, 300)
  assert verify(images.repeat(2, 1).repeat(2, 2), captions)["all"].mean() >= 0.99


def scene_of(*things, relation=None):
  level = "one" if things[0].size else "two" if relation else "counts"
  return Scene(level, things, relation)


def judge(shown, said):
  """Scores of a caption that says one scene on a picture that shows another."""
  images = render([shown], 64, np.zeros(1, np.uint64))
  return {name: bool(passed[0]) for name, passed in verify(images, [caption(said, 0)]).items()}


def test_sub_scores_of_one_object():
  shown = scene_of(Thing("red", "ring", "small", "top"))
  said = scene_of(Thing("blue", "cross", "small", "top left"))
  assert judge(shown, said) == {
    "colour": False, "shape": False, "size": True, "count": True, "position": False, "all": False
  }  # fmt: skip


def test_sub_scores_of_a_relation_do_not_depend_on_who_is_named_first():
  red, blue = Thing("red", "ring"), Thing("blue", "cross")
  shown = scene_of(red, blue, relation="left of")
  assert judge(shown, scene_of(blue, red, relation="right of"))["all"]
  scores = judge(shown, scene_of(blue, red, relation="left of"))
  assert scores["colour"] and scores["shape"] and not scores["position"] and not scores["all"]


def test_binding_counts_only_for_all():
  shown = scene_of(Thing("red", "ring"), Thing("blue", "cross"), relation="above")
  said = scene_of(Thing("blue", "ring"), Thing("red", "cross"), relation="above")
  scores = judge(shown, said)
  assert scores["colour"] and scores["shape"] and scores["count"] and not scores["all"]


def test_sub_scores_of_counts():
  rings, crosses = Thing("red", "ring", count=2), Thing("blue", "cross", count=3)
  more = scene_of(Thing("red", "ring", count=3), Thing("blue", "cross", count=2))
  scores = judge(scene_of(rings, crosses), more)
  assert scores["colour"] and scores["shape"] and not scores["count"] and not scores["all"]
  scores = judge(scene_of(rings), scene_of(rings, crosses))
  assert not (scores["colour"] or scores["shape"] or scores["count"] or scores["all"])


def test_what_does_not_apply_is_true():
  images = np.full((3, 32, 32, 3), 240, np.uint8)
  captions = [Scenes(levels=(level,)).fetch([0], [0]).captions[0] for level in LEVELS]
  scores = verify(images, captions)
  assert set(scores) == set(SCORES)
  for i, text in enumerate(captions):
    for name in SCORES:
      assert scores[name][i] == (name not in APPLIES[parse(text).level])


def test_shapes_that_are_none_of_ours_fail():
  images, captions = audit.true_rows("one", 64, 300)
  # The left half of every object: columns right of its middle are wiped.
  figure = (images != 240).any(-1)
  first, last = figure.any(1).argmax(1), 63 - figure.any(1)[:, ::-1].argmax(1)
  wiped = np.arange(64) >= ((first + last + 1) // 2)[:, None]
  images = np.where(wiped[:, None, :, None], np.uint8(240), images)
  assert verify(images, captions)["shape"].mean() <= 0.01


def test_no_pictures():
  scores = verify(np.zeros((0, 32, 32, 3), np.uint8), [])
  assert all(passed.shape == (0,) for passed in scores.values())


@pytest.mark.parametrize(
  ("images", "captions", "message"),
  [
    (np.zeros((1, 32, 32, 3)), ["a red ring and two blue rings"], "give uint8"),
    (np.zeros((1, 16, 16, 3), np.uint8), ["a red ring and two blue rings"], "at least 32"),
    (np.zeros((1, 32, 40, 3), np.uint8), ["a red ring and two blue rings"], "square"),
    (np.zeros((2, 32, 32, 3), np.uint8), ["a red ring and two blue rings"], "one caption a pic"),
    (np.zeros((1, 32, 32, 3), np.uint8), ["a dog"], "not a caption of the scenes: 'a dog'"),
  ],
)
def test_user_errors(images, captions, message):
  with pytest.raises(UserError, match=message):
    verify(images, captions)
