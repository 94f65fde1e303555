"""Our process and sampling options as diffusers' scheduler_config.json has them, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from t2i_jax.errors import UserError

SCHEDULES = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v"}
SPACINGS = ("leading", "trailing", "linspace")
# The betas of a schedule of ours are for so many steps.
STEPS = 1000
_BETAS = {"beta_start": 1e-4, "beta_end": 0.02}


@dataclasses.dataclass(frozen=True)
class _Class:
  """A scheduler of diffusers.

  Attributes:
    solver: ours, where its settings choose no other.
    defaults: of what it reads, where its config is silent.
    fixed: settings that must be so for ours to be the same.
  """

  solver: str
  defaults: Mapping[str, Any]
  fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_SIGMAS = {"use_exponential_sigmas": False, "use_beta_sigmas": False}
_MULTISTEP = {
  "timestep_spacing": "linspace", "final_sigmas_type": "zero", "solver_order": 2,
  "use_karras_sigmas": False,
}  # fmt: skip
_MULTISTEP_FIXED = {**_SIGMAS, "use_flow_sigmas": False, "thresholding": False,
                    "lower_order_final": True}  # fmt: skip
CLASSES = {
  "PNDMScheduler": _Class(
    "plms", {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    {"skip_prk_steps": True},
  ),
  "DDIMScheduler": _Class(
    "ddim", {"timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True},
    {"thresholding": False, "clip_sample_range": 1.0},
  ),
  "DDPMScheduler": _Class(
    "ddpm",
    {"timestep_spacing": "leading", "clip_sample": True, "variance_type": "fixed_small"},
    {"thresholding": False, "clip_sample_range": 1.0},
  ),
  "EulerDiscreteScheduler": _Class(
    "euler",
    {"timestep_spacing": "linspace", "final_sigmas_type": "zero", "use_karras_sigmas": False},
    {**_SIGMAS, "interpolation_type": "linear", "timestep_type": "discrete"},
  ),
  "EulerAncestralDiscreteScheduler": _Class("euler_ancestral", {"timestep_spacing": "linspace"}),
  "HeunDiscreteScheduler": _Class(
    "heun", {"timestep_spacing": "linspace", "use_karras_sigmas": False},
    {**_SIGMAS, "clip_sample": False},
  ),
  "DPMSolverMultistepScheduler": _Class(
    "dpmpp_2m", {**_MULTISTEP, "algorithm_type": "dpmsolver++"},
    {**_MULTISTEP_FIXED, "solver_type": "midpoint", "euler_at_final": False,
     "use_lu_lambdas": False},
  ),
  "UniPCMultistepScheduler": _Class(
    "unipc", _MULTISTEP,
    {**_MULTISTEP_FIXED, "solver_type": "bh2", "predict_x0": True, "disable_corrector": [],
     "solver_p": None},
  ),
}  # fmt: skip
# Of rectified flow.
FLOWS = {"FlowMatchEulerDiscreteScheduler": "flow_euler",
         "FlowMatchHeunDiscreteScheduler": "flow_heun"}  # fmt: skip
_FLOW = {
  "num_train_timesteps": STEPS, "use_dynamic_shifting": False, "invert_sigmas": False,
  "shift_terminal": None,
}  # fmt: skip
_FLOW_SAMPLING = {**_SIGMAS, "use_karras_sigmas": False, "stochastic_sampling": False}
_VARIANCES = {"fixed_small": "small", "fixed_large": "large", "learned_range": "learned"}
_DPM = {
  (2, "dpmsolver++"): "dpmpp_2m", (2, "sde-dpmsolver++"): "dpmpp_2m_sde",
  (3, "dpmsolver++"): "dpmpp_3m", (3, "sde-dpmsolver++"): "dpmpp_3m_sde",
}  # fmt: skip


def process_of(published: Mapping[str, Any], source: str) -> dict[str, Any]:
  """Settings of `model` of a scheduler_config.json: the process, and what the network predicts.

  Raises:
    UserError: it has a process that is not known; `source` is named.
  """
  if published.get("_class_name") in FLOWS:
    for name, value in _FLOW.items():
      if (published.get(name, value) or None) != (value or None):
        raise UserError(f"{source}: a scheduler with {name}={published[name]} is not known, only "
                        f"with {value}")
    return {"schedule": "flow", "prediction": "flow", "shift": float(published.get("shift", 1.0))}
  schedule = published.get("beta_schedule", "linear")
  prediction = published.get("prediction_type", "epsilon")
  for name, value, known in (
    ("beta_schedule", schedule, SCHEDULES), ("prediction_type", prediction, PREDICTIONS),
    ("trained_betas", published.get("trained_betas"), (None,)),
  ):
    if value not in known:
      raise UserError(f"{source}: a scheduler with {name}={value} is not known, only with "
                      f"{' or '.join(map(str, known))}")
  steps = published.get("num_train_timesteps", STEPS)
  betas = {}
  if schedule != "squaredcos_cap_v2":
    betas = {
      name: float(published.get(name, default)) * steps / STEPS for name, default in _BETAS.items()
    }
  return {
    "schedule": SCHEDULES[schedule], "steps": steps, **betas,
    "prediction": PREDICTIONS[prediction],
    "zero_terminal_snr": bool(published.get("rescale_betas_zero_snr", False)),
  }  # fmt: skip


def options_of(published: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
  """Sampling options of a scheduler_config.json, and what of it could not be kept, or "".

  Every process can be sampled otherwise than its config says: what is not known is no error.
  """
  kind = published.get("_class_name")
  if kind in FLOWS:
    # Down to the least noise, and then to none.
    options = {"solver": FLOWS[kind], "spacing": "linspace"}
    for name, value in _FLOW_SAMPLING.items():
      if published.get(name, value) != value:
        return options, f"{kind} with {name}={published[name]} is not known, it is left out"
    return options, ""
  if kind not in CLASSES:
    return _instead(kind)
  known = CLASSES[kind]
  given = {**known.defaults, **published}
  for name, value in known.fixed.items():
    if given.get(name, value) not in (value, value or None):
      return _instead(f"{kind} with {name}={given[name]}")
  spacing = "karras" if given.get("use_karras_sigmas") else given["timestep_spacing"]
  offset = given.get("steps_offset", 0) if spacing == "leading" else 0
  final = given.get("final_sigmas_type") or (
    "zero" if given.get("set_alpha_to_one", True) else "sigma_min"
  )
  options = {
    "solver": known.solver, "spacing": spacing, "offset": offset, "final_sigma": final,
    "clip": bool(given.get("clip_sample", False)),
  }  # fmt: skip
  if kind == "DDPMScheduler":
    if given["variance_type"] not in _VARIANCES:
      return _instead(f"{kind} with variance_type={given['variance_type']}")
    options["variance"] = _VARIANCES[given["variance_type"]]
  if kind == "DPMSolverMultistepScheduler":
    chosen = given["solver_order"], given["algorithm_type"]
    if chosen not in _DPM:
      return _instead("{} with solver_order={} and algorithm_type={}".format(kind, *chosen))
    options["solver"] = _DPM[chosen]
  if kind == "UniPCMultistepScheduler":
    options["order"] = given["solver_order"]
  return options, ""


def _instead(what: str) -> tuple[dict[str, Any], str]:
  return {"solver": "ddim"}, f"{what} is not known, ddim takes its place"


def to_diffusers(model: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
  """A scheduler_config.json.

  Args:
    model: section of the config of a diffusion system.
    options: of its sampling.

  Raises:
    UserError: diffusers' schedulers have no such process.
  """
  if (model["schedule"], model["prediction"]) == ("flow", "flow"):
    kinds = {ours: theirs for theirs, ours in FLOWS.items()}
    shift = 1.0 if model["shift"] is None else model["shift"]
    kind = kinds.get(options["solver"], kinds["flow_euler"])
    return {"_class_name": kind, "num_train_timesteps": STEPS, "shift": shift}
  schedules = {ours: theirs for theirs, ours in SCHEDULES.items()}
  predictions = {ours: theirs for theirs, ours in PREDICTIONS.items()}
  for name, known in (("schedule", schedules), ("prediction", predictions)):
    if model[name] not in known:
      raise UserError(f"diffusers' pipelines have no model.{name}={model[name]}, only "
                      f"{', '.join(known)}")
  betas = {}
  if model["schedule"] != "cosine":
    published = {"scaled_linear": {"beta_start": 8.5e-4, "beta_end": 0.012}, "linear": _BETAS}
    betas = {
      name: (default if model[name] is None else model[name]) * STEPS / model["steps"]
      for name, default in published[model["schedule"]].items()
    }
  return {
    "num_train_timesteps": model["steps"], "beta_schedule": schedules[model["schedule"]], **betas,
    "prediction_type": predictions[model["prediction"]],
    "rescale_betas_zero_snr": model["zero_terminal_snr"], **_written(options),
  }  # fmt: skip


def _written(options: Mapping[str, Any]) -> dict[str, Any]:
  """The class and its settings; of DDIM where diffusers has no such solver."""
  dpm = {ours: theirs for theirs, ours in _DPM.items()}
  solver = options["solver"]
  kinds = {known.solver: kind for kind, known in CLASSES.items()}
  kind = "DPMSolverMultistepScheduler" if solver in dpm else kinds.get(solver, "DDIMScheduler")
  reads = {**CLASSES[kind].defaults, **CLASSES[kind].fixed}
  spacing = options.get("spacing", "natural")
  karras = spacing == "karras"
  # What is natural to a discrete process.
  spacing = "trailing" if spacing == "natural" else "linspace" if karras else spacing
  settings = {
    "timestep_spacing": spacing, "steps_offset": options.get("offset", 0),
    "final_sigmas_type": options.get("final_sigma", "zero"),
    "set_alpha_to_one": options.get("final_sigma", "zero") == "zero",
    "clip_sample": bool(options.get("clip", False)), "use_karras_sigmas": karras,
    "solver_order": options.get("order", 2),
    "variance_type": {ours: theirs for theirs, ours in _VARIANCES.items()}[
      options.get("variance", "small")
    ],
  }  # fmt: skip
  if solver in dpm:
    settings["solver_order"], settings["algorithm_type"] = dpm[solver]
  given = {name: value for name, value in settings.items() if name in reads}
  return {
    "_class_name": kind, **CLASSES[kind].fixed, **given, "steps_offset": settings["steps_offset"],
  }  # fmt: skip
