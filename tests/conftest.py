"""Eight CPU devices for every test, and programs that compile fast, set before jax is imported."""

import importlib.metadata
import os

flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
# A third of the suite's time is saved by the older code generator of XLA for CPUs; since 0.11 there
# is no choice, and a flag that XLA does not know ends the process.
if importlib.metadata.version("jaxlib").startswith("0.10."):
  flags.append("--xla_cpu_use_fusion_emitters=false")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(flags).strip()

# Tests run few steps of programs that are small: optimising them takes longer than it saves.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Fixtures of the tests that train.
pytest_plugins = ["runs"]
