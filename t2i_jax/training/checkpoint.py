"""Checkpoints of a run: asynchronous, sharded, and restorable onto other devices.

The only module that touches orbax. Layout of a run's checkpoint directory:

  state/<step>/   the training state and its JSON meta, written beside and renamed when whole
  frozen/0/       the frozen parameter groups, stored once for the run
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from t2i_jax.errors import UserError
from t2i_jax.training.orbax_errors import hushed, reason

_TREE, _ABOUT = "tree", "about"  # the two items of a stored step
_SHOWN = 3  # differences named in one error line


class Checkpoints:
  """The checkpoints of one run.

  At most one save is under way; a second `save` waits for the first. Every method is called on all
  hosts, from the main thread. An error of a background save is raised by the next call.

  Attributes:
    directory: where they are stored (any path that etils.epath knows, `gs://` included).
  """

  def __init__(self, directory: str | epath.PathLike, *, keep_last: int = 2,
               keep_every: int | None = None, read_only: bool = False):
    """Opens a directory of checkpoints.

    Args:
      directory: created unless `read_only`.
      keep_last: how many of the newest checkpoints are kept.
      keep_every: checkpoints at multiples of this step are kept for good.
      read_only: another run's directory: nothing in it is created, cleaned or deleted.

    Raises:
      UserError: the directory cannot be created, or does not exist and `read_only` is set.
    """
    self.directory = _absolute(directory)
    if read_only and not (self.directory / "state").exists():
      raise UserError(f"no checkpoints in {self.directory}: give the checkpoint directory of a run"
                      " that saved at least once")
    self._read_only = read_only
    self._keep_last, self._keep_every = keep_last, keep_every
    self._states = _Series(self.directory / "state", self._outdated, clean=not read_only)
    self._frozen: _Series | None = None

  def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
    """Saves `state` in the background; its buffers may be donated as soon as this returns.

    A step that is already stored is left as it is.

    Args:
      step: training step of `state`.
      state: pytree of jax arrays.
      meta: JSON values that belong to this step (data position, config hash, versions).

    Raises:
      UserError: this save could not start, or an earlier one failed.
    """
    if step not in self._states.steps():
      self._states.save(step, state, meta)

  def check(self) -> None:
    """Raises the error of a background save that has failed; never waits."""
    self._states.check()

  def wait(self) -> None:
    """Waits for the save under way; raises UserError if it failed."""
    self._states.wait()

  def steps(self) -> list[int]:
    """Steps of all whole checkpoints, ascending."""
    return self._states.steps()

  def latest_step(self) -> int | None:
    """The newest whole checkpoint's step; what a killed save left behind does not count."""
    return max(self._states.steps(), default=None)

  def meta(self, step: int) -> dict[str, Any]:
    """The JSON meta saved with `step`.

    Raises:
      UserError: no such step, or it cannot be read.
    """
    return self._states.description(step)["meta"]

  def restore(self, step: int, abstract_state: Any) -> Any:
    """Loads a state onto the shardings of a target, whatever devices and hosts saved it.

    Args:
      step: a stored step.
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings; its types are kept.

    Raises:
      UserError: no such step; another tree, shape or dtype; or missing or damaged files. The run
        never falls back to an older checkpoint by itself.
    """
    return self._states.restore(step, abstract_state)

  def has_frozen(self) -> bool:
    """Whether the frozen groups are stored."""
    return (self.directory / "frozen").exists() and bool(self._frozen_series().steps())

  def save_frozen(self, tree: Any, meta: Mapping[str, Any]) -> None:
    """Stores the frozen groups, waiting until they are whole; does nothing if they are stored.

    Args:
      tree: pytree of jax arrays; an empty one is not stored.
      meta: JSON values that say what they are.
    """
    if not jax.tree.leaves(tree) or self._frozen_series().steps():
      return
    self._frozen_series().save(0, tree, meta)
    self._frozen_series().wait()

  def describe_frozen(self) -> tuple[dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
    """The meta of the stored frozen groups, and their arrays' shapes by "/"-joined path."""
    about = self._frozen_series().description(0)
    return about["meta"], {name: _spec(text) for name, text in about["leaves"].items()}

  def restore_frozen(self, abstract: Any) -> Any:
    """Loads the frozen groups onto the shardings of `abstract`; errors as `restore`."""
    if not jax.tree.leaves(abstract):
      return abstract
    if not self.has_frozen():
      raise UserError(f"no frozen groups in {self.directory / 'frozen'}: the folder is incomplete;"
                      " restore it from a copy")
    return self._frozen_series().restore(0, abstract)

  def close(self) -> None:
    """Waits for the save under way, raising UserError if it failed, and releases threads."""
    with contextlib.ExitStack() as stack:
      if self._frozen is not None:
        stack.callback(self._frozen.close)
      stack.callback(self._states.close)

  def _frozen_series(self) -> "_Series":
    if self._frozen is None:
      self._frozen = _Series(self.directory / "frozen", lambda steps: [],
                             clean=not self._read_only)
    return self._frozen

  def _outdated(self, steps: list[int]) -> list[int]:
    return [step for step in steps[:-self._keep_last]
            if not (self._keep_every and step % self._keep_every == 0)]


def _absolute(path: str | epath.PathLike) -> epath.Path:
  """Orbax reads from absolute paths only; those with a scheme, such as `gs://`, are."""
  path = os.fspath(epath.Path(path))
  return epath.Path(path if "://" in path else os.path.abspath(path))


class _Series:
  """One folder of numbered orbax checkpoints, with orbax's errors turned into UserErrors."""

  def __init__(self, directory: epath.Path, outdated: Callable[[list[int]], list[int]],
               clean: bool):
    """`outdated` picks, among whole steps, those to delete after a save."""
    self.directory = directory
    self._outdated = outdated
    self._deleted: set[int] = set()
    self._saving: tuple[int, Any] | None = None
    self._failure: UserError | None = None  # orbax saves nothing more after a failed save
    context = ocp.Context()
    context.checkpointables.registry = ocp.handlers.local_registry()
    context.checkpointables.registry.add(ocp.handlers.JsonHandler, checkpointable_name=_ABOUT)
    try:
      self._checkpointer = ocp.training.Checkpointer(
        directory, context=context, cleanup_tmp_directories=clean)
    except OSError as error:
      raise UserError(f"cannot open the checkpoint directory {directory} ({reason(error)}):"
                      " choose one that can be written") from error

  def save(self, step: int, tree: Any, meta: Mapping[str, Any]) -> None:
    self.wait()
    if self._failure is not None:
      raise self._failure
    about = {"meta": dict(meta), "leaves": _leaves(tree)}
    with self._explain_failed_save(step):
      response = self._checkpointer.save_checkpointables_async(
        step, {_TREE: tree, _ABOUT: about}, force=True)
      self._saving = step, response

  def check(self) -> None:
    if self._saving is None:
      return
    step, response = self._saving
    with self._explain_failed_save(step):
      try:
        response.result(timeout=0)
      except TimeoutError:
        return
    self._saving = None
    self._delete_outdated()

  def wait(self) -> None:
    if self._saving is None:
      return
    (step, response), self._saving = self._saving, None
    with self._explain_failed_save(step):
      response.result()
    self._delete_outdated()

  def _delete_outdated(self) -> None:
    """Deletes in two moves, so that a kill between them leaves no half checkpoint that looks whole.

    orbax's own deletion does leave one.
    """
    for step in self._outdated(self.steps()):
      self._deleted.add(step)
      if jax.process_index() != 0:
        continue
      path = self.directory / str(step)
      if str(path).startswith("gs://"):  # nothing can be renamed there: this file marks it as whole
        (path / "commit_success.txt").unlink()
      else:
        path = path.rename(path.with_name(f"{step}.orbax-checkpoint-tmp"))
      path.rmtree()

  @contextlib.contextmanager
  def _explain_failed_save(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:
      self._saving = None
      last = max(self.steps(), default=None)
      kept = (f"the checkpoint of step {last} is intact and what came after it is lost"
              if last is not None else "there is no earlier checkpoint, so all progress is lost")
      why = reason(error)
      cure = "free disk space" if "space" in why.lower() else "make it writable"
      self._failure = UserError(f"saving step {step} to {self.directory} failed ({why}): {kept};"
                                f" {cure} and start again")
      raise self._failure from error

  def steps(self) -> list[int]:
    self.wait()
    steps = (checkpoint.step for checkpoint in self._checkpointer.checkpoints)
    return [step for step in steps if step not in self._deleted]

  def description(self, step: int) -> dict[str, Any]:
    """{"meta": as saved, "leaves": {name: dtype and shape}}."""
    with self._explain_unreadable(step):
      about = self._checkpointer.load_checkpointables(step, {_ABOUT: None})[_ABOUT]
      return {"meta": about["meta"], "leaves": about["leaves"]}

  def restore(self, step: int, abstract: Any) -> Any:
    for path, leaf in jax.tree.leaves_with_path(abstract):
      if leaf.sharding is None:
        raise ValueError(f"the restore target has no sharding at {jax.tree_util.keystr(path)}")
    difference = _difference(self.description(step)["leaves"], _leaves(abstract))
    if difference:
      raise UserError(f"checkpoint {self.directory / str(step)} does not fit this run:"
                      f" {difference}; use the config that wrote it, or another directory")
    with self._explain_unreadable(step):
      return self._checkpointer.load_checkpointables(step, {_TREE: abstract})[_TREE]

  @contextlib.contextmanager
  def _explain_unreadable(self, step: int) -> Iterator[None]:
    steps = self.steps()
    if step not in steps:
      raise UserError(f"no checkpoint of step {step} in {self.directory};"
                      f" stored: {', '.join(map(str, steps)) or 'none'}")
    try:
      with hushed():
        yield
    except Exception as error:
      if "RESOURCE_EXHAUSTED" in str(error):
        raise  # the machine's fault, not the file's
      earlier = [s for s in steps if s < step]
      cure = f"to go on from step {earlier[-1]}" if earlier else "to start from scratch"
      raise UserError(f"checkpoint {self.directory / str(step)} cannot be read, its files are"
                      f" missing or damaged ({reason(error)}): restore it from a copy,"
                      f" or delete it {cure}") from error

  def close(self) -> None:
    self.wait()
    if self._failure is None:  # else it has been raised, and orbax would raise it again
      self._checkpointer.close()


def _difference(saved: dict[str, str], wanted: dict[str, str]) -> str:
  """What differs between the leaves of a checkpoint and of a target, or an empty string."""
  changed = {name for name in saved.keys() & wanted.keys() if saved[name] != wanted[name]}
  parts = [_some("it lacks ", wanted.keys() - saved.keys()),
           _some("it has besides ", saved.keys() - wanted.keys()),
           _some("", changed, lambda name: f" is {saved[name]} there and {wanted[name]} here")]
  return "; ".join(filter(None, parts))


def _leaves(tree: Any) -> dict[str, str]:
  """Leaves by name, as {"optimizer/main/0/mu/w": "float32[3,4]"}."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"):
          f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
          for path, leaf in jax.tree.leaves_with_path(tree)}


def _spec(text: str) -> jax.ShapeDtypeStruct:
  """The inverse of a leaf's text, "float32[3,4]"."""
  dtype, _, shape = text.rstrip("]").partition("[")
  return jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split(",") if n), jnp.dtype(dtype))


def _some(title: str, names: Set[str], say: Callable[[str], str] = lambda name: "") -> str:
  """The first few names, parameters before their averages and optimizer states."""
  names = sorted(names, key=lambda name: (not name.startswith("params/"), name))
  more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
  return title + ", ".join(name + say(name) for name in names[:_SHOWN]) + more if names else ""
