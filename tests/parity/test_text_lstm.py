"""Our LSTM against PyTorch's, on captions of unequal lengths, through our key map."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the reference needs torch: install t2i_jax[parity]")

from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence  # noqa: E402

from t2i_jax.text.lstm import LSTMEncoder  # noqa: E402
from t2i_jax.weights.stored import Stored  # noqa: E402
from t2i_jax.weights.text_encoders import LSTM  # noqa: E402

WIDTH, LENGTHS, PADDED = 12, (7, 3, 1, 5), 9


class Reference(torch.nn.Module):
  """AttnGAN's text encoder, by its names."""

  def __init__(self, bidirectional):
    super().__init__()
    hidden = WIDTH // 2 if bidirectional else WIDTH
    self.encoder = torch.nn.Embedding(20, WIDTH)
    self.rnn = torch.nn.LSTM(WIDTH, hidden, batch_first=True, bidirectional=bidirectional)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_states_are_those_of_a_packed_sequence(bidirectional):
  random = np.random.default_rng(0)
  ids = random.integers(1, 20, (len(LENGTHS), PADDED))
  mask = np.arange(PADDED) < np.array(LENGTHS)[:, None]
  reference = Reference(bidirectional)
  with torch.no_grad():
    for value in reference.parameters():
      value.copy_(torch.from_numpy(0.5 * random.normal(size=value.shape)))
  tensors = {k: v.detach().numpy() for k, v in reference.state_dict().items()}

  network = LSTMEncoder(vocab_size=20, width=WIDTH, bidirectional=bidirectional)
  abstract = jax.eval_shape(network.init, jax.random.key(0), ids, mask)["params"]
  stored = {k: Stored(v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()}
  params = LSTM.load(stored, abstract, source="the reference")
  states, last = network.apply({"params": params}, ids, mask)

  embedded = reference.encoder(torch.from_numpy(ids))
  packed = pack_padded_sequence(embedded, LENGTHS, batch_first=True, enforce_sorted=False)
  expected, (hidden, _) = reference.rnn(packed)
  expected, _ = pad_packed_sequence(expected, batch_first=True, total_length=PADDED)
  # Both are zero at padding.
  np.testing.assert_allclose(states, expected.detach(), atol=1e-5)
  np.testing.assert_allclose(
    last, np.concatenate(list(hidden.detach().numpy()), axis=-1), atol=1e-5
  )
  # And back: one of the two biases holds their sum.
  back = {name: read() for name, (_, _, read) in LSTM.save(params).items()}
  assert set(back) == set(tensors)
  for name, value in back.items():
    if "bias" not in name:
      assert value.tobytes() == tensors[name].tobytes()
    elif "_hh" in name:
      assert not value.any()
