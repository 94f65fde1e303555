"""Jobs in several processes."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def run(function: Callable[..., Any], jobs: Sequence[tuple], workers: int,
        done: Callable[[int], None]) -> None:
  """Calls `function(*job)` for each job, and `done(number of the job)` after each in turn.

  What a job raises is raised here, and jobs that have not begun are left.

  Args:
    function: of a module, so that another process finds it.
    jobs: arguments.
    workers: processes; fewer than two work in this one.
    done: told how far it is.
  """
  if workers < 2 or len(jobs) < 2:
    for number, job in enumerate(jobs):
      function(*job)
      done(number)
    return
  # Spawned: what this process has imported may not be forked.
  pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"))
  try:
    # At most a few jobs wait: their arguments are copied when they are handed over.
    waiting = []
    for number, job in enumerate(jobs):
      waiting.append((number, pool.submit(function, *job)))
      if len(waiting) > 2 * workers:
        first, future = waiting.pop(0)
        future.result()
        done(first)
    for number, future in waiting:
      future.result()
      done(number)
  finally:
    pool.shutdown(wait=True, cancel_futures=True)
