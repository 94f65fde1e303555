import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2i_jax.text.lstm import LSTMEncoder

NETWORK = LSTMEncoder(vocab_size=20, width=6)


def caption(*lengths, padded=7):
  ids = np.random.default_rng(0).integers(1, 20, (len(lengths), padded))
  mask = np.arange(padded) < np.array(lengths)[:, None]
  return np.where(mask, ids, 0), mask


@pytest.fixture(scope="module")
def variables():
  return NETWORK.init(jax.random.key(0), *caption(3))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def test_matches_the_recurrence_written_out(variables):
  ids, mask = caption(5, 2)
  states, last = NETWORK.apply(variables, ids, mask)
  params = jax.tree.map(np.asarray, variables["params"])
  for row in range(2):
    hidden = cell = np.zeros(6)
    for token in ids[row, : mask[row].sum()]:
      x = params["tokens"]["embedding"][token]
      gates = x @ params["input"]["kernel"] + params["input"]["bias"] + hidden @ params["recurrent"]
      i, f, g, o = np.split(gates, 4)
      cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
      hidden = sigmoid(o) * np.tanh(cell)
    np.testing.assert_allclose(last[row], hidden, atol=1e-5)
    np.testing.assert_allclose(states[row, mask[row].sum() - 1], hidden, atol=1e-5)


def test_padding_changes_nothing(variables):
  ids, mask = caption(4, 6)
  states, last = NETWORK.apply(variables, ids, mask)
  garbage = np.where(mask, ids, 13)
  longer = np.pad(garbage, ((0, 0), (0, 3)), constant_values=5)
  other_states, other_last = NETWORK.apply(variables, longer, np.pad(mask, ((0, 0), (0, 3))))
  np.testing.assert_allclose(last, other_last, atol=1e-5)
  np.testing.assert_allclose(states, other_states[:, :7], atol=1e-5)
  assert np.all(np.asarray(other_states)[~np.pad(mask, ((0, 0), (0, 3)))] == 0)


def test_every_valid_token_reaches_the_last_state(variables):
  ids, mask = caption(7)
  embedded = variables["params"]["tokens"]["embedding"]

  def last(embedding):
    params = {**variables["params"], "tokens": {"embedding": embedding}}
    return jnp.sum(NETWORK.apply({"params": params}, ids, mask)[1] ** 2)

  reached = np.abs(jax.grad(last)(embedded)).sum(axis=1) > 0
  assert set(np.flatnonzero(reached)) == set(ids[0])


def test_a_caption_without_tokens_has_a_zero_state(variables):
  _, last = NETWORK.apply(variables, *caption(0, 3))
  assert np.all(np.asarray(last[0]) == 0) and np.any(np.asarray(last[1]) != 0)


def test_forget_gate_starts_open(variables):
  bias = variables["params"]["input"]["bias"].reshape(4, 6)
  np.testing.assert_array_equal(bias, np.array([0, 1, 0, 0])[:, None] * np.ones(6))


def test_both_directions_are_two_readers_side_by_side():
  ids, mask = caption(5, 2)
  network = LSTMEncoder(vocab_size=20, width=6, bidirectional=True)
  variables = network.init(jax.random.key(1), ids, mask)
  states, last = network.apply(variables, ids, mask)
  params = variables["params"]
  assert params["recurrent"].shape == params["recurrent_reverse"].shape == (3, 12)

  def one_way(suffix, ids):
    x = params["tokens"]["embedding"][ids] @ params[f"input{suffix}"]["kernel"]
    hidden = cell = np.zeros(3)
    for given in x + params[f"input{suffix}"]["bias"]:
      i, f, g, o = np.split(given + hidden @ params[f"recurrent{suffix}"], 4)
      cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
      hidden = sigmoid(o) * np.tanh(cell)
    return hidden

  for row, length in enumerate((5, 2)):
    valid = ids[row, :length]
    expected = np.concatenate([one_way("", valid), one_way("_reverse", valid[::-1])])
    np.testing.assert_allclose(last[row], expected, atol=1e-5)
    np.testing.assert_allclose(states[row, length - 1, :3], expected[:3], atol=1e-5)
    np.testing.assert_allclose(states[row, 0, 3:], expected[3:], atol=1e-5)
    assert not np.any(states[row, length:])
