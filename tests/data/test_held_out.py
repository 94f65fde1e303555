"""The test part of a list of names."""

from t2i_jax.data.held_out import held_out

FILES = [f"{n}.jpg" for n in range(4000)]


def test_share():
  assert 0.03 < len(held_out(FILES, 20)) / 4000 < 0.07
  assert 0.08 < len(held_out(FILES, 10)) / 4000 < 0.12


def test_others_do_not_matter():
  assert held_out(FILES[1000:3000], 20) == held_out(FILES, 20) & set(FILES[1000:3000])


def test_at_least_one_of_twenty():
  test = held_out(FILES, 20)
  train = [file for file in FILES if file not in test]
  assert len(held_out(train[:20], 20)) == 1
  assert not held_out(train[:19], 20)
