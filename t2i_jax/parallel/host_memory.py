"""How the process keeps its memory when programs run on the CPU."""

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> bool:
  """Has freed memory stay with the process, ready for the next step; whether that is possible.

  On the CPU, XLA allocates a step's temporaries afresh at every step. glibc
  returns blocks of their size to the kernel as soon as they are freed, and the
  kernel clears every page before it hands them out again: 14,000 page faults a
  step of the quickstart. The process's memory then stays at its peak, which the
  next step needs anyway.
  """
  if not sys.platform.startswith("linux"):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (OSError, AttributeError):  # another C library
    return False
  return all([mallopt(_M_MMAP_THRESHOLD, 2**30), mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)])
