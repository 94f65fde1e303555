"""Which hooks of the newest saved step are done, in a file of the run: `hooks.json`.

A step is saved before its hooks run, which may take longer than what a preempted machine is given.
A run that goes on from there runs those that were not finished, and those alone.

The file is written before the save of its step begins, and again after each of the step's hooks. So
where it is of a later step than the checkpoint that is restored, the checkpoint's hooks are all
done; where it is of an earlier one, or not there, none is.
"""

import contextlib
import dataclasses
import json
from collections.abc import Sequence

from etils import epath

from t2i_jax.files import write_whole
from t2i_jax.parallel.distributed import broadcast_bytes, is_primary

NAME = "hooks.json"


@dataclasses.dataclass(frozen=True)
class Marker:
  """What stands in the file.

  Attributes:
    step: that was saved.
    done: names of its hooks that are finished.
    lines: of the step in `metrics.jsonl` when that was so; what is behind them was written by a
      hook that was not finished.
  """

  step: int
  done: tuple[str, ...]
  lines: int

  def write(self, workdir: epath.Path) -> None:
    """On the primary process only; UserError where it cannot be written."""
    write_whole(workdir / NAME, (json.dumps(dataclasses.asdict(self)) + "\n").encode())


def read(workdir: epath.Path) -> Marker | None:
  """The marker in a run's folder, the same on all processes; None where there is none to read."""
  path, content = workdir / NAME, b""
  if is_primary():
    with contextlib.suppress(FileNotFoundError):
      content = path.read_bytes()
  content = broadcast_bytes(content if is_primary() else None)
  try:
    given = json.loads(content)
    return Marker(int(given["step"]), tuple(given["done"]), int(given["lines"]))
  except (ValueError, KeyError, TypeError):  # of a run that had no hooks, or of an older version
    return None


def done_at(marker: Marker | None, step: int) -> Sequence[str] | None:
  """Names of the hooks of a restored step that are done, some of which were due; None for all."""
  if marker is None or marker.step < step:
    return ()
  return None if marker.step > step else marker.done
