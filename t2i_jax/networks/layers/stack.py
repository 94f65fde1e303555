"""Equal blocks one after the other: scanned over stacked parameters, and recomputed by a policy."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from t2i_jax.networks.layers.barriers import computed_once

Array = jax.Array
# What a block computes again in the backward pass. "none": nothing. "full": all of it, so that of a
# block its input alone is kept. "dots": all but the products with weights. "attention": all but
# what attention read. "offload": as "dots", with those products kept in the host's memory.
REMATS = ("none", "full", "dots", "attention", "offload")
# `jax.ad_checkpoint.checkpoint_name` of what attention read.
ATTENDED = "attended"
# Tokens and what else a block hands to the next.
Carry = Any


def run_blocks(
  make: Callable[[str], nn.Module], name: str, depth: int, x: Carry, given: tuple = (),
  each: Any = None, keep: bool = False, remat: str = "none", scan: bool = True, first: int = 0,
) -> tuple[Carry, Any]:
  """Runs `depth` equal blocks, inside a module's compact method.

  Args:
    make: a block of a name, called as `block(x, each, *given) -> x`.
    name: of the blocks' parameters, whose first axis is the block with `scan`; else those of block
      i are `name_i`, counted from `first`.
    depth: number of blocks; there may be none.
    x: tokens, or a tree of them.
    given: what every block is given.
    each: arrays [depth, ...] of which every block gets its own; a tree, or None.
    keep: whether what every block gave is returned too.
    remat: one of `REMATS`.
    scan: one program for a block, run `depth` times, rather than `depth` programs.

  Returns:
    x of the last block, and x of all of them [depth, ...], or None.
  """
  if not depth:
    return x, None

  def step(block: nn.Module, x: Carry, each: Any, *given: Any) -> tuple[Carry, Any]:
    x = block(x, each, *given)
    return x, x if keep else None

  if remat != "none":
    # In a scan the compiler cannot merge the two computations, and need not be kept from it.
    step = nn.remat(step, prevent_cse=not scan, policy=_policy(remat))
  if scan:
    every = (0, *(nn.broadcast for _ in given))
    step = nn.scan(
      step, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
      in_axes=every, length=depth,
    )  # fmt: skip
    return step(make(name), x, each, *given)
  kept = []
  for i in range(depth):
    own = jax.tree.map(lambda leaf: leaf[i], each)  # noqa: B023
    x, one = step(make(f"{name}_{first + i}"), computed_once(x), own, *given)
    kept.append(one)
  return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept) if keep else None


def _policy(remat: str) -> Callable[..., Any] | None:
  """What of a recomputed block is kept; None for nothing."""
  policies = jax.checkpoint_policies
  if remat == "dots":
    return policies.dots_with_no_batch_dims_saveable
  if remat == "attention":
    return policies.save_only_these_names(ATTENDED)
  if remat == "offload":
    return policies.offload_dot_with_no_batch_dims("device", "pinned_host")
  return None
