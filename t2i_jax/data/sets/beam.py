"""Jobs as an Apache Beam pipeline, for data sets that outgrow a machine."""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from t2i_jax.errors import UserError


def run(function: Callable[..., Any], jobs: Sequence[tuple], runner: str, options: str,
        done: Callable[[int], None]) -> None:
  """As `parallel.run`, by the workers of a Beam runner; `done` is told when all are.

  A worker may do a job twice, or two workers the same one: `function` writes beside, then renames.

  Args:
    function: of a module that the workers have too.
    jobs: arguments, each small: all of them are in the pipeline's description.
    runner: its name, such as "DirectRunner", "FlinkRunner" or "DataflowRunner".
    options: of the pipeline, as on a command line.
    done: told how far it is.

  Raises:
    UserError: Beam is not there, it knows no such runner, or a job failed.
  """
  try:
    import apache_beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise UserError(f"--runner={runner} needs Apache Beam ({error}): pip install -e "
                    "'.[beam]'") from None
  try:
    # The description of the pipeline names what is run; the session's other modules are not sent.
    given = PipelineOptions(shlex.split(options), runner=runner, save_main_session=False)
    with apache_beam.Pipeline(options=given) as pipeline:
      created = pipeline | "Jobs" >> apache_beam.Create(list(jobs))
      spread = created | "Spread" >> apache_beam.Reshuffle()
      spread | "Work" >> apache_beam.MapTuple(function)
  except Exception as error:  # each runner has its own
    reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    raise UserError(f"--runner={runner} did not do all of {len(jobs)} jobs: {reason.strip()}; "
                    "given again, the same command goes on with the rest") from error
  if jobs:
    done(len(jobs) - 1)
