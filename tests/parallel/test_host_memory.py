import subprocess
import sys

import pytest

# Three allocations of 256 MiB, the last of which is counted.
PROGRAM = """
import resource, sys
import numpy as np
from t2i_jax.parallel.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
for _ in range(3):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  np.full(2**28, 1, np.uint8)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_used_again_without_page_faults():
  def run(mode):
    done = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return map(int, done.stdout.split())

  _, before = run("leave")
  kept, after = run("keep")
  if not kept:
    pytest.skip("this C library has no mallopt")
  # numpy asks for huge pages where it may, of which 256 MiB are 128.
  assert before > 100 and after < before / 10
