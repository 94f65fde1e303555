"""A config's parts, built: what the commands share before they part ways."""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from t2i_jax import bucketing, data, systems
from t2i_jax import config as configs
from t2i_jax.data.base import Source
from t2i_jax.errors import UserError, unknown
from t2i_jax.parallel.distributed import agree_any, barrier, broadcast_bytes, is_primary
from t2i_jax.systems import trees
from t2i_jax.systems.base import Field, System
from t2i_jax.systems.conditioning import GROUP, encoder_names
from t2i_jax.text.tokenizer import Tokenizers, train_tokenizer

# What a run's work directory holds of it, beside checkpoints, metrics and samples.
CONFIG, TOKENIZER = "config.json", "tokenizer.json"

# Keys that a run may change when it is resumed; all others make it another run.
FREE_SECTIONS = ("mesh", "sharding", "checkpoint", "log", "sample", "evaluate")
FREE_KEYS = (
  "train.duration", "data.workers", "data.memory_limit_mb", "data.prefetch", "data.latents",
  "text.cache", "resume", "init_from",
)


def compute_dtype(config: ConfigDict) -> Any:
  """The type of matmuls and convolutions that `config.precision.compute` asks for."""
  name = config.precision.compute
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  choices = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
  return configs.choose("precision.compute", name, choices)


def build_system(
  config: ConfigDict, components: Mapping[str, System] | None = None,
  **cached: Any,
) -> System:
  """The system of a config, in the config's precision; arguments as of `systems.build`."""
  return systems.build(config, components, compute_dtype(config), **cached)


@dataclasses.dataclass
class Components:
  """The frozen systems of a run.

  Attributes:
    systems: by name.
    variables: `{collection: {component: tree}}` of arrays; of their shapes where `held_by` holds
      the arrays.
    about: what builds them again, and which they are:
      `{name: {"config", "components", "step", "fingerprint"}}`, nested.
    held_by: the checkpoint directory of the run that stored them, or None.
    tokenizers: of their prompts, where they were read from their exports.
    resting: names of those that training does not compute with; they stay off the devices.
  """

  systems: dict[str, System]
  variables: dict[str, dict[str, Any]]
  about: dict[str, Any]
  held_by: epath.Path | None = None
  tokenizers: dict[str, Tokenizers] = dataclasses.field(default_factory=dict)
  resting: tuple[str, ...] = ()


def build_with(config: ConfigDict, about: Mapping[str, Any]) -> System:
  """The system of a config whose components are described by `about`, as in `Components`."""
  return build_system(config, _described(about))


def _described(about: Mapping[str, Any]) -> dict[str, System]:
  return {
    name: build_with(configs.from_json(json.dumps(part["config"])), part["components"])
    for name, part in about.items()
  }


def load_components(config: ConfigDict, workdir: epath.Path | None = None) -> Components:
  """The systems of `config.components`.

  A run that has begun keeps what it began with, whatever has become of the exports since: its own
  copy is used, or that of the run which it resumes.

  Args:
    config: of the run. Frozen parameters take the type of `precision.frozen`.
    workdir: of the run.

  Raises:
    UserError: for an export that cannot be read.
  """
  from t2i_jax import export
  from t2i_jax.training.checkpoint import Checkpoints

  if not config.components:
    return Components({}, {}, {})
  if workdir is not None and (workdir / CONFIG).exists():
    runs = [workdir]
  else:
    # Left by a command that failed before it was a run.
    if workdir is not None and is_primary() and (workdir / "checkpoints" / "frozen").exists():
      (workdir / "checkpoints" / "frozen").rmtree()
    runs = [epath.Path(config.resume)] if config.resume else []
  for run in runs:
    checkpoints = Checkpoints(run / "checkpoints", read_only=True)
    if checkpoints.has_frozen():
      meta, flat = checkpoints.describe_frozen()
      checkpoints.close()
      about = meta["components"]
      if run != workdir:
        _check_same_components(config, about, run)
      return Components(
        _described(about), trees.unflatten(flat), about, checkpoints.directory
      )
  dtype = configs.choose(
    "precision.frozen", config.precision.frozen,
    {"float32": jnp.float32, "bfloat16": jnp.bfloat16},
  )
  found = Components({}, {}, {})
  for name, path in config.components.items():
    exported = export.read(path)
    found.systems[name] = build_with(exported.config, exported.components)
    found.tokenizers[name] = exported.tokenizers
    found.about[name] = {"config": exported.config.to_dict(), "components": exported.components,
                         "step": exported.step, "fingerprint": export.fingerprint(path)}
    for kind, groups in exported.variables.items():
      if kind == "params":
        groups = jax.tree.map(lambda x: x.astype(dtype), groups)
      found.variables.setdefault(kind, {})[name] = groups
  return found


def _check_same_components(config: ConfigDict, about: Mapping[str, Any], run: epath.Path) -> None:
  """Raises UserError where `config.components` are other ones than the run that is resumed had."""
  from t2i_jax import export

  for name, path in config.components.items():
    if name not in about:
      raise UserError(f"resume={run} has no component '{name}', only "
                      f"{', '.join(sorted(about)) or 'none'}; its parameters were trained without, "
                      "so begin another run")
    # An export that is gone is not asked for: the run has its own copy.
    if (export.located(path) / export.CONFIG).is_file() and (
      export.fingerprint(path) != about[name]["fingerprint"]
    ):
      raise UserError(f"components.{name}={path} is another one than resume={run} was trained "
                      "with; name that one, or begin another run")


def open_data(config: ConfigDict, split: str, resolution: int, log_dir: str | None = None,
              progress=None) -> Source:
  """A split of the config's data set, decoded into memory where it fits."""
  from t2i_jax.data.memory import in_memory

  source = data.open_source(
    config.data.name, split, resolution, config.seed, config.data.options.to_dict(),
    log_dir if is_primary() else None,
  )
  return in_memory(source, progress, memory_limit=config.data.memory_limit_mb << 20)


def training_split(config: ConfigDict) -> str:
  """The split that is trained on."""
  return data.splits(config.data.name)[0]


def held_out_splits(config: ConfigDict) -> tuple[str, ...]:
  """The splits to evaluate on: those that the config names, else all that are not trained on."""
  there = data.splits(config.data.name)
  for name in config.evaluate.splits:
    if name not in there:
      raise unknown(f"split of data set '{config.data.name}'", name, there)
  return tuple(config.evaluate.splits) or there[1:]


def resolution_of(system: System) -> int:
  """Side of the pictures that a system trains on, or whose latents it does."""
  image = system.batch_spec().get("image")
  return system.resolution if image is None else image.shape[0]


def make_tokenizer(config: ConfigDict, source: Source) -> Tokenizers:
  """Trains the run's tokenizer on the training captions; the same on every host."""
  made = None
  if is_primary():
    text = config.text
    trained = train_tokenizer(source.captions(), text.vocab_size, text.length, text.tokenizer)
    made = Tokenizers({GROUP: trained}).to_json().encode()
  return Tokenizers.from_json(broadcast_bytes(made).decode())


def run_tokenizers(
  config: ConfigDict, workdir: epath.Path, source: Source, given: Mapping[str, Tokenizers]
) -> Tokenizers:
  """The run's tokenizers: its own, those of `resume`, of frozen text encoders or of `init_from`.

  A model keeps the ids that it knows; where none does, a tokenizer is trained. There are none for
  a system that reads no text.

  Args:
    config, workdir: of the run.
    source: whose captions a new one is trained on.
    given: the components'.

  Raises:
    UserError: for a tokenizer that cannot be read, or of another length than the config's.
  """
  if not systems.load(config.system).reads_text:
    return Tokenizers({})
  if (workdir / CONFIG).exists():
    return Tokenizers.load(workdir / TOKENIZER)
  text_of = systems.load(config.system).text_of
  if text_of or config.text.encoder in ("component", "none"):
    if config.resume:
      return Tokenizers.load(epath.Path(config.resume) / TOKENIZER)
    if text_of:
      return given[text_of]
    if config.text.encoder == "none":
      return Tokenizers({})
    return component_tokenizers(config, given)
  if config.resume:
    key, tokenizers = "resume", Tokenizers.load(epath.Path(config.resume) / TOKENIZER)
  elif config.init_from:
    from t2i_jax import export

    exported = export.read(config.init_from)
    key, tokenizers = "init_from", exported.tokenizers
    if set(tokenizers.of) != {GROUP}:
      raise UserError(f"init_from={config.init_from} reads text with the frozen "
                      f"{', '.join(tokenizers.of)}; set text.encoder=component and its components")
    if tokenizers.of[GROUP].length != config.text.length:
      with naming_differences(config, exported.config):
        raise UserError(f"init_from={config.init_from} takes prompts of "
                        f"{tokenizers.of[GROUP].length} tokens")
  else:
    return make_tokenizer(config, source)
  lengths = [tokenizer.length for tokenizer in tokenizers.of.values()]
  if lengths != [config.text.length]:
    value = configs.flatten(config).get(key)
    raise UserError(f"{key}={value} takes prompts of {lengths[0]} tokens, the config "
                    f"has text.length={config.text.length}; set it to the same")
  return tokenizers


def component_tokenizers(config: ConfigDict, given: Mapping[str, Tokenizers]) -> Tokenizers:
  """The tokenizers of `text.encoders`, out of those that components have."""
  return Tokenizers({name: given[name].of[GROUP] for name in encoder_names(config.text.encoders)})


def take_sampling_options(config: ConfigDict, components: Components) -> None:
  """Gives the config of a system that samples as a component does that one's sampling options.

  Those that the config has by itself stay, in the type that they have there.

  Raises:
    UserError: for an option that the component does not have.
  """
  text_of = systems.load(config.system).text_of
  if text_of not in components.about:
    return
  options = dict(components.about[text_of]["config"]["sample"]["options"])
  for name, value in config.sample.options.items():
    if name not in options:
      raise unknown(f"sampling option of components.{text_of}", name, options)
    options[name] = configs.typed(f"config key sample.options.{name}", str(value), options[name])
  with config.unlocked():
    config.sample.options = ConfigDict(options)


def truncated_captions(
  config: ConfigDict, tokenizers: Tokenizers, captions: Iterable[str]
) -> list[str]:
  """A line for each encoder that does not take captions whole, judged by the first 2,000."""
  key = "--length of its conversion" if config.text.encoder == "component" else "text.length"
  captions, lines = list(itertools.islice(captions, 2000)), []
  for name, tokenizer in tokenizers.of.items():
    lengths = tokenizer.lengths(captions)
    share = float((lengths > tokenizer.length).mean())
    if share:
      lines.append(f"{share:.0%} of the captions are longer than the {tokenizer.length} tokens "
                   f"that {name} takes ({key}), and are cut; the longest has {lengths.max()}")
  return lines


@contextlib.contextmanager
def naming_differences(config: ConfigDict, theirs: ConfigDict) -> Iterator[None]:
  """Adds to a UserError what the config's `model` and `text` have otherwise than another's."""
  try:
    yield
  except UserError as error:
    ours, theirs = configs.flatten(config), configs.flatten(theirs)
    different = [
      f"{name}={value}" for name, value in theirs.items()
      if name.partition(".")[0] in ("model", "text") and name in ours and ours[name] != value
    ]
    if not different:
      raise
    # The text first: its names are few, and every model has them.
    different = sorted(different, key=lambda pair: not pair.startswith("text."))
    more = f" and {len(different) - 6} more" if len(different) > 6 else ""
    raise UserError(f"{error}; it was trained with "
                    f"{' '.join(f'--config.{pair}' for pair in different[:6])}{more}") from error


def abstract_batch(system: System, rows: int) -> dict[str, Any]:
  """A batch of what the system reads, as shapes."""
  return trees.unflatten({
    name: jax.ShapeDtypeStruct((rows, *field.shape), field.dtype)
    for name, field in system.batch_spec().items()
  })


def check_batch_spec(system: System, batch: Mapping[str, Any], where: str,
                     shapes: Sequence[tuple[int, int]] = ()) -> None:
  """Raises UserError unless the batch has what the system reads.

  Args:
    system: whose `batch_spec` is asked for.
    batch: arrays with leading batch axis.
    where: the data set's name, for the message.
    shapes: (height, width) of the pictures of batches, where they have several.
  """
  given = {
    name: Field(tuple(leaf.shape[1:]), str(leaf.dtype))
    for name, leaf in trees.flatten(batch).items()
  }
  spec = system.batch_spec()
  if shapes:
    bucketing.check(system, shapes)
    spec["image"] = Field((*batch["image"].shape[1:3], 3), "uint8")
  for name, field in spec.items():
    if name not in given:
      raise UserError(
        f"{type(system).__name__} needs '{name}' in its batches, which the data set '{where}' does "
        f"not give; it gives {', '.join(sorted(given))}"
      )
    if given[name] != field:
      raise UserError(f"{type(system).__name__} needs '{name}' as {field.dtype}{list(field.shape)},"
                      f" the data set '{where}' gives {given[name].dtype}{list(given[name].shape)}")


def player_sections(config: ConfigDict, system: System, steps_of) -> dict[str, dict[str, Any]]:
  """Each player's optimizer section: `config.optimizer` under `config.players.NAME`.

  Args:
    config: with `optimizer` and `players`.
    system: whose players they are.
    steps_of: turns a duration into steps, given the value and its key.

  Raises:
    UserError: for a player or an option that does not exist.
  """
  names = [player.name for player in system.players]
  for name, section in config.players.items():
    if name not in names:
      raise unknown(f"player of {config.system}", name, names)
    for key in section:
      if key not in config.optimizer:
        raise unknown(f"option of player {name}", key, config.optimizer)
  sections = {}
  for name in names:
    section = {**config.optimizer, **config.players.get(name, {})}
    sections[name] = {**section, "warmup": steps_of(section["warmup"], "optimizer.warmup")}
  return sections


def identity(config: ConfigDict) -> dict[str, Any]:
  """The flat keys that make a run what it is."""
  return {
    key: value for key, value in configs.flatten(config).items()
    if key.partition(".")[0] not in FREE_SECTIONS and key not in FREE_KEYS
  }


def check_workdir(workdir: epath.Path, config: ConfigDict) -> None:
  """Makes the work directory, or checks that what it holds is this config's run.

  Raises:
    UserError: when it holds another config's run, or cannot be made.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"cannot make --workdir={workdir}: {error.strerror or error}") from error
  except ImportError as error:  # of the package that speaks with a store such as gs://
    raise UserError(f"--workdir={workdir} cannot be reached: {error}") from error
  path = workdir / CONFIG
  if not path.exists():
    return
  try:
    theirs = identity(configs.from_json(path.read_text()))
  except ValueError as error:
    raise UserError(f"{path} is not a config: {error}; choose another --workdir") from error
  ours = identity(configs.from_json(configs.to_json(config)))
  different = [k for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k)]
  if different:
    key = different[0]
    more = f" and {len(different) - 1} more" if len(different) > 1 else ""
    raise UserError(
      f"--workdir={workdir} holds another run: its {key} is {theirs.get(key)!r}, this config's is "
      f"{ours.get(key)!r}{more}; choose another --workdir (to go on from that run with this "
      f"config, add --config.resume={workdir})"
    )


def check_shared(workdir: epath.Path, seconds: float = 10.0, flag: str = "--workdir") -> None:
  """Raises UserError unless all hosts see the same work directory.

  Args:
    workdir: of the run. A store such as `gs://` is one for all.
    seconds: that a file may take to be seen by the others.
    flag: that names it.
  """
  if jax.process_count() == 1 or "://" in os.fspath(workdir):
    return
  token = broadcast_bytes(os.urandom(8) if is_primary() else None).hex()
  path = workdir / f".seen-by-all-{token}"
  if is_primary():
    path.touch()
  barrier("written")
  deadline = time.monotonic() + seconds
  while not (seen := path.exists()) and time.monotonic() < deadline:
    time.sleep(0.5)
  blind = agree_any(not seen)
  if is_primary():
    path.unlink()
  if blind:
    raise UserError(f"{flag}={workdir} is not the same folder on all hosts; name one on a file "
                    "system that they share, or gs://BUCKET/FOLDER")


@contextlib.contextmanager
def locked(workdir: epath.Path, flag: str = "--workdir") -> Iterator[None]:
  """Keeps other processes from writing to a work directory; the lock ends with the process.

  Stores such as `gs://` have no locks.

  Raises:
    UserError: when another process does.
  """
  if not is_primary() or "://" in os.fspath(workdir):
    yield
    return
  with open(workdir / ".lock", "w") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      doing = "training in" if flag == "--workdir" else "writing to"
      raise UserError(f"another process is {doing} {flag}={workdir}; wait for it, stop it, or "
                      f"choose another {flag}") from error
    yield


def claim_workdir(workdir: epath.Path, config: ConfigDict, tokenizers: Tokenizers) -> None:
  """Makes the work directory this run's; done when nothing else can fail before training.

  A command that failed earlier, for a wrong value, can so be given again with
  the right one.

  Raises:
    UserError: when it cannot be written.
  """
  if not is_primary():
    return
  try:
    for name, text in ((TOKENIZER, tokenizers.to_json()), (CONFIG, configs.to_json(config))):
      beside = workdir / f".{name}.writing"
      beside.write_text(text)
      beside.replace(workdir / name)
  except OSError as error:
    raise UserError(f"cannot write to --workdir={workdir}: {error.strerror or error}") from error


def read_run_config(workdir: epath.Path) -> ConfigDict:
  """The config of the run in a work directory.

  Raises:
    UserError: where there is no run.
  """
  path = workdir / CONFIG
  if not path.exists():
    raise UserError(f"no run in '{workdir}': it has no {CONFIG}")
  try:
    return configs.from_json(path.read_text())
  except ValueError as error:
    raise UserError(f"{path} is not a config: {error}") from error
