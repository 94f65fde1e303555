"""What is said when orbax fails: the cause in one line, and nothing else on stderr."""

import contextlib
import gc
import logging
import sys
import time
import warnings
from collections.abc import Iterator


class _NoTracebacks(logging.Filter):
  """Drops orbax's own traceback of a failed save, which is raised as one line."""

  def filter(self, record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


logging.getLogger("absl").addFilter(_NoTracebacks())


@contextlib.contextmanager
def hushed() -> Iterator[None]:
  """Keeps off stderr what orbax's abandoned readers say after one of them has failed."""
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "root")]
  levels = [logger.level for logger in loggers]
  hook = sys.unraisablehook
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    try:
      for logger in loggers:
        logger.setLevel(logging.CRITICAL)
      sys.unraisablehook = lambda unraisable: None
      yield
    except Exception:
      time.sleep(0.2)  # the other readers end in threads of their own
      gc.collect()
      raise
    finally:
      sys.unraisablehook = hook
      for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def reason(error: BaseException) -> str:
  """The innermost cause, in about 160 characters; its end names the file."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = str(error).strip().split("\n")[0].split(" [tensorstore")[0]
  text = text if len(text) <= 160 else f"...{text[-157:]}"
  return f"{type(error).__name__}: {text}"
