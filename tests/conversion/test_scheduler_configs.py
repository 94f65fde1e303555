"""Sampling settings as diffusers writes them."""

import pytest

from t2i_jax.conversion import schedulers
from t2i_jax.diffusion.grid import FINAL_SIGMAS, SPACINGS, make_grid
from t2i_jax.diffusion.schedules import make_process
from t2i_jax.diffusion.solvers import SOLVERS, make_solver
from t2i_jax.errors import UserError

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# scheduler_config.json of Stable Diffusion 1.5, 2.1 and XL, as published.
SD1 = {
  "_class_name": "PNDMScheduler", **BETAS, "clip_sample": False, "num_train_timesteps": 1000,
  "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
SD2 = {
  "_class_name": "DDIMScheduler", **BETAS, "clip_sample": False, "num_train_timesteps": 1000,
  "prediction_type": "v_prediction", "set_alpha_to_one": False, "steps_offset": 1,
  "skip_prk_steps": True, "trained_betas": None,
}  # fmt: skip
SDXL = {
  "_class_name": "EulerDiscreteScheduler", **BETAS, "clip_sample": False,
  "interpolation_type": "linear", "num_train_timesteps": 1000, "prediction_type": "epsilon",
  "sample_max_value": 1.0, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
  "timestep_spacing": "leading", "trained_betas": None, "use_karras_sigmas": False,
}  # fmt: skip
# Of the first DDPMs.
DDPM = {"_class_name": "DDPMScheduler", "beta_start": 1e-4, "beta_end": 0.02,
        "beta_schedule": "linear", "clip_sample": True, "variance_type": "fixed_large"}
DPM = {"_class_name": "DPMSolverMultistepScheduler", **BETAS}


@pytest.mark.parametrize("published, process, options", [
  (SD1, {"prediction": "epsilon"},
   {"solver": "plms", "spacing": "leading", "offset": 1, "final_sigma": "sigma_min",
    "clip": False}),
  (SD2, {"prediction": "v"},
   {"solver": "ddim", "spacing": "leading", "offset": 1, "final_sigma": "sigma_min",
    "clip": False}),
  # Euler's is "final_sigmas_type", which is silent here; "set_alpha_to_one" it does not read.
  (SDXL, {"prediction": "epsilon"},
   {"solver": "euler", "spacing": "leading", "offset": 1, "final_sigma": "zero", "clip": False}),
  (DDPM, {"schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
   {"solver": "ddpm", "spacing": "leading", "offset": 0, "final_sigma": "zero", "clip": True,
    "variance": "large"}),
  ({**DPM, "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++", "steps_offset": 1}, {},
   {"solver": "dpmpp_2m_sde", "spacing": "karras", "offset": 0, "final_sigma": "zero",
    "clip": False}),
  ({**DPM, "solver_order": 3, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
   {"zero_terminal_snr": True},
   {"solver": "dpmpp_3m", "spacing": "trailing", "offset": 0, "final_sigma": "zero",
    "clip": False}),
  ({"_class_name": "UniPCMultistepScheduler", **BETAS, "solver_order": 3,
    "final_sigmas_type": "sigma_min"}, {},
   {"solver": "unipc", "spacing": "linspace", "offset": 0, "final_sigma": "sigma_min",
    "clip": False, "order": 3}),
], ids=["SD1", "SD2", "SDXL", "DDPM", "Karras", "zero SNR", "UniPC"])  # fmt: skip
def test_published_settings_are_ours_and_back(published, process, options):
  found = schedulers.process_of(published, "it")
  assert found == {
    "schedule": "scaled_linear", "steps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
    "prediction": "epsilon", "zero_terminal_snr": False, **process,
  }  # fmt: skip
  sampling, lost = schedulers.options_of(published)
  assert sampling == options and lost == ""
  written = schedulers.to_diffusers(found, sampling)
  assert schedulers.process_of(written, "it") == found
  assert schedulers.options_of(written) == (sampling, "")
  for name in ("_class_name", "beta_start", "beta_schedule", "timestep_spacing", "steps_offset"):
    if name in published and not (published.get("use_karras_sigmas") and name == "steps_offset"):
      assert written[name] == published[name]


@pytest.mark.parametrize("name", schedulers.CLASSES)
def test_what_is_chosen_can_be_run(name):
  """Of every class in its own defaults: the names are those of our solvers and grids."""
  fixed = schedulers.CLASSES[name].fixed
  options, lost = schedulers.options_of(
    {"_class_name": name, **BETAS, **fixed, "steps_offset": 1}
  )
  assert not lost and options["solver"] in SOLVERS
  assert options["spacing"] in SPACINGS and options["final_sigma"] in FINAL_SIGMAS
  solver = make_solver(options["solver"], order=options.get("order", 2))
  grid = make_grid(
    make_process("scaled_linear"), 20, options["spacing"], offset=options["offset"],
    convention=solver.convention, final_sigma=options["final_sigma"],
  )  # fmt: skip
  assert solver(grid).evaluations >= 20


@pytest.mark.parametrize("changed, lost", [
  ({"_class_name": "LMSDiscreteScheduler"}, "LMSDiscreteScheduler is not known, ddim"),
  ({"skip_prk_steps": False}, "PNDMScheduler with skip_prk_steps=False is not known, ddim"),
  ({**DPM, "algorithm_type": "dpmsolver"}, "solver_order=2 and algorithm_type=dpmsolver is not"),
  ({**DDPM, "variance_type": "learned"}, "variance_type=learned is not known"),
  ({**SDXL, "use_beta_sigmas": True}, "use_beta_sigmas=True is not known"),
])  # fmt: skip
def test_another_solver_takes_the_place_of_one_that_is_not_known(changed, lost):
  options, line = schedulers.options_of({**SD1, **changed})
  assert options == {"solver": "ddim"} and lost in line


@pytest.mark.parametrize("changed, message", [
  ({"beta_schedule": "sigmoid"}, "it: a scheduler with beta_schedule=sigmoid is not known"),
  ({"trained_betas": [0.1]}, "trained_betas"),
  ({"prediction_type": "flow"}, "prediction_type=flow"),
])  # fmt: skip
def test_another_process_is_refused(changed, message):
  with pytest.raises(UserError, match=message):
    schedulers.process_of({**SD1, **changed}, "it")


def test_betas_are_for_a_thousand_steps():
  found = schedulers.process_of({**SD1, "num_train_timesteps": 500}, "it")
  assert found["beta_end"] == 0.006
  made = make_process("scaled_linear", 500, beta_start=found["beta_start"],
                      beta_end=found["beta_end"])
  assert 1 - made.alphas_cumprod[0] == pytest.approx(0.00085)


def test_what_diffusers_has_not_is_named():
  model = {**schedulers.process_of(SD1, "it"), "schedule": "vp"}
  with pytest.raises(UserError, match="no model.schedule=vp"):
    schedulers.to_diffusers(model, {"solver": "ddim"})
  # A solver that it has not is DDIM there.
  written = schedulers.to_diffusers({**model, "schedule": "cosine"}, {"solver": "flow_euler"})
  assert written["_class_name"] == "DDIMScheduler" and "beta_start" not in written
