"""What the devices and the host do during some steps, written for XProf and Perfetto."""

import tempfile
from pathlib import Path

import jax
from etils import epath

from t2i_jax.errors import UserError


def parse_steps(text: str) -> tuple[int, int]:
  """`FIRST:LAST` as two numbers of steps done; UserError for anything else."""
  first, _, last = text.partition(":")
  if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
    raise UserError(f"--profile={text}: write FIRST:LAST, such as 100:110; steps after the 100th, "
                    "to the 110th")
  return int(first), int(last)


class Profile:
  """Records the steps after the `first` to the `last`, on every process that calls it.

    with Profile((100, 110), workdir / "profile") as profile:
      for step in steps:
        profile.at(step)
  """

  def __init__(self, steps: tuple[int, int] | None, folder: epath.Path):
    """`steps` None records nothing; what is recorded goes to `folder` in files named by host."""
    self._steps, self._folder = steps, folder
    self._local: tempfile.TemporaryDirectory | None = None

  def __enter__(self) -> "Profile":
    return self

  def __exit__(self, *exception: object) -> None:
    self._write()

  def at(self, step: int) -> None:
    """The run has given `step` steps to the devices; the last of them may be under way."""
    if self._steps is None:
      return
    if self._local is None and step == self._steps[0]:
      self._local = tempfile.TemporaryDirectory()
      jax.profiler.start_trace(self._local.name)
    elif step == self._steps[1]:
      self._write()

  def _write(self) -> None:
    if self._local is None:
      return
    self._steps = None
    jax.profiler.stop_trace()
    root = Path(self._local.name)
    for path in filter(Path.is_file, root.rglob("*")):
      there = self._folder / path.relative_to(root)
      there.parent.mkdir(parents=True, exist_ok=True)
      there.write_bytes(path.read_bytes())
    self._local.cleanup()
    self._local = None
