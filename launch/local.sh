#!/usr/bin/env bash
# Runs a command as several processes of one run, on this machine.
#
#   launch/local.sh --processes=2 -- python -m t2i_jax.main --config=... --workdir=...
#
# Each line of output begins with the process that wrote it. Where one fails, the others are asked to
# stop, then killed, and this ends with its exit status.
#
# Flags:
#   --processes=N     how many (2)
#   --devices=N       CPU devices of each, for a machine without accelerators
#   --port=N          where process 0 listens (12321)
#   --grace=N         seconds between asking a process to stop and killing it (30)
#   --env=NAME=VALUE  for the command; may be repeated
#   --dry-run         print the commands and run nothing
set -euo pipefail
# shellcheck source=launch/common.sh
. "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

processes=2 devices="" port=12321 grace=30
command=() environment=()
flags "$0" "processes devices port grace" "$@"
whole --processes "$processes"
whole --port "$port"
whole --grace "$grace"
((${#command[@]})) || fail "no command; write it after --"
settings=(${environment[@]+"${environment[@]}"} T2I_COORDINATOR="localhost:$port" T2I_NUM_PROCESSES="$processes")
if [[ $devices ]]; then
  whole --devices "$devices"
  settings+=(JAX_PLATFORMS=cpu XLA_FLAGS="--xla_force_host_platform_device_count=$devices")
fi

if [[ $DRY_RUN ]]; then
  for ((i = 0; i < processes; i++)); do
    printf '%s &\n' "$(quoted env "${settings[@]}" T2I_PROCESS_ID="$i" "${command[@]}")"
  done
  echo wait
  exit
fi

pipes=$(mktemp -d)
started=() groups=() readers=() asked="" status=0
trap 'rm -rf "$pipes"' EXIT
# ask: those that have not ended to stop. Whatever still runs after the grace is killed, each with what
# it has started: it is the leader of a group.
ask() {
  for i in "${!started[@]}"; do kill -TERM "${started[i]}" 2>/dev/null || true; done
  asked=${asked:-$SECONDS}
}
trap ask TERM INT

for ((i = 0; i < processes; i++)); do
  mkfifo "$pipes/$i"
  while IFS= read -r line || [[ $line ]]; do printf '[%s] %s\n' "$i" "$line"; done <"$pipes/$i" &
  readers+=($!)
  setsid env "${settings[@]}" T2I_PROCESS_ID="$i" "${command[@]}" >"$pipes/$i" 2>&1 &
  started+=($!) groups+=($!)
done

while ((${#started[@]})); do
  for i in "${!started[@]}"; do
    kill -0 "${started[i]}" 2>/dev/null && continue
    code=0
    wait "${started[i]}" 2>/dev/null || code=$?
    unset "started[$i]"
    if ((code && !status)); then
      status=$code
      ((${#started[@]})) && say "process $i ended with status $code; the others are asked to stop"
      ask
    fi
  done
  if [[ $asked ]] && ((SECONDS - asked > grace)); then break; fi
  sleep 0.2 || true
done
if ((${#started[@]} && !status)); then status=137; fi
for group in "${groups[@]}"; do kill -KILL -- "-$group" 2>/dev/null || true; done
wait "${readers[@]}" 2>/dev/null || true
exit "$status"
