#!/usr/bin/env bash
# Trains on the GPUs of a Slurm cluster; the job is queued again until the command has done its work.
#
#   launch/slurm.sh --nodes=2 --gpus=8 -- python -m t2i_jax.main --config=... --workdir=SHARED_FOLDER
#
# One process a node has all of its GPUs. Before the time limit, and when the job is preempted, the
# command is asked to save and stop; the job then goes back to the queue, and the command on from
# there.
#
# Flags:
#   --name=NAME      of the job (t2i_jax)
#   --nodes=N        how many (1)
#   --gpus=N         of each node (1)
#   --cpus=N         of each node, for the loader
#   --time=TIME      limit of one turn in the queue, as sbatch reads it
#   --log=FILE       of output (slurm-%j.log)
#   --notice=SECONDS before the limit at which the command is asked to stop (120)
#   --restarts=N     how often the job is queued again (100)
#   --env=NAME=VALUE for the command; may be repeated
#   --sbatch=FLAG    another flag for sbatch, such as --partition=NAME; may be repeated
#   --dry-run        print the sbatch command and run nothing
set -euo pipefail
here=$(dirname -- "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
. "$here/common.sh"

name=t2i_jax nodes=1 gpus=1 cpus="" time="" log=slurm-%j.log notice=120 restarts=100
sbatch=() command=() environment=()
flags "$0" "name nodes gpus cpus time log notice restarts sbatch+" "$@"
whole --nodes "$nodes"
whole --gpus "$gpus"
whole --notice "$notice"
whole --restarts "$restarts"
[[ -z $cpus ]] || whole --cpus "$cpus"
((${#command[@]})) || fail "no command; write it after --"
found sbatch

# The signal goes to the processes that srun started, not to the script around them.
run sbatch --job-name="$name" --nodes="$nodes" --ntasks-per-node=1 --gpus-per-node="$gpus" \
  ${cpus:+--cpus-per-task="$cpus"} ${time:+--time="$time"} --output="$log" --open-mode=append \
  --requeue --signal="TERM@$notice" ${sbatch[@]+"${sbatch[@]}"} "$here/slurm_job.sh" "$restarts" \
  env ${environment[@]+"${environment[@]}"} "${command[@]}"
