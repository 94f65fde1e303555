"""An LSTM text encoder, in one direction or both, trained with the model that it feeds."""

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array


class LSTMEncoder(nn.Module):
  """One LSTM layer over token ids (Hochreiter and Schmidhuber 1997; Gers et al. 2000).

  Padding is skipped as in a packed sequence: the state stops at the last valid
  token, whatever the length to which captions are padded. Gates are in the
  order input, forget, cell, output; each has one bias, the sum of the two that
  some libraries keep, and the forget gate's starts at one.

  Attributes:
    vocab_size: of the tokenizer.
    width: of the embeddings and of the state.
    bidirectional: half of the state reads the caption from its start, half from
      its end (Schuster and Paliwal 1997), as AttnGAN's encoder (Xu et al. 2018,
      section 3.1.1). What a caption begins with is then not forgotten.
    dtype: type of the computation; the cell state is kept in float32.
  """

  vocab_size: int
  width: int = 128
  bidirectional: bool = False
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: Array, mask: Array) -> tuple[Array, Array]:
    """ids int [B, L], mask bool [B, L] -> states [B, L, width], last state [B, width].

    The last state of the half that reads backwards is that at the first token.
    States at masked positions are zero, and so is the last state of a row
    without any valid token.
    """
    # Unit variance, as for the transformer: with less, words that matter little at first are lost.
    embed = nn.Embed(
      self.vocab_size, self.width, embedding_init=nn.initializers.normal(1.0), name="tokens"
    )
    x = embed(ids).astype(self.dtype)
    if not self.bidirectional:
      return self._read(x, mask, self.width)
    half = self.width // 2
    parts = self._read(x, mask, half), self._read(x, mask, self.width - half, "_reverse")
    states, last = zip(*parts, strict=True)
    return jnp.concatenate(states, axis=-1), jnp.concatenate(last, axis=-1)

  def _read(self, x: Array, mask: Array, width: int, suffix: str = "") -> tuple[Array, Array]:
    """One direction; with the suffix `_reverse` from the end to the start."""
    # The inputs' share of the gates does not depend on the state: one product for all tokens.
    gates = nn.Dense(4 * width, dtype=self.dtype, bias_init=_forget_one, name=f"input{suffix}")(x)
    recurrent = self.param(
      f"recurrent{suffix}", nn.initializers.orthogonal(), (width, 4 * width)
    ).astype(self.dtype)

    def step(carry: tuple[Array, Array], token: tuple[Array, Array]):
      hidden, cell = carry
      given, valid = token
      i, f, g, o = jnp.split((given + hidden @ recurrent).astype(jnp.float32), 4, axis=-1)
      new_cell = nn.sigmoid(f) * cell + nn.sigmoid(i) * jnp.tanh(g)
      new_hidden = (nn.sigmoid(o) * jnp.tanh(new_cell)).astype(self.dtype)
      valid = valid[:, None]
      carry = jnp.where(valid, new_hidden, hidden), jnp.where(valid, new_cell, cell)
      return carry, jnp.where(valid, new_hidden, 0)

    start = jnp.zeros((len(x), width))
    (last, _), states = jax.lax.scan(
      step, (start.astype(self.dtype), start), (gates.swapaxes(0, 1), mask.T),
      reverse=bool(suffix),
    )
    return states.swapaxes(0, 1), last


def _forget_one(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
  """Zero, and one for the forget gate, the second of four (Jozefowicz et al. 2015)."""
  del key
  return jnp.zeros((4, shape[0] // 4), dtype).at[1].set(1.0).reshape(shape)
