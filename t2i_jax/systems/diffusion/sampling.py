"""How any diffusion system draws: solver, guidance and what a picture to begin with decides."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from t2i_jax.diffusion import editing, guidance, solvers, thresholding
from t2i_jax.diffusion.combination import check_combination
from t2i_jax.diffusion.grid import make_grid, start_index
from t2i_jax.diffusion.parameterization import Prediction, noise_of
from t2i_jax.errors import UserError, unknown
from t2i_jax.systems import trees
from t2i_jax.systems.base import GUIDE, Array, Conditioning
from t2i_jax.systems.trees import Variables

# What `Conditioning.extra` holds for the sampler and not for the network: what to begin with, and
# where it is to stay.
START, KNOWN = "start", "known"
GUIDANCES = ("classifier_free", "projected")


@struct.dataclass
class Options:
  """Sampling options.

  Attributes:
    solver, order: one of `diffusion.solvers.SOLVERS`: "ddpm" (ancestral), "ddim", "dpmpp_2m"...
    steps: of the solver; of most, network evaluations a picture.
    spacing, offset, final_sigma: of the steps; see `diffusion.grid.make_grid`.
    guidance: scale of the text's guidance; 1 is the conditional model alone.
    guidance_kind: "classifier_free", or "projected" (Sadat et al. 2024), whose are the options
      `momentum`, `threshold` and `parallel`; see `diffusion.guidance.projected`.
    guidance_low, guidance_high: guidance is left out where sigma / alpha is not between them; 0 as
      the high one is no bound (Kynkaanniemi et al. 2024).
    rescale: share to which guided outputs get the deviation of unguided ones (Lin et al. 2024).
    guide_scale: of the component `guide`, if there is one.
    eta: of DDIM.
    variance: of the ancestral solver, "small" or "large", or "learned" where the network does.
    clip: clip the predicted x_0 to [-1, 1] at every step.
    dynamic: clip to this quantile of each picture in place of 1, and scale back to [-1, 1]
      (Saharia et al. 2022, section 2.3); 0 for none.
    strength: share of the steps that are taken where a picture is given to begin with.
    height, width: of the pictures, in pixels; 0 for those that were trained on.
  """

  solver: str = struct.field(pytree_node=False, default="ddim")
  order: int = struct.field(pytree_node=False, default=2)
  steps: int = struct.field(pytree_node=False, default=50)
  spacing: str = struct.field(pytree_node=False, default="natural")
  offset: int = struct.field(pytree_node=False, default=0)
  final_sigma: str = struct.field(pytree_node=False, default="zero")
  guidance: float = 2.0
  guidance_kind: str = struct.field(pytree_node=False, default="classifier_free")
  guidance_low: float = 0.0
  guidance_high: float = 0.0
  rescale: float = 0.0
  momentum: float = -0.5
  threshold: float = struct.field(pytree_node=False, default=0.0)
  parallel: float = 0.0
  guide_scale: float = 1.0
  eta: float = struct.field(pytree_node=False, default=0.0)
  variance: str = struct.field(pytree_node=False, default="small")
  clip: bool = struct.field(pytree_node=False, default=True)
  dynamic: float = struct.field(pytree_node=False, default=0.0)
  strength: float = struct.field(pytree_node=False, default=1.0)
  height: int = struct.field(pytree_node=False, default=0)
  width: int = struct.field(pytree_node=False, default=0)


def draw(
  system: Any, variables: Variables, conditioning: Conditioning, keys: Array, options: Any
) -> Array:
  """Samples [B, h, w, c] of what a `Denoiser` models; both branches of the guidance in one batch.

  Args:
    system: the denoiser.
    variables: all of its.
    conditioning: of its `condition`.
    keys: [B], one a sample.
    options: its `Options`.
  """
  solver = _solver(system, options)
  grid = make_grid(
    system.process, options.steps, options.spacing, offset=options.offset,
    convention=solver.convention, final_sigma=options.final_sigma,
  )
  extra = dict(conditioning.extra)
  reading, start, known = (extra.pop(name, None) for name in (GUIDE, START, KNOWN))
  shape = system.shape_of(options.height or system.resolution, options.width or system.resolution)
  noise = solvers.start_noise(keys, shape)
  if start is None:
    x = grid.deviation * noise
  else:
    grid = grid.after(start_index(options.steps, options.strength))
    x = editing.noised(start, noise, grid.alpha[0], grid.sigma[0])
  given = system.prepared(conditioning.replace(extra=extra), options)

  def predict(x: Array, row: solvers.Row, average: Any):
    prediction, share, average = _predicted(system, variables, x, row, given, average, options)
    if options.dynamic:
      prediction = thresholding.dynamic(prediction, x, row.alpha, row.sigma, options.dynamic)
    elif options.clip:
      prediction = thresholding.static(prediction, x, row.alpha, row.sigma)
    if known is not None:
      prediction = editing.inpainted(prediction, x, row.alpha, row.sigma, start, known)
    gradient = None
    if system.guide:
      gradient = options.guide_scale * _guide_gradient(system, variables, x, row.time, reading)
    return solvers.Evaluation(*prediction, share, gradient), average

  average = jnp.zeros_like(x) if options.guidance_kind == "projected" else ()
  return solvers.solve(solver(grid), predict, x, keys, average)


def _solver(system: Any, options: Any) -> solvers.Solver:
  """The solver of the options, which are checked."""
  solver = solvers.make_solver(options.solver, options.eta, options.variance, options.order)
  check_combination(system.process, system.parameterization, solver)
  if options.variance == "learned" and not system.learned_variance:
    raise UserError("sampling option variance=learned: this network has learned none; use small "
                    "or large")
  if options.guidance_kind not in GUIDANCES:
    raise unknown("sampling option guidance_kind", options.guidance_kind, GUIDANCES)
  if not 0.0 <= options.dynamic <= 1.0:
    raise UserError(f"sampling option dynamic={options.dynamic} is no quantile; use 0 to 1")
  return solver


def _predicted(
  system, variables, x: Array, row: solvers.Row, given: Conditioning, average: Any, options: Any
) -> tuple[Prediction, Array | None, Any]:
  """The guided prediction, the share of the larger variance, and what projection remembers."""
  alpha, sigma = row.alpha, row.sigma
  time = system.process.embedded(row.time)
  scaled = x * system.parameterization.input_scale(alpha, sigma)
  if given.null is None:
    output, share = system.split(system.output(variables, scaled, jnp.full(len(x), time), given))
    return system.parameterization.predict(x, output, alpha, sigma), share, average
  doubled = jax.tree.map(guidance.interleave, given.replace(null=None), given.null)
  outputs = system.output(variables, guidance.both(scaled), jnp.full(2 * len(x), time), doubled)
  output, null = guidance.separate(outputs)
  (output, share), (null, _) = system.split(output), system.split(null)
  high = jnp.where(options.guidance_high > 0, options.guidance_high, jnp.inf)
  scale = guidance.scale_within(
    jnp.asarray(options.guidance, x.dtype), alpha, sigma, options.guidance_low, high
  )
  if options.guidance_kind == "projected":
    x_0, null_x_0 = (
      system.parameterization.predict(x, part, alpha, sigma).x_0 for part in (output, null)
    )
    x_0, average = guidance.projected(
      x_0, null_x_0, scale, average, options.momentum, options.threshold, options.parallel
    )
    return Prediction(x_0, noise_of(x, x_0, alpha, sigma)), share, average
  guided = guidance.classifier_free(output, null, scale)
  guided = guidance.rescaled(guided, output, options.rescale)
  return system.parameterization.predict(x, guided, alpha, sigma), share, average


def _guide_gradient(system, variables, x: Array, time: Array, reading: Any) -> Array:
  own = trees.group(variables, GUIDE)

  def log_prob(x: Array) -> Array:
    given = Conditioning(extra=reading)
    return jnp.sum(system.guide.log_prob(own, x, jnp.full(len(x), time), given))

  return jax.grad(log_prob)(x)
