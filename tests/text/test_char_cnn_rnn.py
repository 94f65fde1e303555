"""The character CNN-RNN against the same in numpy, letter by letter.

Against martinduartemore/char_cnn_rnn_pytorch, with random weights through our key maps and files of
torch.save, one caption at a time (its gated unit mixes the captions of a batch): largest difference
over largest value 5e-7 for the cvpr model, 5e-7 for flowers, 6e-7 for birds. Checked by hand.
"""

import jax
import numpy as np
import pytest

from t2i_jax.text.char_cnn_rnn import ALPHABET, MODELS, CharCNNRNN, Config, encode


def test_letters():
  text = encode(["a Z-é", "b" * 300])
  assert len(ALPHABET) == 70 and text["ids"].shape == (2, 201)
  first = text["ids"][0]
  # Lower case; the hyphen's last place; what is not in the alphabet is a space, its last letter.
  assert first[:6].tolist() == [1, 70, 26, ALPHABET.rindex("-") + 1, 70, 0]
  assert text["mask"].sum(axis=1).tolist() == [5, 201]


def conv(x, kernel, bias, pool):
  y = sum(x[i : len(x) - 3 + i] @ kernel[i] for i in range(4)) + bias
  y = np.where(y > 1e-6, y, 0)
  if pool:
    size, stride = pool
    y = np.stack([y[i : i + size].max(0) for i in range(0, len(y) - size + 1, stride)])
  return y


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


@pytest.mark.parametrize("config", [
  Config(6, False, True, 5, (8, 7)), Config(6, True, False, 5, (8, 7)),
], ids=["plain", "gated"])  # fmt: skip
def test_one_caption_by_hand(config):
  ids = encode(["a small bird with a blue, round crown"] * 2)["ids"]
  network = CharCNNRNN(config)
  shapes = jax.eval_shape(network.init, jax.random.key(0), ids)
  random = np.random.default_rng(0)
  variables = jax.tree.map(lambda x: 0.5 * random.normal(size=x.shape).astype("f4"), shapes)
  p = variables["params"]
  x = np.eye(71, dtype=np.float32)[ids[0]][:, 1:]
  for i, pool in ((1, (3, 3)), (2, (3, 3)), (3, (3, 2) if config.shorten else None)):
    x = conv(x, p[f"conv_{i}"]["kernel"], p[f"conv_{i}"]["bias"], pool)
  assert len(x) == (8 if config.shorten else 18)
  given = lambda gate, row: row @ p[f"input{gate}"]["kernel"] + p[f"input{gate}"]["bias"]  # noqa: E731
  held = lambda gate, h: h @ p[f"state{gate}_kernel"] + p[f"state{gate}_bias"]  # noqa: E731
  states = []
  for row in x:
    if not states:
      states.append(np.tanh(given("", row)) if config.gated else np.maximum(given("", row), 0))
      continue
    h = states[-1]
    if config.gated:
      update, reset = (sigmoid(given(g, row) + held(g, h)) for g in ("_update", "_reset"))
      states.append(update * np.tanh(given("", row) + held("", reset * h)) + (1 - update) * h)
    else:
      states.append(np.maximum(given("", row) + held("", h), 0))
  expected = np.mean(states, axis=0) @ p["projection"]["kernel"] + p["projection"]["bias"]
  found = network.apply(variables, ids)
  np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
  np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_published_sizes():
  for name, width, states in (("cvpr", 256, 2), ("flowers", 512, 2), ("birds", 512, 6)):
    shapes = jax.eval_shape(CharCNNRNN(MODELS[name]).init, jax.random.key(0), encode(["a"])["ids"])
    convolutions = 4 * (70 * 384 + 384 * 512 + 512 * width) + 384 + 512 + width
    expected = convolutions + states * (width + 1) * width + (width + 1) * 1024
    assert sum(x.size for x in jax.tree.leaves(shapes)) == expected
