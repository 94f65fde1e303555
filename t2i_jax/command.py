"""What every command does the same: flags that teach, errors in one line."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from t2i_jax.errors import UserError, exit_with, unknown

CACHE = "T2I_CACHE"


class _Parser(argparse.ArgumentParser):
  """Names the nearest flag for one that does not exist."""

  def parse_args(self, args=None, namespace=None):
    flags, rest = self.parse_known_args(args, namespace)
    for word in rest:
      raise unknown("flag", word.partition("=")[0], self._option_string_actions)
    return flags

  def error(self, message: str):
    raise UserError(f"{message}; see python -m {self.prog} --help")


def parser(name: str, purpose: str, *examples: str) -> argparse.ArgumentParser:
  """A parser whose help shows what the command is for and lines to type."""
  return _Parser(
    prog=name,
    description=purpose,
    epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )


def run(parser: argparse.ArgumentParser, argv: list[str] | None,
        action: Callable[[argparse.Namespace], None]) -> None:
  """Parses and acts; what the user or the machine did becomes one line and exit status 2."""
  try:
    action(parser.parse_args(argv))
  except UserError as error:
    exit_with(error)
  except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)
  except BrokenPipeError:
    sys.exit(1)
  except OSError as error:
    exit_with(UserError(f"cannot read or write {error.filename or 'a file'}: "
                        f"{error.strerror or error}; check its permissions and the space left"))
  except Exception as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    exit_with(UserError(
      "the devices' memory does not hold this: use a smaller batch (train.batch_size, or "
      "--batch-size), more microbatches (train.accumulate) or more devices (mesh.fsdp); "
      f"{str(error).splitlines()[0][:200]}"
    ))


def split_settings(argv: Sequence[str] | None) -> tuple[list[str], list[str]]:
  """The `KEY=VALUE` of all `--config.KEY=VALUE` or `--config.KEY VALUE`, and the other words."""
  words, settings, rest = list(sys.argv[1:] if argv is None else argv), [], []
  while words:
    word = words.pop(0)
    if not word.startswith("--config."):
      rest.append(word)
      continue
    setting = word.removeprefix("--config.")
    if "=" not in setting and words and not words[0].startswith("--"):
      setting = f"{setting}={words.pop(0)}"
    settings.append(setting)
  return settings, rest


def overrides(settings: Sequence[str]) -> dict[str, str]:
  """Values by key of settings `KEY=VALUE`; UserError for one without a value or given twice."""
  values: dict[str, str] = {}
  for setting in settings:
    key, equals, value = setting.partition("=")
    if not equals:
      raise UserError(f"--config.{key} has no value; write --config.{key}=VALUE")
    if key in values:
      raise UserError(f"--config.{key} is given twice")
    values[key] = value
  return values


def set_up_jax() -> None:
  """Joins other processes, and keeps compiled programs on disk between commands.

  The cache lies in $T2I_CACHE, else in the user's cache directory. Programs
  compiled on several hosts are not written: each would write the same files.
  """
  import jax

  from t2i_jax.parallel import distributed
  from t2i_jax.parallel.host_memory import keep_freed_memory

  distributed.initialize()
  try:
    platform = jax.devices()[0].platform
  except (RuntimeError, AssertionError) as error:  # jax asserts that some platform was found
    platforms = os.environ.get("JAX_PLATFORMS", "")
    raise UserError(f"no devices for JAX_PLATFORMS='{platforms}'; unset it, or install jax for "
                    f"them: {error}") from error
  if platform == "cpu":
    keep_freed_memory()
  folder = cache_directory() / "compiled"
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError:
    return  # A cache is a convenience: without one, programs are compiled again.
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def cache_directory() -> Path:
  """Where this project keeps what it can make again."""
  if os.environ.get(CACHE):
    return Path(os.environ[CACHE])
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "t2i_jax"
