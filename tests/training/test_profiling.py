import jax
import jax.numpy as jnp
import pytest
from etils import epath

from t2i_jax.errors import UserError
from t2i_jax.training.profiling import Profile, parse_steps


def test_steps():
  assert parse_steps("100:110") == (100, 110)
  for text in ("100", "5:5", "a:b", ":3", "-1:3"):
    with pytest.raises(UserError, match="write FIRST:LAST"):
      parse_steps(text)


def test_some_steps_are_recorded(tmp_path):
  work = jax.jit(lambda x: x @ x)
  with Profile((2, 4), epath.Path(tmp_path) / "a") as profile:
    for step in range(6):
      profile.at(step)
      work(jnp.ones((8, 8)))
    (trace,) = (tmp_path / "a").rglob("*.xplane.pb")
    assert trace.stat().st_size > 0
  with Profile((2, 10), epath.Path(tmp_path) / "b") as profile:  # the run ends before
    profile.at(2)
  assert list((tmp_path / "b").rglob("*.xplane.pb"))
  with Profile(None, epath.Path(tmp_path) / "c") as profile:
    profile.at(2)
  assert not (tmp_path / "c").exists()
