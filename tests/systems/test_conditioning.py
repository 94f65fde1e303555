import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.errors import UserError
from t2i_jax.systems import base, trees
from t2i_jax.systems.base import Conditioning, System
from t2i_jax.systems.conditioning import GROUP, TextConditioner

SMALL = dict(length=5, vocab_size=16, width=4, layers=1, heads=2)
ROWS = 200


class Words(System):
  """A frozen encoder with a vector a token, whose empty prompt is three 9s."""

  players, ema_groups = (), ("words",)

  def init(self, rng, batch, frozen):
    return {"params": {"words": {"table": jax.random.normal(rng, (16, 4))}}}

  def batch_spec(self):
    return {}

  def encode(self, variables, text):
    features = variables["params"]["words"]["table"][text["ids"]]
    return Conditioning(features, text["mask"], features[:, 0])

  def null_text(self):
    return {"ids": np.full(5, 9, np.int32), "mask": np.arange(5) < 3}


class Letters(System):
  """Another, of seven tokens and another width, without a mask; with a vector or none."""

  players, ema_groups = (), ("letters",)

  def __init__(self, length=7, pooled=True):
    self.length, self.pooled = length, pooled

  def init(self, rng, batch, frozen):
    return {"params": {"letters": {"table": jax.random.normal(rng, (16, 6))}}}

  def batch_spec(self):
    return {}

  def encode(self, variables, text):
    features = variables["params"]["letters"]["table"][text["ids"]]
    return Conditioning(features, None, features[:, 0] if self.pooled else None)

  def null_text(self):
    return {"ids": np.full(self.length, 8, np.int32), "mask": np.arange(self.length) < 1}


def captions(rows=ROWS):
  ids = jnp.asarray(np.random.default_rng(0).integers(3, 9, (rows, 5)), jnp.int32)
  return {"text": {GROUP: {"ids": ids, "mask": jnp.ones((rows, 5), bool)}}}


def features(rows=ROWS):
  drawn = np.random.default_rng(1).normal(size=(rows, 5, 4)).astype(np.float32)
  return {"text_embedding": {GROUP: {"sequence": drawn, "mask": np.ones((rows, 5), bool)}}}


def make(encoder, drop=0.3):
  """A conditioner, its variables, and a batch for it."""
  key = jax.random.key(0)
  if encoder == "cached":
    null = {"sequence": np.full((1, 5, 4), 7.0, np.float32), "mask": np.ones((1, 5), bool)}
    return TextConditioner("component", drop=drop, cached_null={GROUP: null}), {}, features()
  if encoder == "component":
    words = Words()
    conditioner = TextConditioner(encoder, drop=drop, components={GROUP: words}, **SMALL)
    frozen = {kind: {GROUP: groups} for kind, groups in words.init(key, {}, {}).items()}
    return conditioner, frozen, captions()
  conditioner = TextConditioner(encoder, drop=drop, **SMALL)
  shapes = jax.eval_shape(conditioner.init, key, captions(2))
  random = np.random.default_rng(2)
  variables = jax.tree.map(lambda x: 0.5 * random.normal(size=x.shape).astype("f4"), shapes)
  return conditioner, variables, captions()


@pytest.fixture(
  scope="module", params=["transformer", "lstm", "bilstm", "component", "cached"]
)
def encoded(request):
  """What training and sampling see of one batch."""
  conditioner, variables, batch = make(request.param)
  return jax.jit(
    lambda rng: (
      conditioner(variables, batch),
      conditioner(variables, batch, rng),
      conditioner.with_null(variables, batch),
    )
  )(jax.random.key(1))


def equal_rows(one, other):
  """bool [B], rows of two conditionings that agree in every array."""
  agree = jax.tree.map(
    lambda a, b: np.all(np.isclose(a, b, atol=1e-5).reshape(len(a), -1), axis=1), one, other
  )
  return np.logical_and.reduce(jax.tree.leaves(agree))


def test_training_replaces_some_captions_by_the_null_of_sampling(encoded):
  plain, dropped, carrying = encoded
  kept = equal_rows(dropped, plain)
  nulled = equal_rows(dropped, carrying.null)
  assert np.all(kept ^ nulled)
  # Binomial: standard deviation 0.032.
  assert nulled.mean() == pytest.approx(0.3, abs=0.1)


def test_sampling_drops_nothing_and_carries_the_null_in_every_row(encoded):
  plain, _, carrying = encoded
  assert equal_rows(carrying.replace(null=None), plain).all()
  null = carrying.null
  assert jax.tree.map(jnp.shape, null) == jax.tree.map(jnp.shape, plain)
  assert all(np.all(np.asarray(x) == np.asarray(x)[:1]) for x in jax.tree.leaves(null))


def test_rows_of_the_caption_are_what_they_should_be(encoded):
  plain, _, _ = encoded
  assert plain.sequence.shape == (ROWS, 5, 4) and plain.mask.shape == (ROWS, 5)
  assert plain.pooled is None or plain.pooled.shape == (ROWS, 4)


@pytest.mark.parametrize("drop, dropped", [(0.0, 0), (1.0, ROWS)])
def test_never_and_always(drop, dropped):
  conditioner, variables, batch = make("component", drop)
  given = conditioner(variables, batch, jax.random.key(0))
  null = conditioner.with_null(variables, batch).null
  assert equal_rows(given, null).sum() == dropped


def test_the_draw_is_the_keys():
  conditioner, variables, batch = make("component")
  draw = lambda seed: conditioner(variables, batch, jax.random.key(seed)).sequence  # noqa: E731
  np.testing.assert_array_equal(draw(3), draw(3))
  assert np.any(np.asarray(draw(3) != draw(4)))


def test_a_component_is_encoded_by_its_own_variables_and_null():
  conditioner, variables, batch = make("component")
  table = variables["params"][GROUP]["words"]["table"]
  given = conditioner.with_null(variables, batch)
  np.testing.assert_array_equal(given.sequence, table[batch["text"][GROUP]["ids"]])
  np.testing.assert_array_equal(given.null.sequence[0], jnp.tile(table[9], (5, 1)))
  np.testing.assert_array_equal(given.null.mask[0], [True] * 3 + [False] * 2)


def test_only_a_trained_encoder_has_variables_and_only_a_component_is_frozen():
  for encoder, trained, frozen in [
    ("transformer", (GROUP,), ()), ("lstm", (GROUP,), ()), ("bilstm", (GROUP,), ()),
    ("component", (), (GROUP,)), ("cached", (), (GROUP,)),
  ]:  # fmt: skip
    conditioner, _, batch = make(encoder)
    assert (conditioner.groups, conditioner.frozen_groups) == (trained, frozen)
    shapes = jax.eval_shape(conditioner.init, jax.random.key(0), batch)
    assert tuple(shapes.get("params", {})) == trained


def test_pooled_features_alone_are_enough():
  null = {GROUP: {"pooled": np.zeros((1, 6), np.float32)}}
  conditioner = TextConditioner("component", drop=0.5, cached_null=null)
  batch = {"text_embedding": {GROUP: {"pooled": jnp.ones((20, 6), jnp.bfloat16)}}}
  given = conditioner.with_null({}, batch)
  assert given.sequence is None and given.null.pooled.shape == (20, 6)
  assert given.pooled.dtype == jnp.float32
  dropped = conditioner({}, batch, jax.random.key(0)).pooled
  assert set(np.asarray(dropped).ravel()) == {0.0, 1.0}
  read = {"text_embedding/text_encoder/pooled": base.Field((6,), "float32")}
  assert conditioner.batch_spec() == read


def several(encoders, letters=None, **values):
  """A conditioner of both, its variables, and a batch of eight rows."""
  parts = {"words": Words(), "letters": letters or Letters()}
  conditioner = TextConditioner("component", encoders=encoders, components=parts, **values)
  frozen = {"params": {
    name: part.init(jax.random.key(n), {}, {})["params"] for n, (name, part) in
    enumerate(parts.items())
  }}  # fmt: skip
  ids = np.random.default_rng(0).integers(0, 8, (8, 7)).astype(np.int32)
  text = {
    name: {"ids": ids[:, : part.null_text()["ids"].size],
           "mask": np.arange(part.null_text()["ids"].size) < np.full((8, 1), 4)}
    for name, part in parts.items()
  }
  return conditioner, frozen, {"text": text}


def test_encoders_one_behind_the_other():
  conditioner, variables, batch = several(("words", "letters"))
  given = conditioner.with_null(variables, batch)
  assert given.sequence.shape == (8, 12, 6) and given.pooled.shape == (8, 10)
  table = variables["params"]["words"]["words"]["table"]
  np.testing.assert_array_equal(given.sequence[:, :5, :4], table[batch["text"]["words"]["ids"]])
  assert not np.any(given.sequence[:, :5, 4:])
  table = variables["params"]["letters"]["letters"]["table"]
  ids = batch["text"]["letters"]["ids"]
  np.testing.assert_array_equal(given.sequence[:, 5:], table[ids])
  np.testing.assert_array_equal(given.pooled[:, 4:], table[ids[:, 0]])
  # One without a mask counts everywhere.
  assert given.mask[:, :5].sum() == 8 * 4 and given.mask[:, 5:].all()
  assert given.null.mask[0].tolist() == [True] * 3 + [False] * 2 + [True] * 7
  assert conditioner.frozen_groups == ("words", "letters") and conditioner.groups == ()
  assert conditioner.batch_spec()["text/letters/ids"].shape == (7,)


def test_encoders_side_by_side():
  conditioner, variables, batch = several(("words+letters",), Letters(5), pooled=("letters",))
  given = conditioner(variables, batch)
  assert given.sequence.shape == (8, 5, 10) and given.pooled.shape == (8, 6)
  assert given.mask is None
  conditioner, variables, batch = several(("words + letters",))
  with pytest.raises(UserError, match=r"words \+ letters have \[5, 7\] tokens"):
    conditioner(variables, batch)
  conditioner, variables, batch = several(
    ("words", "letters"), Letters(pooled=False), pooled=("letters",)
  )
  with pytest.raises(UserError, match="text.pooled names 'letters', which has no vector"):
    conditioner(variables, batch)


def test_encoders_are_dropped_each_by_itself():
  conditioner, variables, batch = several(("words", "letters"), drop=0.0, drop_each=0.5)
  plain, null = (conditioner.each(variables, batch), conditioner.with_null(variables, batch).null)
  fates = set()
  for seed in range(4):
    given = conditioner(variables, batch, jax.random.key(seed))
    kept = [
      np.all(np.isclose(given.sequence[:, part], both.sequence[:, part]), axis=(1, 2))
      for part in (slice(5), slice(5, None))
      for both in (conditioner(variables, batch), null)
    ]
    assert np.all(kept[0] ^ kept[1]) and np.all(kept[2] ^ kept[3])
    fates |= set(zip(kept[0].tolist(), kept[2].tolist(), strict=True))
  assert len(fates) == 4 and set(plain) == {"words", "letters"}


@pytest.mark.parametrize("kind", ["zeros", "learned"])
def test_nulls_that_no_caption_has(kind):
  conditioner, variables, batch = several(("words", "letters"), drop=0.5, null=kind)
  made = conditioner.init(jax.random.key(0), batch, variables)
  assert conditioner.groups == (("null_text",) if kind == "learned" else ())
  assert set(made.get("params", {})) == set(conditioner.groups)
  variables = trees.merge(variables, made)
  carrying = conditioner.with_null(variables, batch)
  assert carrying.null.mask.all()  # attention has somewhere to look
  expected = np.zeros((12, 6), np.float32)
  if kind == "learned":
    null = made["params"]["null_text"]
    expected[:5, :4], expected[5:] = null["words"]["sequence"], null["letters"]["sequence"]
  np.testing.assert_array_equal(carrying.null.sequence[3], expected)
  given = conditioner(variables, batch, jax.random.key(0))
  nulled = equal_rows(given, carrying.null)
  assert 0 < nulled.sum() < 8
  assert np.all(nulled ^ equal_rows(given, carrying.replace(null=None)))
  if kind == "learned":  # and it learns
    gradient = jax.grad(lambda v: jnp.sum(
      conditioner(trees.merge(variables, v), batch, jax.random.key(0)).sequence ** 2
    ))(made)
    assert np.abs(gradient["params"]["null_text"]["words"]["sequence"]).max() > 0


def test_a_trained_encoder_may_have_a_learned_null():
  conditioner = TextConditioner("transformer", null="learned", drop=1.0, **SMALL)
  made = conditioner.init(jax.random.key(0), captions(3))
  assert set(made["params"]) == {"text_encoder", "null_text"} == set(conditioner.groups)
  given = conditioner(made, captions(3), jax.random.key(0))
  null = made["params"]["null_text"]["text_encoder"]
  np.testing.assert_array_equal(given.pooled[1], null["pooled"])


def test_what_text_is_read_of_a_batch():
  assert make("transformer")[0].batch_spec() == {
    "text/text_encoder/ids": base.Field((5,), "int32"),
    "text/text_encoder/mask": base.Field((5,), "bool"),
  }


@pytest.mark.parametrize(
  "values, message",
  [
    ({"encoder": "transfomer"}, "did you mean 'transformer'"),
    ({"pool": "median"}, "unknown text pool"),
    ({"drop": 1.5}, "text.drop=1.5"),
    ({"width": 10, "heads": 4}, "text.heads=4 does not divide text.width=10"),
    ({"null": "zero"}, "did you mean 'zeros'"),
    ({"drop_each": -0.1}, "text.drop_each=-0.1"),
    ({"encoders": ("a", "b")}, "text.encoder=transformer is trained"),
    ({"cache": "here"}, "text.encoder=transformer is trained"),
    ({"encoder": "component", "encoders": ("a+b", "a")}, "name each encoder once"),
    ({"encoder": "component", "encoders": ()}, "name each encoder once"),
    ({"encoder": "component", "pooled": ("b",)}, "unknown encoder in text.pooled"),
    ({"encoder": "bilstm", "width": 1}, "text.width=1 cannot be shared"),
  ],
)
def test_what_makes_no_conditioner_is_one_line(values, message):
  with pytest.raises(UserError, match=message):
    TextConditioner(**values)


def test_without_a_text_there_is_nothing_to_condition_on():
  text = TextConditioner("none")
  assert text.names == text.groups == text.frozen_groups == () and text.batch_spec() == {}
  batch = {"image": jnp.zeros((2, 4, 4, 3))}
  assert text.init(jax.random.key(0), batch) == {}
  for given in (text({}, batch, jax.random.key(0)), text.with_null({}, batch)):
    assert jax.tree.leaves(given) == [] and given.null is None
  with pytest.raises(UserError, match="text.encoder=none has none"):
    TextConditioner("none", null="learned")
