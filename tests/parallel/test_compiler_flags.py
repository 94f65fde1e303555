import jax
import jax.numpy as jnp
import pytest

from t2i_jax.parallel import compiler_flags


@pytest.mark.parametrize("option", compiler_flags.OPTIONS, ids=lambda option: option.name)
def test_options_are_explained(option):
  assert option.platform in ("cpu", "gpu", "tpu")
  assert option.versions
  assert len(option.reason) > 40


def test_options_are_for_one_platform_and_version(monkeypatch):
  monkeypatch.setattr(compiler_flags.jaxlib, "__version__", "0.10.2")
  assert compiler_flags.compiler_options("cpu") == {"xla_cpu_experimental_ynn_fusion_type": ""}
  assert compiler_flags.compiler_options("tpu") == {}
  monkeypatch.setattr(compiler_flags.jaxlib, "__version__", "0.11.0")
  assert compiler_flags.compiler_options("cpu") == {}


def test_the_installed_compiler_knows_them():
  @jax.jit
  def convolve(x, kernel):
    return jax.lax.conv(x, kernel, (1, 1), "SAME")

  options = compiler_flags.compiler_options("cpu")
  lowered = convolve.lower(jnp.ones((1, 4, 8, 8)), jnp.ones((4, 4, 3, 3)))
  assert lowered.compile(compiler_options=options) is not None
  with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
    lowered.compile(compiler_options={**options, "xla_no_such_option": "1"})
