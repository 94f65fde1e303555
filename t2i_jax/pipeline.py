"""Prompts in, pictures out: what `sample`, `evaluate` and training's own grids share.

  import t2i_jax
  pipeline = t2i_jax.load("runs/quickstart/export")
  pictures = pipeline(["a large red circle at the top left"], seed=1)
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from t2i_jax import assembly, export, guiding
from t2i_jax.errors import UserError
from t2i_jax.parallel.compiler_flags import compiler_options
from t2i_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh, replicated
from t2i_jax.parallel.sharding import parse_rules, place, shardings
from t2i_jax.systems import trees
from t2i_jax.systems.base import GUIDE, System
from t2i_jax.systems.capabilities import Editor, Finisher, Sampler, make_options, require
from t2i_jax.systems.pictures import quantize_images
from t2i_jax.systems.randomness import picture_keys
from t2i_jax.text.tokenizer import Tokenizers


class Pipeline:
  """A system with its variables and tokenizer, ready to draw.

  Text is encoded by one compiled program, pictures are drawn by another, and a
  third makes pictures of what is drawn where that is latents; each is compiled
  once for a batch size and a set of static options. Picture i is a function of
  (variables, prompt, seed, i, options), whatever the batch size and the number
  of devices.

  Attributes:
    system: what draws.
    tokenizers: of the prompts.
    resting: variables that stay on the host: of text encoders, which visit the devices only while
      all prompts of a call are encoded, and of a first stage, which does while a call draws.
    config: of the run that trained it; None will do where nothing rests.
    step: of that run.
  """

  def __init__(self, system: System, tokenizers: Tokenizers, mesh: Mesh, variables: Any = None,
               config: Any = None, step: int = 0, resting: Any = None):
    require(system, Sampler, "sampling")
    self.system, self.tokenizers, self.mesh = system, tokenizers, mesh
    self.resting = resting or {}
    self.variables, self.config, self.step = variables, config, step
    if system.labels:
      guiding.check_labels(system, config)
    compiled = {"compiler_options": compiler_options(mesh.devices.flat[0].platform)}
    self._condition = jax.jit(system.condition, **compiled)
    self._whole = jax.jit(lambda x: x, out_shardings=replicated(mesh), **compiled)
    self._finishes = isinstance(system, Finisher)
    draw = self._drawn if self._finishes else self._pictures
    placed = batch_sharding(mesh) if self._finishes else replicated(mesh)
    self._sample = jax.jit(draw, out_shardings=placed, **compiled)
    self._finish = jax.jit(self._finished, out_shardings=replicated(mesh), **compiled)

  @classmethod
  def load(
    cls, path: str | Path, mesh: Mapping[str, int] | None = None, offload_text: bool = False,
    guide: str | Path = "",
  ) -> "Pipeline":
    """Reads an export onto the devices.

    Args:
      path: the export's folder.
      mesh: devices along each axis; all of them along `data` by default.
      offload_text: keep frozen text encoders off the devices while pictures are drawn.
      guide: another export, which steers the sampler; in place of the export's own, if it has one.

    Raises:
      UserError: for a folder that is no whole export, or whose networks are not this version's.
    """
    exported = export.read(path)
    if guide:
      exported = guiding.guided(exported, guide)
    devices = make_mesh(mesh or {"data": -1})
    system = assembly.build_with(exported.config, exported.components)
    assembly.check_fits(system, exported)
    names = system.text.frozen_groups if offload_text else ()
    resting, working = trees.split(exported.variables, names)
    rules = parse_rules(exported.config.sharding.rules)
    placed = place(working, shardings(working, rules, devices))
    return cls(
      system, exported.tokenizers, devices, placed, exported.config, exported.step, resting
    )

  def __call__(
    self,
    prompts: Sequence[str] | str,
    seed: int = 0,
    *,
    progress: Callable[[int], None] = lambda done: None,
    **given: Any,
  ) -> np.ndarray:
    """Draws one picture a prompt.

    Args:
      prompts: n texts, or one.
      seed: of all draws.
      progress: told how many pictures are done, after each batch.
      **given: as for `batches`.

    Returns:
      uint8 [n, H, W, 3].

    Raises:
      UserError: as `batches`.
    """
    pictures, done = [], 0
    for drawn in self.batches(prompts, seed, **given):
      pictures.append(drawn)
      done += len(drawn)
      progress(done)
    return np.concatenate(pictures)

  def batches(
    self,
    prompts: Sequence[str] | str,
    seed: int = 0,
    *,
    first: int = 0,
    batch_size: int = 64,
    variables: Any = None,
    negative: str = "",
    image: np.ndarray | None = None,
    known: np.ndarray | None = None,
    guide_image: np.ndarray | None = None,
    guide_weights: Mapping[str, float] | None = None,
    **options: Any,
  ) -> Iterator[np.ndarray]:
    """Draws one picture a prompt, and hands over each batch as soon as it is there.

    Args:
      prompts: n texts, or one.
      seed: of all draws.
      first: index of the first picture; picture i of the call has key
        `fold_in(seed, first + i)`.
      batch_size: pictures drawn at a time, rounded up to what the devices take.
      variables: in place of the pipeline's own, such as those of a run.
      negative: a text in place of the empty one, from which guidance leads away.
      image: uint8 [H, W, 3], to begin with; the option `strength` says how much is drawn anew.
      known: bool [H, W], where the image is to stay.
      guide_image: uint8 [H, W, 3] of the guide's resolution, for a guide that steers towards a
        picture (`PictureGuide`).
      guide_weights: of such a guide's kinds of likeness, by name.
      **options: of the system's sampler, such as `guidance` or `steps`.

    Yields:
      uint8 [at most batch_size, H, W, 3], n in all.

    Raises:
      UserError: for an option that the system does not have, a seed or batch size out of range, or
        a system that is not guided, or cannot begin with a picture or be guided by one.
    """
    prompts = [prompts] if isinstance(prompts, str) else prompts
    if not prompts:
      raise UserError("no prompts to draw")
    if not 0 <= seed < 2**32:
      raise UserError(f"seed={seed} is out of range; use 0 to {2**32 - 1}")
    if batch_size < 1:
      raise UserError(f"batch_size={batch_size} draws nothing; use 1 or more")
    chosen = make_options(self.system, options)
    begin = self._beginning(chosen, image, known)
    if guide_image is not None or guide_weights:
      begin[GUIDE] = guiding.references(self.system, guide_image, guide_weights or {})
    variables = self.variables if variables is None else variables
    shards = batch_shards(self.mesh)
    size = -(-min(batch_size, len(prompts)) // shards) * shards
    if self.system.labels:
      self.read(prompts, len(prompts))  # what cannot be read is found before anything is drawn
    starts = range(0, len(prompts), size)
    parts = [list(prompts[start : start + size]) for start in starts]
    encoders, others = trees.split(self.resting, self.system.text.frozen_groups)
    # A picture to begin with is read by the first stage, which then does not wait.
    reading = trees.merge(variables, self._visiting(others)) if begin else variables
    encoded = self._encoded(reading, encoders, parts, size, negative, begin)
    visiting = None
    for start, part, conditioning in zip(starts, parts, encoded, strict=True):
      if visiting is None:  # not before the encoders have gone
        visiting = trees.merge(variables, self._visiting(others))
      indices = np.arange(first + start, first + start + size)
      with jax.set_mesh(self.mesh):
        drawn = self._sample(
          variables, conditioning, jnp.uint32(seed), self._put(indices), chosen
        )
        if self._finishes:
          drawn = self._finish(visiting, drawn)
      drawn = np.asarray(drawn)[: len(part)]
      # A first stage gives back almost what it was given; what is known stays as it is.
      yield drawn if known is None else np.where(known[..., None], image, drawn)

  def _beginning(
    self, options: Any, image: np.ndarray | None, known: np.ndarray | None
  ) -> dict[str, Any]:
    """What a batch has of a picture to begin with, [1, ...] each."""
    if image is None:
      if known is not None:
        raise UserError("there is a mask and no picture of which a part could stay; give both")
      return {}
    require(self.system, Editor, "beginning with a picture")
    side = self.system.resolution
    size = (options.height or side, options.width or side)
    for name, array in (("picture", image), ("mask", known)):
      if array is not None and array.shape[:2] != size:
        raise UserError(f"the {name} to begin with is {array.shape[0]} x {array.shape[1]}, and "
                        f"{size[0]} x {size[1]} are drawn; resize it")
    begin = {"image": image[None]}
    return begin if known is None else {**begin, "known": known[None, ..., None]}

  def _visiting(self, resting: Any) -> Any:
    """Variables that rest, on the devices."""
    if not resting:
      return {}
    return place(resting, shardings(resting, parse_rules(self.config.sharding.rules), self.mesh))

  def _encoded(
    self, variables: Any, encoders: Any, parts: list[list[str]], size: int, negative: str,
    begin: Mapping[str, Any],
  ) -> Iterator[Any]:
    """The conditioning of each part of the prompts, filled up to `size`.

    `encoders` are the variables of those that rest.
    """
    if not encoders:
      for part in parts:
        yield self._encode(variables, part, size, negative, begin)
      return
    whole = trees.merge(variables, self._visiting(encoders))
    kept = [self._off(self._encode(whole, part, size, negative, begin)) for part in parts]
    del whole
    for conditioning in kept:
      with jax.set_mesh(self.mesh):
        yield self._put(conditioning)

  def _encode(
    self, variables: Any, part: list[str], size: int, negative: str,
    begin: Mapping[str, Any],
  ) -> Any:
    batch = self.read(part, size) | jax.tree.map(lambda x: np.repeat(x, size, axis=0), begin)
    with jax.set_mesh(self.mesh):
      given = self._condition(variables, self._put(batch))
      if not negative:
        return given
      if given.null is None:
        raise UserError(f"{type(self.system).__name__} is not guided by its text, so it takes no "
                        "negative prompt; leave it out")
      other = self._condition(variables, self._put(self.read([negative] * size, size)))
      extra = {name: other.extra[name] for name in given.null.extra}
      return given.replace(null=other.replace(null=None, extra=extra))

  def _off(self, conditioning: Any) -> Any:
    """Conditioning on every host, whole."""
    return jax.tree.map(np.asarray, self._whole(conditioning))

  def check(self, variables: Any, **options: Any) -> None:
    """Traces, without compiling or drawing, what a call with these options would run.

    Args:
      variables: of the call; shapes are enough.
      **options: of the system's sampler.

    Raises:
      UserError: for what the system refuses.
    """
    rows = batch_shards(self.mesh)
    chosen = make_options(self.system, options)
    with jax.set_mesh(self.mesh):
      whole = trees.merge(variables, self.resting)
      given = jax.eval_shape(self.system.condition, whole, self.read([], rows))
      call = (variables, given, jnp.uint32(0), np.arange(rows), chosen)
      drawn = jax.eval_shape(self._drawn, *call)
      if self._finishes:
        jax.eval_shape(self._finished, whole, drawn)

  def read(self, prompts: Sequence[str], rows: int) -> dict[str, Any]:
    """A batch of prompts on the host, filled up to `rows`: their `text`, and `label` if wanted.

    Raises:
      UserError: for a prompt whose labels cannot be read.
    """
    blank = rows - len(prompts)
    batch: dict[str, Any] = {"text": self.tokenizers.encode([*prompts, *[""] * blank])}
    if self.system.labels:
      labels = guiding.read_labels(self.system, self.config, prompts)
      batch["label"] = np.pad(labels, ((0, blank), (0, 0)), constant_values=-1)
    return batch

  def truncated(self, prompts: Sequence[str]) -> list[str]:
    """A line for each prompt that the encoder cannot take whole, saying what is cut."""
    lines = map(self.tokenizers.truncated, prompts)
    return [line for line in lines if line is not None]

  def _put(self, tree: Any) -> Any:
    """Host arrays, the same on every host, split over the devices by row."""
    sharding = batch_sharding(self.mesh)
    return jax.tree.map(
      lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )

  def _drawn(self, variables, conditioning, seed, indices, options):
    keys = picture_keys(seed, indices)
    return self.system.sample(variables, conditioning, keys, options)

  def _pictures(self, *call):
    return quantize_images(self._drawn(*call))

  def _finished(self, variables, drawn):
    return quantize_images(self.system.finish(variables, drawn))
