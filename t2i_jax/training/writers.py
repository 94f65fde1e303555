"""Where metrics go: a JSON-lines file always, TensorBoard when asked for, and the terminal."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from etils import epath
from tqdm import tqdm

from t2i_jax.errors import UserError
from t2i_jax.parallel.distributed import is_primary


class MetricWriter(Protocol):
  """One destination of metrics."""

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes named numbers of one step."""

  def images(self, step: int, name: str, images: np.ndarray) -> None:
    """Writes pictures, uint8 [H,W,3] or [n,H,W,3]."""

  def text(self, step: int, name: str, text: str) -> None:
    """Writes a named text."""

  def truncate_after(self, step: int, lines: int | None = None) -> None:
    """Forgets what was written for steps after `step`, and for `step` what is behind its first
    `lines` writes; called before the first write."""

  def flush(self) -> None:
    """Makes sure that what was written is there when the process is killed."""

  def close(self) -> None:
    """Flushes and releases files."""


class JsonLines:
  """`metrics.jsonl`: a line `{"step": 100, "time": 1.7e9, "loss": 0.5}` a write.

  A value that is not finite is null, so that every line is valid JSON. Pictures are not written.

  On a store such as `gs://`, where nothing can be appended to, the file is written again as a
  whole: at most once in `SECONDS`, when it is flushed and at the end.
  """

  SECONDS = 60.0

  def __init__(self, path: str | epath.PathLike):
    self.path = epath.Path(path)
    self._file: Any = None
    self._remote = "://" in os.fspath(self.path)
    self._lines: list[str] | None = None  # of a remote file, with those that are not yet there
    self._unsent, self._written = False, -math.inf
    self._last = (-1, 0)  # the step that was written last, and how many lines it has

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._write(step, {name: _json_number(value) for name, value in values.items()})

  def images(self, step: int, name: str, images: np.ndarray) -> None:
    pass

  def text(self, step: int, name: str, text: str) -> None:
    self._write(step, {name: text})

  def lines(self, step: int) -> int:
    """How many lines there are of the newest step; 0 for a later one."""
    return self._last[1] if self._last[0] == step else 0

  def truncate_after(self, step: int, lines: int | None = None) -> None:
    """Keeps the lines of steps up to `step`, and of its own the first `lines`, all if None; half a
    line that a killed run left is dropped too."""
    self.close()
    if not self.path.exists():
      return
    kept = [line for line in self.path.read_text().splitlines() if _step_of(line) <= step]
    of_step = [n for n, line in enumerate(kept) if _step_of(line) == step]
    if lines is not None and len(of_step) > lines:
      dropped = set(of_step[lines:])
      kept = [line for n, line in enumerate(kept) if n not in dropped]
    self._last = (step, len(of_step) if lines is None else min(lines, len(of_step)))
    if self._remote:
      self._lines, self._unsent = kept, True
      return
    beside = self.path.with_name(self.path.name + ".tmp")
    beside.write_text("".join(f"{line}\n" for line in kept))
    beside.replace(self.path)

  def flush(self) -> None:
    if self._unsent:
      self._upload()

  def close(self) -> None:
    self.flush()
    if self._file is not None:
      self._file.close()
      self._file = None

  def _upload(self) -> None:
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self.path.write_text("".join(f"{line}\n" for line in self._lines))
    self._unsent, self._written = False, time.monotonic()

  def _write(self, step: int, values: dict[str, Any]) -> None:
    line = json.dumps({"step": int(step), "time": round(time.time(), 3), **values})
    self._last = (int(step), self.lines(int(step)) + 1)
    try:
      if self._remote:
        self._lines, self._unsent = [*(self._lines or ()), line], True
        if time.monotonic() - self._written >= self.SECONDS:
          self._upload()
        return
      if self._file is None:
        self._file = self.path.open("a")
      self._file.write(line + "\n")
      self._file.flush()
    except OSError as error:
      raise UserError(f"cannot write metrics to {self.path} ({error.strerror or error}): free disk"
                      " space or make it writable, then start again") from error


class TensorBoard:
  """TensorBoard event files in a folder, written by tensorboardX."""

  def __init__(self, directory: str | epath.PathLike):
    """Raises UserError when tensorboardX is not installed."""
    try:
      import tensorboardX
    except ImportError as error:
      raise UserError("TensorBoard was asked for and tensorboardX is not installed:"
                      " pip install tensorboardX, or turn it off") from error
    self._open: Callable[..., Any] = tensorboardX.SummaryWriter
    self._directory = os.fspath(directory)
    self._purge_step: int | None = None
    self._writer: Any = None

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._events().add_scalar(name, float(value), step)

  def images(self, step: int, name: str, images: np.ndarray) -> None:
    layout = "HWC" if images.ndim == 3 else "NHWC"
    self._events().add_images(name, images, step, dataformats=layout)

  def text(self, step: int, name: str, text: str) -> None:
    self._events().add_text(name, text, step)

  def truncate_after(self, step: int, lines: int | None = None) -> None:
    """TensorBoard then hides the events of later steps; the old files stay."""
    self._purge_step = step + 1

  def flush(self) -> None:
    if self._writer is not None:
      self._writer.flush()

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()

  def _events(self) -> Any:
    if self._writer is None:
      self._writer = self._open(self._directory, purge_step=self._purge_step)
    return self._writer


class Terminal:
  """One line on stderr a write, above the progress bar if there is one."""

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    say(f"step {step}: " + ", ".join(f"{name} {value:.5g}" for name, value in values.items()))

  def images(self, step: int, name: str, images: np.ndarray) -> None:
    pass

  def text(self, step: int, name: str, text: str) -> None:
    say(f"step {step}: {name}: {text}")

  def truncate_after(self, step: int, lines: int | None = None) -> None:
    pass

  def flush(self) -> None:
    pass

  def close(self) -> None:
    pass


class Writers:
  """All destinations of a run in one; on hosts other than the primary one it writes nothing."""

  def __init__(self, workdir: str | epath.PathLike, primary: bool, tensorboard: bool = False):
    """Writes `metrics.jsonl`, and `tensorboard/` if asked, into `workdir`, which is created.

    Raises:
      UserError: `workdir` cannot be created, or tensorboardX is missing.
    """
    self._writers: list[MetricWriter] = []
    if not primary:
      return
    workdir = epath.Path(workdir)
    try:
      workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise UserError(f"cannot create {workdir} ({error.strerror or error}):"
                      " choose a working directory that can be written") from error
    self._writers = [JsonLines(workdir / "metrics.jsonl"), Terminal()]
    if tensorboard:
      self._writers.append(TensorBoard(workdir / "tensorboard"))

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    for writer in self._writers:
      writer.scalars(step, values)

  def images(self, step: int, name: str, images: np.ndarray) -> None:
    """uint8 [H,W,3] or [n,H,W,3]."""
    for writer in self._writers:
      writer.images(step, name, images)

  def text(self, step: int, name: str, text: str) -> None:
    for writer in self._writers:
      writer.text(step, name, text)

  def lines(self, step: int) -> int:
    """How many lines `metrics.jsonl` has of the newest step."""
    return next((w.lines(step) for w in self._writers if isinstance(w, JsonLines)), 0)

  def truncate_after(self, step: int, lines: int | None = None) -> None:
    """After a restore of `step` and before any write: each step then appears once.

    Args:
      step: that was restored.
      lines: of that step in `metrics.jsonl` that stand; None for all of them.
    """
    for writer in self._writers:
      writer.truncate_after(step, lines)

  def flush(self) -> None:
    """Before a checkpoint, so that a run that goes on from it has all the lines before it."""
    for writer in self._writers:
      writer.flush()

  def close(self) -> None:
    for writer in self._writers:
      writer.close()

  def __enter__(self) -> "Writers":
    return self

  def __exit__(self, *exception: Any) -> None:
    self.close()


class Progress:
  """A progress bar with the time left, steps a second and the loss.

  Where stderr is not a terminal, a line every `interval` seconds instead.
  """

  def __init__(self, total: int, initial: int, *, enabled: bool = True, interval: float = 30.0,
               stream: Any = None, clock: Callable[[], float] = time.monotonic):
    """Args:
      total: the run's last step.
      initial: the step it starts from.
      enabled: false on hosts other than the primary one.
      interval: seconds between lines where there is no terminal.
      stream: stderr unless given.
      clock: seconds, for the lines.
    """
    self._total, self._step = total, initial
    self._stream = stream if stream is not None else sys.stderr
    self._enabled, self._interval, self._clock = enabled, interval, clock
    self._line_step, self._line_time = initial, clock()
    self._bar = None
    if enabled and self._stream.isatty():
      self._bar = tqdm(total=total, initial=initial, unit="step", file=self._stream,
                       dynamic_ncols=True)

  def update(self, step: int, loss: float | None = None) -> None:
    """Shows that `step` steps are done; `loss` stays as it was when None."""
    if self._bar is not None:
      if loss is not None:
        self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
      self._bar.update(step - self._step)
    elif self._enabled and self._clock() - self._line_time >= self._interval:
      now = self._clock()
      rate = (step - self._line_step) / (now - self._line_time)
      parts = [f"step {step}/{self._total} ({step / max(self._total, 1):.1%})",
               f"{rate:.3g} steps/s"]
      if rate > 0:
        parts.append(f"{tqdm.format_interval((self._total - step) / rate)} left")
      if loss is not None:
        parts.append(f"loss {loss:.4g}")
      print(", ".join(parts), file=self._stream, flush=True)
      self._line_step, self._line_time = step, now
    self._step = step

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def say(line: str) -> None:
  """Prints a line on stderr without tearing a progress bar."""
  tqdm.write(line, file=sys.stderr)


def tell(line: str) -> None:
  """`say`, on the first host alone."""
  if is_primary():
    say(line)


def _json_number(value: Any) -> float | int | None:
  if isinstance(value, int):
    return value
  value = float(value)
  return value if math.isfinite(value) else None


def _step_of(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError, TypeError):
    return math.inf
