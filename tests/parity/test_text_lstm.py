"""Our LSTM text encoder against torch's, on packed captions of unequal lengths."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

from t2i_jax.text.lstm import LSTMEncoder  # noqa: E402

WIDTH, LENGTHS, PADDED = 12, (7, 3, 1, 5), 9


@pytest.mark.parametrize("bidirectional", [False, True])
def test_states_are_those_of_a_packed_sequence(bidirectional):
  random = np.random.default_rng(0)
  ids = random.integers(1, 20, (len(LENGTHS), PADDED))
  mask = np.arange(PADDED) < np.array(LENGTHS)[:, None]
  network = LSTMEncoder(vocab_size=20, width=WIDTH, bidirectional=bidirectional)
  shapes = jax.eval_shape(network.init, jax.random.key(0), ids, mask)
  params = jax.tree.map(lambda x: 0.5 * random.normal(size=x.shape).astype("f4"), shapes)["params"]
  states, last = network.apply({"params": params}, ids, mask)

  hidden_size = WIDTH // 2 if bidirectional else WIDTH
  lstm = torch.nn.LSTM(WIDTH, hidden_size, batch_first=True, bidirectional=bidirectional)
  with torch.no_grad():
    # Both keep the gates in the order input, forget, cell, output; torch has two biases.
    for suffix in ("", "_reverse")[: 1 + bidirectional]:
      for name, value in {
        "weight_ih_l0": params[f"input{suffix}"]["kernel"].T,
        "weight_hh_l0": params[f"recurrent{suffix}"].T,
        "bias_ih_l0": params[f"input{suffix}"]["bias"],
        "bias_hh_l0": np.zeros(4 * hidden_size, np.float32),
      }.items():
        getattr(lstm, name + suffix).copy_(torch.from_numpy(np.ascontiguousarray(value)))
    embedded = torch.from_numpy(params["tokens"]["embedding"][ids])
    packed = pack_padded_sequence(embedded, LENGTHS, batch_first=True, enforce_sorted=False)
    expected, (hidden, _) = lstm(packed)
    expected, _ = pad_packed_sequence(expected, batch_first=True, total_length=PADDED)

  # Both are zero at padding.
  np.testing.assert_allclose(states, expected, atol=1e-5)
  np.testing.assert_allclose(last, np.concatenate(list(hidden), axis=-1), atol=1e-5)
