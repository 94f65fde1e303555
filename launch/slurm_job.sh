#!/usr/bin/env bash
# The job that launch/slurm.sh submits: the command on every node, and the job queued again where it
# is not done. Slurm runs a copy of this file, which therefore stands alone.
#
#   slurm_job.sh RESTARTS COMMAND...
set -uo pipefail

[[ ${1-} =~ ^[0-9]+$ && $# -gt 1 ]] || {
  echo "error: launch/slurm.sh submits this; see launch/slurm.sh --help" >&2
  exit 2
}
restarts=$1
shift
# Preemption signals this script too: it waits for the command, which was asked to stop.
trap 'echo "asked to stop"' TERM

status=0
# What sbatch was told of CPUs a task srun takes from here alone, since Slurm 22.05.
env T2I_EXIT_STOPPED=75 srun --kill-on-bad-exit=1 --label \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} "$@" &
job=$!
while kill -0 "$job" 2>/dev/null; do sleep 1; done
wait "$job" || status=$?

turn=${SLURM_RESTART_COUNT:-0}
if ((status == 0 || status == 2)); then
  echo "the command has ended with status $status"
elif ((turn < restarts)); then
  echo "the command has ended with status $status; queued again ($((turn + 1)) of $restarts)"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
else
  echo "the command has ended with status $status, $restarts restarts later"
fi
exit "$status"
