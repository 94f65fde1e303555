"""Programs compiled for TPU slices on a machine without a TPU."""

import importlib.util
import subprocess
import sys

import pytest

from t2i_jax.errors import UserError
from t2i_jax.parallel.topology import slice_mesh

COMPILED = """
import jax, jax.numpy as jnp
from t2i_jax.parallel.mesh import batch_sharding, replicated
from t2i_jax.parallel.topology import bytes_a_chip, slice_mesh

assert slice_mesh("v5e:1x1", {"fsdp": -1}).size == 1
mesh = slice_mesh("v5e:2x4", {"fsdp": -1})
assert dict(mesh.shape)["fsdp"] == 8
x = jax.ShapeDtypeStruct((64, 1024), jnp.float32, sharding=batch_sharding(mesh))
w = jax.ShapeDtypeStruct((1024, 256), jnp.float32, sharding=replicated(mesh))
program = jax.jit(lambda x, w: x @ w, out_shardings=batch_sharding(mesh)).lower(x, w).compile()
found = bytes_a_chip(program)
assert found["arguments"] == 8 * 1024 * 4 + 1024 * 256 * 4, found
assert found["outputs"] == 8 * 256 * 4 and found["peak"] >= found["arguments"], found
"""


@pytest.mark.parametrize("topology", ["v5e", "v9:2x4", "v5e:2by4", "v5e:"])
def test_what_is_no_slice_is_one_line(topology):
  with pytest.raises(UserError, match="is unknown; write v4, v5e, v5p, v6e and a shape") as error:
    slice_mesh(topology, {"fsdp": -1})
  assert "\n" not in str(error.value)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="the TPU's compiler: pip install 'jax[tpu]'"
)
def test_bytes_a_chip_by_hand():
  # In a process of its own: the compiler's library reads the environment once.
  subprocess.run([sys.executable, "-c", COMPILED], check=True, timeout=300,
                 env={"JAX_PLATFORMS": "cpu", "PATH": ""})
