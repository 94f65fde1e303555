import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.errors import UserError
from t2i_jax.systems import base
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


def captions(rows=ROWS):
  ids = jnp.asarray(np.random.default_rng(0).integers(3, 9, (rows, 5)), jnp.int32)
  return {"text": {GROUP: {"ids": ids, "mask": jnp.ones((rows, 5), bool)}}}


def features(rows=ROWS):
  drawn = np.random.default_rng(1).normal(size=(rows, 5, 4)).astype(np.float32)
  return {"text_embedding": {"sequence": drawn, "mask": np.ones((rows, 5), bool)}}


def make(encoder, drop=0.3):
  """A conditioner, its variables, and a batch for it."""
  key = jax.random.key(0)
  if encoder == "precomputed":
    null = {"sequence": np.full((1, 5, 4), 7.0, np.float32), "mask": np.ones((1, 5), bool)}
    return TextConditioner(encoder, drop=drop, null_embedding=null), {}, features()
  if encoder == "component":
    words = Words()
    conditioner = TextConditioner(encoder, drop=drop, component=words, **SMALL)
    frozen = {kind: {GROUP: groups} for kind, groups in words.init(key, {}, {}).items()}
    return conditioner, frozen, captions()
  conditioner = TextConditioner(encoder, drop=drop, **SMALL)
  shapes = jax.eval_shape(conditioner.init, key, captions(2))
  random = np.random.default_rng(2)
  variables = jax.tree.map(lambda x: 0.5 * random.normal(size=x.shape).astype("f4"), shapes)
  return conditioner, variables, captions()


@pytest.fixture(
  scope="module", params=["transformer", "lstm", "bilstm", "component", "precomputed"]
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
    ("component", (), (GROUP,)), ("precomputed", (), ()),
  ]:  # fmt: skip
    conditioner, _, batch = make(encoder)
    assert (conditioner.groups, conditioner.frozen_groups) == (trained, frozen)
    shapes = jax.eval_shape(conditioner.init, jax.random.key(0), batch)
    assert tuple(shapes.get("params", {})) == trained


def test_pooled_features_alone_are_enough():
  null = {"pooled": np.zeros((1, 6), np.float32)}
  conditioner = TextConditioner("precomputed", drop=0.5, null_embedding=null)
  batch = {"text_embedding": {"pooled": jnp.ones((20, 6))}}
  given = conditioner.with_null({}, batch)
  assert given.sequence is None and given.null.pooled.shape == (20, 6)
  dropped = conditioner({}, batch, jax.random.key(0)).pooled
  assert set(np.asarray(dropped).ravel()) == {0.0, 1.0}
  assert conditioner.batch_spec() == {"text_embedding/pooled": base.Field((6,), "float32")}


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
    ({"encoder": "precomputed"}, "empty caption"),
    ({"encoder": "bilstm", "width": 1}, "text.width=1 cannot be shared"),
  ],
)
def test_what_makes_no_conditioner_is_one_line(values, message):
  with pytest.raises(UserError, match=message):
    TextConditioner(**values)
