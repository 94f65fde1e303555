import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from t2i_jax.errors import UserError
from t2i_jax.parallel import compiler_flags

V5P, V6E = "TPU v5", "TPU v6 lite"


@pytest.mark.parametrize(
  "option", compiler_flags.OPTIONS, ids=lambda option: f"{option.name}={option.value}"
)
def test_options_are_explained(option):
  assert option.platform in ("cpu", "gpu", "tpu")
  assert option.versions
  assert len(option.reason) > 40


def test_options_are_for_one_platform_and_version(monkeypatch):
  monkeypatch.setattr(compiler_flags.jaxlib, "__version__", "0.10.2")
  barriers = {"xla_disable_hlo_passes": "cse_barrier_expander"}
  assert compiler_flags.compiler_options("cpu") == {
    **barriers, "xla_cpu_experimental_ynn_fusion_type": ""
  }
  always = compiler_flags.compiler_options("tpu")
  assert always["xla_tpu_enable_async_collective_fusion"] == "true" and len(always) == 5
  assert compiler_flags.compiler_options("gpu") == {}
  monkeypatch.setattr(compiler_flags.jaxlib, "__version__", "0.11.0")
  assert compiler_flags.compiler_options("cpu") == barriers


def test_what_is_risky_is_asked_for(monkeypatch):
  def options(asked, platform="tpu", kind=V6E):
    monkeypatch.setenv("T2I_COMPILER", asked)
    return compiler_flags.compiler_options(platform, kind)

  always = options("")
  assert options("vmem") == always | {"xla_tpu_scoped_vmem_limit_kib": "98304"}
  assert options("vmem", kind=V5P)["xla_tpu_scoped_vmem_limit_kib"] == "65472"
  assert options("vmem", kind="TPU v4") == always  # nobody has named a value for it
  assert options("none, slices").keys() == {
    "xla_tpu_enable_data_parallel_all_reduce_opt", "xla_tpu_data_parallel_opt_different_sized_ops"
  }
  assert options("none,xla_a=1,xla_b=") == {"xla_a": "1", "xla_b": ""}
  assert options("vmem", "gpu", "NVIDIA H200") == {}
  with pytest.raises(UserError, match="set in T2I_COMPILER 'vmen'; did you mean 'vmem'"):
    options("vmen")


def test_the_installed_compiler_knows_them(monkeypatch):
  @jax.jit
  def convolve(x, kernel):
    return jax.lax.conv(x, kernel, (1, 1), "SAME")

  options = compiler_flags.compiler_options("cpu")
  lowered = convolve.lower(jnp.ones((1, 4, 8, 8)), jnp.ones((4, 4, 3, 3)))
  assert lowered.compile(compiler_options=options) is not None
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option") as error:
    lowered.compile(compiler_options={**options, "xla_no_such_option": "1"})
  assert compiler_flags.refused(error.value) is None
  monkeypatch.setenv("T2I_COMPILER", "xla_no_such_option=1")
  told = compiler_flags.refused(error.value)
  assert "leave out xla_no_such_option" in str(told)


TPU = """
import sys
import jax, jax.numpy as jnp
from t2i_jax.parallel import compiler_flags
from t2i_jax.parallel.mesh import batch_sharding
from t2i_jax.parallel.topology import slice_mesh

mesh = slice_mesh(sys.argv[1], {"fsdp": -1})
device = mesh.devices.flat[0]
x = jax.ShapeDtypeStruct((mesh.size * 8, 128), jnp.bfloat16, sharding=batch_sharding(mesh))
lowered = jax.jit(lambda x: x @ x.T).lower(x)
options = {o.name: o.value for o in compiler_flags.OPTIONS
           if o.platform == "tpu" and (not o.kinds or device.device_kind in o.kinds)}
lowered.compile(compiler_options=options)
assert options.items() >= compiler_flags.options_of(device).items()
assert ("xla_tpu_scoped_vmem_limit_kib" in options) == (sys.argv[1][:3] in ("v5p", "v6e"))
print("compiled", device.device_kind, len(options))
"""


@pytest.mark.full
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler: pip install 'jax[tpu]'"
)
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_tpu_compiler_knows_all_of_each_generation(topology):
  # One library compiles for all generations; v4 is left out, as jax makes no mesh of its cores.
  # In a process of its own: the compiler's library reads the environment once.
  done = subprocess.run([sys.executable, "-c", TPU, topology], timeout=300, text=True,
                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                        env={"JAX_PLATFORMS": "cpu", "PATH": ""})
  assert done.returncode == 0 and "compiled TPU" in done.stdout, done.stdout[-2000:]
