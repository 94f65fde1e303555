#!/usr/bin/env bash
# Trains on Cloud TPU slices, asked for as a queued resource.
#
#   launch/tpu.sh train --name=mine --zone=ZONE --type=v5litepod-16 --version=v2-alpha-tpuv5-lite \
#     --spot -- python -m t2i_jax.main --config=... --workdir=gs://BUCKET/RUN
#
# Commands:
#   create    asks for the slices, and returns
#   wait      until they are there
#   install   puts this checkout's last commit on all workers, and installs it
#   each      -- COMMAND: runs it on all workers and waits, as to copy data there
#   run       -- COMMAND: starts it on all workers, in the background
#   watch     shows process 0's last lines until the command has ended, and ends as it did
#   status    of the slices and of the command on each worker
#   stop      asks the command to save and stop
#   logs      fetches every worker's log into --to
#   delete    the slices, and all that is on them
#   train     -- COMMAND: all of this in a row, again when slices were taken away or a worker died,
#             until the command has done its work or says that it was given wrongly (status 2)
#
# Flags:
#   --name=NAME      of the queued resource and its slices
#   --zone=ZONE      where
#   --project=NAME   gcloud's own default otherwise
#   --type=TYPE      of each slice, such as v5litepod-16; for create and train
#   --version=NAME   of the machines' software, such as v2-alpha-tpuv5-lite; for create and train
#   --slices=N       how many (1); the command then needs --config.mesh.slice=N
#   --spot           cheaper, and may be taken away at any time
#   --create=FLAG    another flag for gcloud's create; may be repeated
#   --env=NAME=VALUE for the command; may be repeated
#   --every=SECONDS  between two looks (60)
#   --restarts=N     how often train starts the command again (100)
#   --delete         train fetches the logs and deletes the slices at the end
#   --to=FOLDER      of logs (NAME-logs)
#   --dry-run        print the gcloud commands and run none; train prints one round
set -euo pipefail
here=$(dirname -- "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
. "$here/common.sh"

name="" zone="" project="" type="" version="" slices=1 spot="" every=60 restarts=100 delete="" to=""
create=() command=() environment=()
action=${1:---help}
[[ $action != --help ]] || set -- "$action" --help
flags "$0" "name zone project type version slices spot? create+ every restarts delete? to" "${@:2}"
case $action in
  create | wait | install | each | run | watch | status | stop | logs | delete | train) ;;
  *) fail "unknown command '$action'; see $0 --help" ;;
esac
given --name "$name"
given --zone "$zone"
whole --slices "$slices"
whole --every "$every"
whole --restarts "$restarts"
case $action in
  create | train) given --type "$type"; given --version "$version" ;;
esac
case $action in
  each | run | train) ((${#command[@]})) || fail "no command; write it after --" ;;
  *) ((${#command[@]} == 0)) || fail "$action takes no command after --" ;;
esac
found gcloud

where=(--zone="$zone" ${project:+--project="$project"} --quiet)
queued=(gcloud compute tpus queued-resources)
machines=(gcloud compute tpus tpu-vm)
worker=t2i/code/launch/worker.sh
to=${to:-$name-logs}
nodes=("$name")
if ((slices > 1)); then
  nodes=()
  for ((i = 0; i < slices; i++)); do nodes+=("$name-$i"); done
fi

# The state of the queued resource: ACTIVE, SUSPENDED...; nothing where there is none, and UNKNOWN where
# gcloud does not say, as without a network.
state() {
  local told
  told=$(mktemp)
  if ! "${queued[@]}" describe "$name" "${where[@]}" '--format=value(state.state)' 2>"$told" &&
    ! grep -q NOT_FOUND "$told"; then
    say "$(date -u +%T) gcloud does not say how $name is: $(tail -n 1 "$told")"
    echo UNKNOWN
  fi
  rm -f "$told"
}

# The same, once gcloud says it: what is not known to be gone is not asked for again, or deleted.
known() {
  local now
  while now=$(state) && [[ $now == UNKNOWN ]]; do sleep "$every"; done
  printf '%s\n' "$now"
}

create() {
  local shape=(--node-id="$name")
  ((slices > 1)) && shape=(--node-count="$slices" --node-prefix="$name")
  run "${queued[@]}" create "$name" "${where[@]}" "${shape[@]}" --accelerator-type="$type" \
    --runtime-version="$version" ${spot:+--spot} ${create[@]+"${create[@]}"}
}

delete() { run "${queued[@]}" delete "$name" "${where[@]}" --force; }

# Waits until the slices are there; fails where they will never be.
wait_for() {
  local now last=""
  if [[ $DRY_RUN ]]; then
    echo "# every $every s until it says ACTIVE:"
    run "${queued[@]}" describe "$name" "${where[@]}" '--format=value(state.state)'
    return
  fi
  while :; do
    now=$(known)
    [[ $now == "$last" ]] || say "$(date -u +%T) $name: ${now:-not there}"
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | "") return 1 ;;
    esac
    last=$now
    sleep "$every"
  done
}

# on_all FLAGS COMMAND: on every worker of every slice; fails where one of them cannot be reached.
on_all() {
  local node
  for node in "${nodes[@]}"; do
    run "${machines[@]}" ssh "$node" "${where[@]}" --worker=all --command="${*: -1}" "${@:1:$#-1}" ||
      return 1
  done
}

install() {
  local archive="${TMPDIR:-/tmp}/$name.tar.gz" node
  run git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD
  for node in "${nodes[@]}"; do
    run "${machines[@]}" scp "$archive" "$node:t2i.tar.gz" "${where[@]}" --worker=all || return 1
  done
  # Not under a run: it imports as it goes.
  on_all "if [ \"\$(bash $worker status 2>/dev/null)\" = running ]; then \
echo error: a run is under way on \"\$(hostname)\", stop it first >&2; exit 2; fi; \
rm -rf t2i/code && mkdir -p t2i/code && tar -xzf t2i.tar.gz -C t2i/code && bash $worker install"
}

start() {
  on_all "bash $worker start $(quoted env ${environment[@]+"${environment[@]}"} "${command[@]}")"
}

# One line a worker: running, lost, none or "ended STATUS".
statuses() { on_all "bash $worker status"; }

# verdict LINES: 2 where a worker says so, else another status that is not 0, 75 for one that is lost.
verdict() {
  local ended
  ended=$(sed -nE 's/.*ended ([0-9]+)$/\1/p; s/.*(lost|none)$/75/p' <<<"$1" | sort -nu)
  if grep -qx 2 <<<"$ended"; then echo 2; else tail -n 1 <<<"$ended"; fi
}

# Follows the command until it has ended on all workers. Exits with its status: 0 where all did their
# work, 2 where one was given wrongly; 100 where the slices are gone.
watch() {
  local found status now unreachable=0
  if [[ $DRY_RUN ]]; then
    echo "# every $every s until all have ended:"
    statuses
    run "${machines[@]}" ssh "${nodes[0]}" "${where[@]}" --worker=0 --command="bash $worker log 3"
    return
  fi
  while :; do
    if found=$(statuses 2>/dev/null) && [[ $found ]]; then
      unreachable=0
      if ! grep -qw running <<<"$found"; then break; fi
      "${machines[@]}" ssh "${nodes[0]}" "${where[@]}" --worker=0 \
        --command="bash $worker log 3" 2>/dev/null || true
    else
      now=$(known)
      ((++unreachable))
      say "$(date -u +%T) workers cannot be reached; the slices are ${now:-gone}"
      # Right after a preemption they still count as there for a while.
      if [[ $now != ACTIVE ]] || ((unreachable >= 5)); then return 100; fi
    fi
    sleep "$every"
  done
  status=$(verdict "$found")
  say "$(date -u +%T) the command has ended with status $status"
  return "$status"
}

logs() {
  local node
  for node in "${nodes[@]}"; do
    run mkdir -p "$to/$node"
    run "${machines[@]}" ssh "$node" "${where[@]}" --worker=all --output-directory="$to/$node" \
      --command="bash $worker log"
  done
}

# Slices that are there, with the code on them.
ensure() {
  case $([[ $DRY_RUN ]] || known) in
    ACTIVE) statuses >/dev/null 2>&1 && return ;;
    "") create || return ;;
    FAILED | SUSPENDED | SUSPENDING) delete && create ;;
  esac
  wait_for && install
}

train() {
  local try status=1
  for ((try = 0; try <= restarts; try++)); do
    if ((try)); then
      sleep "$every"
      say "$(date -u +%T) starting again ($try of $restarts)"
    fi
    if ! ensure; then
      say "$(date -u +%T) the slices could not be had"
      ((try)) || [[ $(known) ]] || fail "gcloud has created nothing; what it says stands above"
      continue
    fi
    status=0
    if ! [[ $DRY_RUN ]] && statuses 2>/dev/null | grep -qw running; then
      say "the command is under way already"
    else
      start || true  # watch sees what came of it
    fi
    watch || status=$?
    if [[ $DRY_RUN ]] || ((status == 0 || status == 2)); then break; fi
    if ((status == 100)) && [[ $(known) == ACTIVE ]]; then delete || true; fi
  done
  if [[ $delete ]]; then
    logs || true
    delete
  fi
  return "$status"
}

case $action in
  wait) wait_for || fail "the slices will not come; see gcloud compute tpus queued-resources describe $name" ;;
  each) on_all "$(quoted "${command[@]}")" ;;
  run) start ;;
  stop) on_all "bash $worker stop" ;;
  status) [[ $DRY_RUN ]] || echo "$name: $(state)"; statuses ;;
  *) "$action" ;;
esac
